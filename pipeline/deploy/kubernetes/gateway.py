"""The manifests of the gateway before all servers, and of what asks it: KEDA's autoscalers, and a
route from outside."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote

from msgspec import Struct, to_builtins

from pipeline.serve.gateway.remote import RemoteServer
from pipeline.serve.gateway.settings import GatewaySettings
from pipeline.serve.server import BOOT, DEMAND, GATEWAY

from .manifests import (
    CLIENT,
    CONFINED,
    DRAIN,
    DRAINED,
    HOME,
    ISOLATED,
    PERIOD,
    PIPELINE,
    SCALE_DOWN_SECONDS,
    SLOWLY,
    Volumes,
    busy_slots,
    clients_only,
    document,
    environment_variable,
    mount,
    one_at_a_time,
    probe,
    scraped,
    service_port,
    unprivileged,
)
from .options import Options
from .workload import EVERYWHERE, KEY, Workload, secret_of

# Paths in the pod.
CONFIG, FILE = "/etc/llama/gateway", "servers.toml"
KEY_FOLDER = "/etc/llama/keys"  # of the gateway's own key, and of one for each server
STOP_SECONDS = 300.0  # that answers under way have at a stop
MEMORY, CPU = "256Mi", "250m"
LABELS = {"app.kubernetes.io/name": "llama-gateway", "app.kubernetes.io/instance": GATEWAY}
PODS = f"{GATEWAY}-pods"  # the Service whose name has the address of each
SECRET = secret_of(GATEWAY)
BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
KEDA_API = "keda.sh/v1alpha1"
UNLIMITED = "0s"  # as Gateway API has it: streams last


class Gateway(Struct, frozen=True, kw_only=True):
    """The gateway of these workloads. A pod has its own host and key, not those of `settings`."""

    settings: GatewaySettings
    workloads: tuple[Workload, ...]
    part_of: str
    has_key: bool = True
    key_here: str = ""  # the file of this machine that holds its key, where the user named one

    @property
    def has_keda(self) -> bool:
        """Whether any autoscaler asks it."""
        return any(workload.uses_keda for workload in self.workloads)

    @property
    def labels(self) -> dict[str, str]:
        return {**LABELS, "app.kubernetes.io/part-of": self.part_of}

    @property
    def file(self) -> str:
        """The text of the file that the gateway reads."""
        own = {
            "host": EVERYWHERE,
            "port": self.settings.port,
            "api_key_file": f"{KEY_FOLDER}/{GATEWAY}" if self.has_key else None,
            "without_key": not self.has_key,
            "hold_timeout": self.settings.hold_timeout,
            "origins": list(self.settings.origins),
            "hosts": list(self.settings.hosts),
            "inspect": self.settings.inspect,
            "stop_timeout": STOP_SECONDS,
            "peers": [f"http://{PODS}:{self.settings.port}"] if self.has_keda else [],
        }
        tables: dict[tuple[str, ...], Mapping[str, Any]] = {("gateway",): own}
        if self.settings.models:
            tables["gateway", "models"] = self.settings.models
        for workload in self.workloads:
            tables["servers", workload.instance.name] = to_builtins(_remote(workload))
        return "\n".join(toml(tables))


def _remote(workload: Workload) -> RemoteServer:
    server = workload.instance
    return RemoteServer(
        url=f"http://{workload.name}:{server.port}{server.prefix}",
        engine=server.engine,
        kind=server.kind,
        aliases=server.aliases,
        api_key_file=f"{KEY_FOLDER}/{workload.name}" if workload.has_key else None,
        ready_timeout=server.ready_timeout,
        start=BOOT if workload.replicas[0] else DEMAND,
    )


def toml(tables: Mapping[tuple[str, ...], Mapping[str, Any]]) -> Iterator[str]:
    """The lines of these tables, whose values are texts, numbers, true and lists of texts; None,
    false and what is empty is left out."""
    for path, table in tables.items():
        yield f"[{'.'.join(map(_key, path))}]"
        for key, value in table.items():
            if value is not None and value is not False and value not in ((), []):
                yield f"{_key(key)} = {_json(value)}"
        yield ""


def _key(name: str) -> str:
    return name if BARE_KEY.fullmatch(name) else _json(name)


def _json(value: object) -> str:
    """The value in TOML's form, which is JSON's but for one character."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def objects(gateway: Gateway, options: Options) -> list[dict[str, Any]]:
    """Its objects, in the order in which they are needed."""
    port = service_port(gateway.settings.port)
    ports = [{**port, "appProtocol": "http"}]
    service = {"type": "ClusterIP", "selector": LABELS, "ports": ports}
    documents = [
        _document(gateway, "ConfigMap", data={FILE: gateway.file}),
        _deployment(gateway, options),
        _document(gateway, "Service", spec=service),
    ]
    if gateway.has_keda:
        # By it the gateways find each other, also one that ends, which still has requests.
        headless = {"clusterIP": "None", "publishNotReadyAddresses": True}
        pods = {"type": "ClusterIP", **headless, "selector": LABELS, "ports": [port]}
        documents.append(document("Service", PODS, gateway.labels, spec=pods))
    budget = one_at_a_time(LABELS)
    policy = clients_only(LABELS)
    documents += [
        _document(gateway, "PodDisruptionBudget", "policy/v1", spec=budget),
        _document(gateway, "NetworkPolicy", "networking.k8s.io/v1", spec=policy),
    ]
    if gateway.has_key and gateway.has_keda:
        spec = {"secretTargetRef": [{"parameter": "token", "name": SECRET, "key": KEY}]}
        documents.append(_document(gateway, "TriggerAuthentication", KEDA_API, spec=spec))
    if options.route:
        documents.append(_route(gateway, options))
    return documents


