"""The manifests of one workload, and those that all share."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from .options import Options
from .workload import DATA, KEY, KEYS, MODELS, TEXTS, Workload

# Of each volume its name, where it is mounted, whether read-only, and what it is.
Volumes = list[tuple[str, str, bool, dict[str, Any]]]

USER = 10001  # the image's own; any that is not root will do
SERVER, PIPELINE, PYTHON = "llama-server", "doit", "python3"  # on PATH, in the images
SETTINGS = "llama-pipeline"  # the ConfigMap of what prepares models
TOKEN = {"name": "huggingface", "key": "token", "optional": True}  # of a Secret, for Hugging Face

PERIOD = 5  # seconds between two probes of a server that starts or is ready
DRAIN = 5  # seconds until no Service routes to a pod that ends
DOWNLOADING = 3600  # seconds that a model's download may take
# A pod keeps answering until no Service routes to it any more.
DRAINED = {"preStop": {"exec": {"command": ["sleep", str(DRAIN)]}}}
GIB = 1024**3
BESIDE = GIB // 2  # of memory, for the server itself
WITH_GPU = 4 * GIB  # of memory: the weights only pass through the page cache
UNKNOWN_MEMORY = 8 * GIB
UNKNOWN_DISK = 100 * GIB
PREPARING, CONVERTING = GIB, 4 * GIB

UNPRIVILEGED = {
    "runAsNonRoot": True,
    "runAsUser": USER,
    "runAsGroup": USER,
    "fsGroup": USER,
    "fsGroupChangePolicy": "OnRootMismatch",
    "seccompProfile": {"type": "RuntimeDefault"},
}
PRIVILEGED_PORTS = 1024  # those below: not every container runtime lets such a user listen there
ANY_PORT = {"sysctls": [{"name": "net.ipv4.ip_unprivileged_port_start", "value": "0"}]}
ISOLATED = {
    "automountServiceAccountToken": False,
    "enableServiceLinks": False,  # their variables would look like llama-server's
}
CONFINED = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}
HOME = "/tmp"  # noqa: S108
SETTINGS_OF_PREPARE = {
    "HF_HOME": f"{DATA}/.cache/huggingface",
    "LLAMA_PIPELINE_CACHE": f"{DATA}/.cache/llama-pipeline",
    "LLAMA_PIPELINE_HOME": DATA,
}

CLIENT = {"llama-pipeline/client": "true"}  # the label of pods and namespaces with access
SPARE = 1.1  # of disk
# What an autoscaler looks at: `llamacpp:requests_processing` and so on in /metrics, which the
# cluster's metrics adapter passes on under names without a colon (docs/kubernetes.md has its rule).
LLAMA_METRICS = ("llamacpp_requests_processing", "llamacpp_requests_deferred")
VLLM_METRICS = ("vllm_num_requests_running", "vllm_num_requests_waiting")
SCALE_DOWN_SECONDS = 600  # of less work before a pod is removed: a new one has to load first
SLOWLY = {"scaleDown": {"stabilizationWindowSeconds": SCALE_DOWN_SECONDS}}
PULLING = 600  # seconds for pulling the image, before a rollout counts as stuck


def objects(workload: Workload, options: Options) -> list[dict[str, Any]]:
    """Its objects, in the order in which they are needed."""
    name, labels = workload.name, workload.all_labels
    documents = [_claim(workload, options)] if workload.has_claim else []
    if workload.texts:
        data = dict(workload.texts)
        documents.append(document("ConfigMap", workload.files, labels, data=data))
    ports = [service_port(workload.instance.port)]
    service = {"type": "ClusterIP", "selector": workload.labels, "ports": ports}
    policy, api = clients_only(workload.labels), "networking.k8s.io/v1"
    documents += [
        _deployment(workload, options),
        document("Service", name, labels, spec=service),
        document("NetworkPolicy", name, labels, api, spec=policy),
    ]
    if workload.may_be_several:
        kind, budget = "PodDisruptionBudget", one_at_a_time(workload.labels)
        documents.append(document(kind, name, labels, "policy/v1", spec=budget))
    own = workload.scales and not workload.uses_keda
    return [*documents, _autoscaler(workload)] if own else documents


def settings() -> dict[str, Any]:
    """The environment of the containers that prepare models."""
    labels = {"app.kubernetes.io/name": SETTINGS}
    return document("ConfigMap", SETTINGS, labels, data=SETTINGS_OF_PREPARE)


def kustomization(files: Sequence[str], namespace: str) -> dict[str, Any]:
    """What `kubectl apply -k` reads."""
    return {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        **({"namespace": namespace} if namespace else {}),
        "resources": list(files),
    }


def storage(workload: Workload, options: Options) -> str:
    """The size of the claim."""
    return options.storage or in_gib(workload.disk * SPARE if workload.disk else UNKNOWN_DISK)


def document(
    kind: str, name: str, labels: Mapping[str, str], api: str = "v1", **content: Any
) -> dict[str, Any]:
    """An object of a cluster; `content` is its `spec` or `data`."""
    metadata = {"name": name, "labels": labels}
    return {"apiVersion": api, "kind": kind, "metadata": metadata, **content}


def _claim(workload: Workload, options: Options) -> dict[str, Any]:
    several = workload.may_be_several
    named = {"storageClassName": options.storage_class} if options.storage_class else {}
    spec = {
        "accessModes": ["ReadWriteMany" if several else "ReadWriteOnce"],
        **named,
        "resources": {"requests": {"storage": storage(workload, options)}},
    }
    return document("PersistentVolumeClaim", workload.claim, workload.all_labels, spec=spec)


def _deployment(workload: Workload, options: Options) -> dict[str, Any]:
    rolling = {"maxSurge": 0, "maxUnavailable": 1}
    several = {"type": "RollingUpdate", "rollingUpdate": rolling}
    loading = math.ceil(workload.instance.ready_timeout)
    mounted = json.dumps([dict(workload.texts), SETTINGS_OF_PREPARE], sort_keys=True)
    checksum = hashlib.sha256(mounted.encode()).hexdigest()[:16]
    spec = {
        # The autoscaler sets the number: if written here, each apply would reset it.
        **({} if workload.scales else {"replicas": workload.replicas[0]}),
        "revisionHistoryLimit": 3,
        "progressDeadlineSeconds": loading + DOWNLOADING + PULLING,
        "strategy": several if workload.may_be_several else {"type": "Recreate"},
        "selector": {"matchLabels": workload.labels},
        "template": _pod(workload, options, checksum),
    }
    return document("Deployment", workload.name, workload.all_labels, "apps/v1", spec=spec)


def service_port(port: int) -> dict[str, Any]:
    """A port of a Service, and of its pods under the name `http`."""
    return {"name": "http", "port": port, "targetPort": "http", "protocol": "TCP"}


def clients_only(labels: Mapping[str, str]) -> dict[str, Any]:
    """Only labelled pods, and the pods of labelled namespaces, can reach the port."""
    allowed = [
        {"podSelector": {"matchLabels": CLIENT}},
        {"namespaceSelector": {"matchLabels": CLIENT}},
    ]
    return {
        "podSelector": {"matchLabels": labels},
        "policyTypes": ["Ingress"],
        "ingress": [{"from": allowed, "ports": [{"port": "http", "protocol": "TCP"}]}],
    }


def one_at_a_time(labels: Mapping[str, str]) -> dict[str, Any]:
    """A node that is emptied takes one of the pods away at a time."""
    return {"maxUnavailable": 1, "selector": {"matchLabels": labels}}


def _autoscaler(workload: Workload) -> dict[str, Any]:
    """More pods when three quarters of the slots are busy, or a request waits in each pod.

    The larger of the two numbers of pods counts: waiting requests tell of too few pods, busy slots
    of too many.
    """
    busy, waiting = LLAMA_METRICS if workload.is_llama else VLLM_METRICS
    least, most = workload.replicas
    spec = {
        "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": workload.name},
        "minReplicas": least,
        "maxReplicas": most,
        "metrics": [_each_pod(busy, busy_slots(workload)), _each_pod(waiting, 1)],
        "behavior": SLOWLY,
    }
    kind, api = "HorizontalPodAutoscaler", "autoscaling/v2"
    return document(kind, workload.name, workload.all_labels, api, spec=spec)


def busy_slots(workload: Workload) -> int:
    """The requests of a pod from which another one is started."""
    return max(1, workload.slots * 3 // 4)


def _each_pod(metric: str, value: int) -> dict[str, Any]:
    target = {"type": "AverageValue", "averageValue": str(value)}
    return {"type": "Pods", "pods": {"metric": {"name": metric}, "target": target}}


# The pod


def _pod(workload: Workload, options: Options, checksum: str) -> dict[str, Any]:
    """The pod's template. `checksum` changes with what is mounted, so that pods start anew."""
    port, path = workload.instance.port, f"{workload.instance.prefix}/metrics"
    return {
        "metadata": {
            "labels": workload.all_labels,
            "annotations": {
                "llama-pipeline/config": checksum,
                "llama-pipeline/instance": workload.instance.name,
                **scraped(port, path),
            },
        },
        "spec": {
            **ISOLATED,
            "securityContext": unprivileged(port),
            "terminationGracePeriodSeconds": DRAIN + math.ceil(workload.instance.stop_timeout) + 5,
            **({"initContainers": [_prepare(workload, options)]} if workload.prepare else {}),
            "containers": [_server(workload, options)],
            "volumes": [{"name": name, **volume} for name, _, _, volume in _volumes(workload)],
        },
    }


