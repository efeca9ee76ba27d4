"""The pod of one workload."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .options import Options
from .workload import DATA, KEY, KEYS, TEXTS, Workload

USER = 10001  # the image's own; any that is not root will do
SERVER, PIPELINE, PYTHON = "llama-server", "doit", "python3"  # on PATH, in the images
SETTINGS = "llama-pipeline"  # the ConfigMap of what prepares models
SECRET = {"name": "huggingface", "key": "token", "optional": True}
TOKEN = {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": SECRET}}

PERIOD = 5  # seconds between two probes of a server that starts or is ready
DRAIN = 5  # seconds until no Service routes to a pod that ends
DOWNLOADING = 3600  # seconds that a model's download may take
GIB = 1024**3
BESIDE = GIB // 2  # of memory, for the server itself
WITH_GPU = 4 * GIB  # of memory: the weights only pass through the page cache
UNKNOWN = 8 * GIB
PREPARING, CONVERTING = GIB, 4 * GIB

CONFINED = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}
HOME = {"name": "HOME", "value": "/tmp"}  # noqa: S108
SETTINGS_OF_PREPARE = {
    "HF_HOME": f"{DATA}/.cache/huggingface",
    "LLAMA_PIPELINE_CACHE": f"{DATA}/.cache/llama-pipeline",
    "LLAMA_PIPELINE_HOME": DATA,
}


def template(workload: Workload, options: Options, checksum: str) -> dict[str, Any]:
    """The pod's template. `checksum` changes with what is mounted, so that pods start anew."""
    port = str(workload.instance.port)
    return {
        "metadata": {
            "labels": workload.all_labels,
            "annotations": {
                "llama-pipeline/config": checksum,
                "llama-pipeline/instance": workload.instance.name,
                "prometheus.io/scrape": "true",
                "prometheus.io/port": port,
                "prometheus.io/path": f"{workload.instance.prefix}/metrics",
            },
        },
        "spec": {
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,  # their variables would look like llama-server's
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": USER,
                "runAsGroup": USER,
                "fsGroup": USER,
                "fsGroupChangePolicy": "OnRootMismatch",
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "terminationGracePeriodSeconds": DRAIN + math.ceil(workload.instance.stop_timeout) + 5,
            **({"initContainers": [_prepare(workload, options)]} if workload.prepare else {}),
            "containers": [_server(workload, options)],
            "volumes": [{"name": name, **volume} for name, _, _, volume in _volumes(workload)],
        },
    }


def plain(args: Sequence[str]) -> list[str]:
    """The arguments escaped: in a manifest, `$(NAME)` would be expanded."""
    return [word.replace("$", "$$") for word in args]


def _prepare(workload: Workload, options: Options) -> dict[str, Any]:
    """The init container that prepares the model on the claim, if it is not there yet."""
    return {
        "name": "prepare",
        "image": options.image,
        "command": [PIPELINE],
        "args": plain(["prepare", *(f"{n}={v}" for n, v in workload.prepare.items())]),
        "envFrom": [{"configMapRef": {"name": SETTINGS}}],
        "env": [HOME, TOKEN],
        "resources": _resources(CONVERTING if workload.converts else PREPARING, cpu=1),
        "securityContext": CONFINED,
        "volumeMounts": [_mount(name, path) for name, path, *_ in _volumes(workload)[:2]],
    }


def _server(workload: Workload, options: Options) -> dict[str, Any]:
    instance = workload.instance
    if workload.is_llama:
        image, program, args = options.image, SERVER, list(instance.cmd)
        env = [HOME, {"name": "XDG_CONFIG_HOME", "value": "/tmp/config"}]  # noqa: S108
    else:
        image, program = options.vllm_image, PYTHON
        args = list(instance.cmd[instance.cmd.index("-m") :])
        env = _environment_of_vllm(workload)
    if not workload.gpus:  # a node whose default runtime is NVIDIA's exposes every GPU
        env += [
            {"name": "CUDA_VISIBLE_DEVICES", "value": ""},
            {"name": "NVIDIA_VISIBLE_DEVICES", "value": "void"},
        ]
    env = [variable for variable in env if variable["name"] not in workload.env]
    values = plain([*workload.env.values()])
    env += [{"name": n, "value": v} for n, v in zip(workload.env, values, strict=True)]
    return {
        "name": "server",
        "image": image,
        "command": [program],
        "args": plain(args),
        "env": env,
        "ports": [{"name": "http", "containerPort": instance.port, "protocol": "TCP"}],
        "resources": _resources(memory(workload), cpu=workload.threads or 1, gpus=workload.gpus),
        "securityContext": CONFINED,
        **probes(workload),
        # A pod keeps answering until no Service routes to it any more.
        "lifecycle": {"preStop": {"exec": {"command": ["sleep", str(DRAIN)]}}},
        "volumeMounts": [
            _mount(name, path, read_only) for name, path, read_only, _ in _volumes(workload)
        ],
    }