def _document(gateway: Gateway, kind: str, api: str = "v1", **content: Any) -> dict[str, Any]:
    return document(kind, GATEWAY, gateway.labels, api, **content)


def _deployment(gateway: Gateway, options: Options) -> dict[str, Any]:
    rolling = {"maxSurge": 1, "maxUnavailable": 0}
    spec = {
        "replicas": options.gateway_replicas,
        "revisionHistoryLimit": 3,
        "strategy": {"type": "RollingUpdate", "rollingUpdate": rolling},
        "selector": {"matchLabels": LABELS},
        "template": _pod(gateway, options),
    }
    return _document(gateway, "Deployment", "apps/v1", spec=spec)


def _pod(gateway: Gateway, options: Options) -> dict[str, Any]:
    """The pod's template. It carries the label that the servers let in."""
    checksum = hashlib.sha256(gateway.file.encode()).hexdigest()[:16]
    keys = [(SECRET, GATEWAY)] if gateway.has_key else []
    keys += [(workload.secret, workload.name) for workload in gateway.workloads if workload.has_key]
    sources = [
        {"secret": {"name": secret, "items": [{"key": KEY, "path": name}]}} for secret, name in keys
    ]
    volumes: Volumes = [
        ("config", CONFIG, True, {"configMap": {"name": GATEWAY}}),
        ("tmp", HOME, False, {"emptyDir": {}}),
    ]
    if sources:
        projected = {"sources": sources, "defaultMode": 0o400}
        volumes.append(("keys", KEY_FOLDER, True, {"projected": projected}))
    port = gateway.settings.port
    container = {
        "name": "gateway",
        "image": options.image,
        "command": [PIPELINE],
        "args": ["gateway", f"servers={CONFIG}/{FILE}"],
        "env": [
            environment_variable("HOME", HOME),
            environment_variable("LLAMA_PIPELINE_HOME", f"{HOME}/home"),
            environment_variable("LLAMA_PIPELINE_CACHE", f"{HOME}/cache"),
        ],
        "ports": [{"name": "http", "containerPort": port, "protocol": "TCP"}],
        "resources": {"requests": {"cpu": CPU, "memory": MEMORY}},
        "securityContext": CONFINED,
        "startupProbe": probe("/health", failures=60),
        "readinessProbe": probe("/health", failures=3),
        "livenessProbe": probe("/health", period=30, failures=10),
        "lifecycle": DRAINED,
        "volumeMounts": [mount(name, path, read_only) for name, path, read_only, _ in volumes],
    }
    return {
        "metadata": {
            "labels": {**gateway.labels, **CLIENT},
            "annotations": {"llama-pipeline/config": checksum, **scraped(port, "/metrics")},
        },
        "spec": {
            **ISOLATED,
            "securityContext": unprivileged(port),
            "terminationGracePeriodSeconds": DRAIN + math.ceil(STOP_SECONDS) + 5,
            "topologySpreadConstraints": [
                {
                    "maxSkew": 1,
                    "topologyKey": "kubernetes.io/hostname",
                    "whenUnsatisfiable": "ScheduleAnyway",
                    "labelSelector": {"matchLabels": LABELS},
                }
            ],
            "containers": [container],
            "volumes": [{"name": name, **volume} for name, _, _, volume in volumes],
        },
    }


def _route(gateway: Gateway, options: Options) -> dict[str, Any]:
    """From a Gateway to the Service; nothing bounds how long an answer takes."""
    parent, _, listener = options.route_parent.partition(":")
    namespace, _, name = parent.rpartition("/")
    reference = {
        "name": name,
        **({"namespace": namespace} if namespace else {}),
        **({"sectionName": listener} if listener else {}),
    }
    rule = {
        "matches": [{"path": {"type": "PathPrefix", "value": "/"}}],
        "timeouts": {"request": UNLIMITED, "backendRequest": UNLIMITED},
        "backendRefs": [{"name": GATEWAY, "port": gateway.settings.port}],
    }
    spec = {"parentRefs": [reference], "hostnames": [options.route], "rules": [rule]}
    return _document(gateway, "HTTPRoute", "gateway.networking.k8s.io/v1", spec=spec)


def scaled_object(workload: Workload, gateway: Gateway, options: Options) -> dict[str, Any]:
    """KEDA's autoscaler of a workload. It asks the gateway for the requests of the server, those
    that wait for its first pod included, and owns a HorizontalPodAutoscaler."""
    least, most = workload.replicas
    host = f"{GATEWAY}.{options.namespace}.svc"  # KEDA asks from a namespace of its own
    path = f"/scaling/{quote(workload.instance.name, safe='')}"
    metadata = {
        "url": f"http://{host}:{gateway.settings.port}{path}",
        "valueLocation": "requests",
        "targetValue": str(busy_slots(workload)),
        "activationTargetValue": "0",
    }
    trigger: dict[str, Any] = {
        "type": "metrics-api",
        "metricType": "AverageValue",
        "metadata": metadata,
    }
    if gateway.has_key:
        metadata["authMode"] = "bearer"
        trigger["authenticationRef"] = {"name": GATEWAY}
    spec = {
        "scaleTargetRef": {"name": workload.name},
        "pollingInterval": PERIOD,
        "cooldownPeriod": workload.idle_seconds or SCALE_DOWN_SECONDS,
        "minReplicaCount": least,
        "maxReplicaCount": most,
        "advanced": {"horizontalPodAutoscalerConfig": {"behavior": SLOWLY}},
        "triggers": [trigger],
    }
    return document("ScaledObject", workload.name, workload.all_labels, KEDA_API, spec=spec)