def scraped(port: int, path: str) -> dict[str, str]:
    """The annotations by which Prometheus finds a pod's metrics."""
    return {
        "prometheus.io/scrape": "true",
        "prometheus.io/port": str(port),
        "prometheus.io/path": path,
    }


def unprivileged(port: int) -> dict[str, Any]:
    """What a pod may do that listens on this port."""
    return {**UNPRIVILEGED, **(ANY_PORT if port < PRIVILEGED_PORTS else {})}


def plain(text: str) -> str:
    """The text escaped: in a manifest, `$(NAME)` would be expanded."""
    return text.replace("$", "$$")


def _prepare(workload: Workload, options: Options) -> dict[str, Any]:
    """The init container that prepares the model on the claim, if it is not there yet."""
    return {
        "name": "prepare",
        "image": options.image,
        "command": [PIPELINE],
        "args": ["prepare", *(plain(f"{n}={v}") for n, v in workload.prepare.items())],
        "envFrom": [{"configMapRef": {"name": SETTINGS}}],
        "env": [environment_variable("HOME", HOME), environment_variable("HF_TOKEN", TOKEN)],
        "resources": resources(CONVERTING if workload.converts else PREPARING, cpu=1),
        "securityContext": CONFINED,
        "volumeMounts": [mount(name, path) for name, path, *_ in _volumes(workload)[:2]],
    }