def probes(workload: Workload) -> dict[str, Any]:
    """`/health` is 503 while the model loads, and 200 even while the server is busy.

    A pod is restarted when loading takes longer than `ready_timeout` (plus an hour for vLLM's
    download), and later when it has not answered for five minutes.
    """
    check = {"path": f"{workload.instance.prefix}/health", "port": "http"}
    seconds = workload.instance.ready_timeout + (0 if workload.is_llama else DOWNLOADING)

    def probe(period: int, timeout: int, failures: int) -> dict[str, Any]:
        times = {"periodSeconds": period, "timeoutSeconds": timeout}
        return {"httpGet": check, **times, "failureThreshold": failures}

    return {
        "startupProbe": probe(PERIOD, PERIOD, max(1, math.ceil(seconds / PERIOD))),
        "readinessProbe": probe(PERIOD, PERIOD, failures=3),
        "livenessProbe": probe(30, timeout=20, failures=10),
    }


def memory(workload: Workload) -> int:
    """The memory to request, in bytes."""
    if workload.gpus:
        return WITH_GPU
    return workload.memory + BESIDE if workload.memory else UNKNOWN


def in_gib(count: float) -> str:
    """Bytes as a quantity, rounded up."""
    return f"{max(1, math.ceil(count / GIB))}Gi"


def _resources(memory: int, *, cpu: int, gpus: int = 0) -> dict[str, Any]:
    """No limits but for GPUs, which are never shared: on some nodes a memory limit would kill the
    server for the page cache of its own weights, and a CPU limit only slows it down."""
    resources: dict[str, Any] = {"requests": {"cpu": str(cpu), "memory": in_gib(memory)}}
    return {**resources, "limits": {"nvidia.com/gpu": str(gpus)}} if gpus else resources


def _environment_of_vllm(workload: Workload) -> list[dict[str, Any]]:
    """vLLM downloads its model itself, to the claim."""
    env: list[dict[str, Any]] = [
        HOME,
        {"name": "HF_HOME", "value": SETTINGS_OF_PREPARE["HF_HOME"]},
        {"name": "XDG_CACHE_HOME", "value": f"{DATA}/.cache"},
        {"name": "USER", "value": "vllm"},  # PyTorch reads it, and the image has no such user
        TOKEN,
    ]
    if workload.has_key:
        key = {"secretKeyRef": {"name": workload.secret, "key": KEY}}
        env.append({"name": "VLLM_API_KEY", "valueFrom": key})
    return env


def _mount(name: str, path: str, read_only: bool = False) -> dict[str, Any]:
    return {"name": name, "mountPath": path, **({"readOnly": True} if read_only else {})}


def _volumes(workload: Workload) -> list[tuple[str, str, bool, dict[str, Any]]]:
    """Of each volume its name, where it is mounted, whether read-only, and what it is; first those
    of every container."""
    is_llama = workload.is_llama
    volumes: list[tuple[str, str, bool, dict[str, Any]]] = [
        ("data", DATA, is_llama, {"persistentVolumeClaim": {"claimName": workload.claim}}),
        ("tmp", "/tmp", False, {"emptyDir": {}}),  # noqa: S108
    ]
    if is_llama and workload.has_key:
        # The kubelet makes it readable for fsGroup, too.
        secret = {"secretName": workload.secret, "defaultMode": 0o400}
        volumes.append(("key", KEYS, True, {"secret": secret}))
    if workload.texts:
        volumes.append(("texts", TEXTS, True, {"configMap": {"name": workload.files}}))
    if not is_llama:
        volumes.append(("shm", "/dev/shm", False, {"emptyDir": {"medium": "Memory"}}))  # noqa: S108
    return volumes