def _server(workload: Workload, options: Options) -> dict[str, Any]:
    instance = workload.instance
    if workload.is_llama:
        image, program, args = options.image, SERVER, instance.cmd
    else:
        image, program, args = options.vllm_image, PYTHON, instance.cmd[instance.cmd.index("-m") :]
    return {
        "name": "server",
        "image": image,
        "command": [program],
        "args": [plain(word) for word in args],
        "env": _environment(workload),
        "ports": [{"name": "http", "containerPort": instance.port, "protocol": "TCP"}],
        "resources": resources(memory(workload), cpu=workload.threads or 1, gpus=workload.gpus),
        "securityContext": CONFINED,
        **probes(workload),
        "lifecycle": DRAINED,
        "volumeMounts": [
            mount(name, path, read_only) for name, path, read_only, _ in _volumes(workload)
        ],
    }


def probes(workload: Workload) -> dict[str, Any]:
    """`/health` is 503 while the model loads, and 200 even while the server is busy.

    A pod is restarted when loading takes longer than `ready_timeout` (plus an hour for vLLM's
    download), and later when it has not answered for five minutes.
    """
    path = f"{workload.instance.prefix}/health"
    seconds = workload.instance.ready_timeout + (0 if workload.is_llama else DOWNLOADING)
    return {
        "startupProbe": probe(path, failures=max(1, math.ceil(seconds / PERIOD))),
        "readinessProbe": probe(path, failures=3),
        "livenessProbe": probe(path, period=30, timeout=20, failures=10),
    }


def probe(
    path: str, *, failures: int, period: int = PERIOD, timeout: int = PERIOD
) -> dict[str, Any]:
    """A probe that fails after so many requests without an answer. Times in seconds."""
    times = {"periodSeconds": period, "timeoutSeconds": timeout}
    return {"httpGet": {"path": path, "port": "http"}, **times, "failureThreshold": failures}


def memory(workload: Workload) -> int:
    """The memory to request, in bytes."""
    if workload.gpus:
        return WITH_GPU
    return workload.memory + BESIDE if workload.memory else UNKNOWN_MEMORY


def in_gib(count: float) -> str:
    """Bytes as a quantity, rounded up."""
    return f"{max(1, math.ceil(count / GIB))}Gi"


def resources(memory: int, *, cpu: int, gpus: int = 0) -> dict[str, Any]:
    """No limits but for GPUs, which are never shared: on some nodes a memory limit would kill the
    server for the page cache of its own weights, and a CPU limit only slows it down."""
    requested: dict[str, Any] = {"requests": {"cpu": str(cpu), "memory": in_gib(memory)}}
    return {**requested, "limits": {"nvidia.com/gpu": str(gpus)}} if gpus else requested


def _environment(workload: Workload) -> list[dict[str, Any]]:
    """The variables of the server; those of the file win."""
    env: dict[str, str | dict[str, Any]] = {"HOME": HOME}
    if workload.is_llama:
        env["XDG_CONFIG_HOME"] = f"{HOME}/config"
    else:  # vLLM downloads its model itself, to the claim
        env["HF_HOME"] = SETTINGS_OF_PREPARE["HF_HOME"]
        env["XDG_CACHE_HOME"] = f"{DATA}/.cache"
        env["USER"] = "vllm"  # PyTorch reads it, and the image has no such user
        env["HF_TOKEN"] = TOKEN
        if workload.has_key:
            env["VLLM_API_KEY"] = {"name": workload.secret, "key": KEY}
    if not workload.gpus:  # a node whose default runtime is NVIDIA's exposes every GPU
        env |= {"CUDA_VISIBLE_DEVICES": "", "NVIDIA_VISIBLE_DEVICES": "void"}
    own = {name: plain(value) for name, value in workload.env.items()}
    kept = {name: value for name, value in env.items() if name not in own}
    return [environment_variable(name, value) for name, value in {**kept, **own}.items()]


def environment_variable(name: str, value: str | dict[str, Any]) -> dict[str, Any]:
    """A variable of a container: a text, or a key of a Secret."""
    if isinstance(value, dict):
        return {"name": name, "valueFrom": {"secretKeyRef": value}}
    return {"name": name, "value": value}


def mount(name: str, path: str, read_only: bool = False) -> dict[str, Any]:
    return {"name": name, "mountPath": path, **({"readOnly": True} if read_only else {})}


def _volumes(workload: Workload) -> Volumes:
    """Its volumes, first those of every container."""
    is_llama = workload.is_llama
    volumes: Volumes = []
    if workload.has_claim:
        claim = {"persistentVolumeClaim": {"claimName": workload.claim}}
        volumes.append(("data", DATA, is_llama, claim))
    volumes.append(("tmp", HOME, False, {"emptyDir": {}}))
    if workload.model_image:
        image = {"reference": workload.model_image, "pullPolicy": "IfNotPresent"}
        volumes.append(("models", MODELS, True, {"image": image}))
    if is_llama and workload.has_key:
        # The kubelet makes it readable for fsGroup, too.
        secret = {"secretName": workload.secret, "defaultMode": 0o400}
        volumes.append(("key", KEYS, True, {"secret": secret}))
    if workload.texts:
        volumes.append(("texts", TEXTS, True, {"configMap": {"name": workload.files}}))
    if not is_llama:
        volumes.append(("shm", "/dev/shm", False, {"emptyDir": {"medium": "Memory"}}))  # noqa: S108
    return volumes
