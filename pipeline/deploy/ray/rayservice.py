"""KubeRay's RayService for the same servers: a group of pods for each kind of node that they need,
one pod for each replica, and a claim that all pods share."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from pipeline.deploy.kubernetes.manifests import (
    HOME,
    ISOLATED,
    SETTINGS_OF_PREPARE,
    TOKEN,
    UNKNOWN_DISK,
    environment_variable,
    in_gib,
    mount,
    unprivileged,
)
from pipeline.deploy.kubernetes.options import Options
from pipeline.deploy.kubernetes.workload import DATA, EVERYWHERE, KEY, kubernetes_name
from pipeline.serve.gateway.settings import GatewaySettings
from pipeline.serve.server import GATEWAY

from .config import ClusterPlan, Resources
from .environment import CUT_OFF

KEYS = "/etc/llama/keys"
GIB = 1024**3
HEAD = Resources(cpus=1, memory=4 * GIB)
ON_GATEWAY = Resources(cpus=1, memory=GIB)
BESIDE = GIB  # bytes of Ray's processes in a pod
IDLE_SECONDS = 60  # without a replica until the autoscaler removes a pod


class PodGroup(Struct, frozen=True, kw_only=True):
    """Pods that are alike. `least` and `most` are how many."""

    name: str
    resources: Resources
    least: int
    most: int


def placed(plan: ClusterPlan) -> ClusterPlan:
    """The plan with a resource that keeps each replica on the pods of its own group: on those of
    another it might fit, too, and leave no room there for what they are for."""
    names: dict[str, str] = {}
    servers = []
    for server in plan.servers:
        needs = json.dumps([server.resources.amounts, server.resources.is_divided])
        name = names.setdefault(needs, kubernetes_name(server.name))
        servers.append(replace(server, resources=_only_on(name, server.resources)))
    return replace(plan, servers=tuple(servers), ingress=_only_on(GATEWAY, plan.ingress))


def _only_on(group: str, resources: Resources) -> Resources:
    return replace(resources, custom={**resources.custom, f"pod:{group}": 1.0})


def groups(plan: ClusterPlan, gpus: int) -> list[PodGroup]:
    """The gateway's pods, and those of each kind of node, named after the first server on it. A
    server that is divided has pods with so many `gpus` each."""
    count = plan.ingresses
    made = {GATEWAY: PodGroup(name=GATEWAY, resources=plan.ingress, least=count, most=count)}
    for server in plan.servers:
        resources, (least, most) = server.resources, server.replicas
        if resources.is_divided:
            each = min(gpus, resources.gpus)
            pods = math.ceil(resources.gpus / each)
            custom = {name: float(each) for name in resources.custom}  # one for each part
            resources = replace(resources, gpus=each, is_divided=False, custom=custom)
            least, most = least * pods, most * pods
        name = json.dumps(resources.amounts)
        before = made.get(name)
        made[name] = (
            replace(before, least=before.least + least, most=before.most + most)
            if before
            else PodGroup(
                name=kubernetes_name(server.name),
                resources=resources,
                least=least,
                most=most,
            )
        )
    return list(made.values())


def documents(plan: ClusterPlan, options: Options, ray: str) -> list[dict[str, Any]]:
    """The claim and the RayService; `ray` is the version in the image."""
    key_file = None if plan.settings.without_key else f"{KEYS}/{KEY}"
    inside = replace(plan.settings, host=EVERYWHERE, api_key_file=key_file)
    plan = placed(replace(plan, settings=inside, ingress=ON_GATEWAY))
    made, configuration = groups(plan, options.gpus or 1), plan.configuration
    labels = {"app.kubernetes.io/part-of": configuration}
    namespace = {"namespace": options.namespace} if options.namespace else {}
    scaling = {
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {"idleTimeoutSeconds": IDLE_SECONDS},
    }
    return [
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": claim(configuration), **namespace, "labels": labels},
            "spec": {
                "accessModes": ["ReadWriteMany"],
                **({"storageClassName": options.storage_class} if options.storage_class else {}),
                "resources": {"requests": {"storage": options.storage or in_gib(UNKNOWN_DISK)}},
            },
        },
        {
            "apiVersion": "ray.io/v1",
            "kind": "RayService",
            "metadata": {"name": configuration, **namespace, "labels": labels},
            "spec": {
                "serveConfigV2": _yaml(plan.body),
                "rayClusterConfig": {
                    "rayVersion": ray,
                    "authOptions": {"mode": "token"},  # the operator makes one
                    **(scaling if any(group.least < group.most for group in made) else {}),
                    "headGroupSpec": {
                        "rayStartParams": {"dashboard-host": EVERYWHERE, "num-cpus": "0"},
                        "template": _pod(HEAD, inside, options, configuration, is_head=True),
                    },
                    "workerGroupSpecs": [
                        {
                            "groupName": group.name,
                            "replicas": group.least,
                            "minReplicas": group.least,
                            "maxReplicas": group.most,
                            "rayStartParams": start_params(group.resources),
                            "template": _pod(group.resources, inside, options, configuration),
                        }
                        for group in made
                    ],
                },
            },
        },
    ]


def claim(configuration: str) -> str:
    """The name of the claim with the models."""
    return f"{configuration}-models"


def secret(configuration: str) -> str:
    """The name of the Secret with the gateway's key."""
    return f"{configuration}-api-key"


def start_params(resources: Resources) -> dict[str, str]:
    """What Ray takes a pod for; a shell reads the names and numbers of custom resources."""
    params = {
        "num-cpus": f"{math.ceil(resources.cpus)}",
        "num-gpus": f"{resources.gpus}",
        "memory": f"{resources.memory or GIB}",
    }
    if resources.custom:
        whole = {name: math.ceil(count) for name, count in resources.custom.items()}
        params["resources"] = json.dumps(json.dumps(whole))
    return params


def _pod(
    resources: Resources,
    settings: GatewaySettings,
    options: Options,
    configuration: str,
    *,
    is_head: bool = False,
) -> dict[str, Any]:
    """The template of a pod, which holds one replica beside Ray."""
    volumes: list[tuple[str, str, bool, dict[str, Any]]] = [
        ("data", DATA, False, {"persistentVolumeClaim": {"claimName": claim(configuration)}}),
        ("tmp", HOME, False, {"emptyDir": {}}),
    ]
    if settings.api_key_file:
        named = {"secretName": secret(configuration), "defaultMode": 0o440}
        volumes.append(("keys", KEYS, True, {"secret": named}))
    # Ray kills what uses more memory than its container may, before the kernel does: it needs a
    # limit, which a server with its weights and context stays below.
    amounts: dict[str, Any] = {
        "cpu": f"{math.ceil(resources.cpus)}",
        "memory": in_gib((resources.memory or GIB) + BESIDE),
        **({"nvidia.com/gpu": f"{resources.gpus}"} if resources.gpus else {}),
    }
    env: Mapping[str, str | dict[str, Any]] = {
        **SETTINGS_OF_PREPARE,
        "HF_TOKEN": TOKEN,
        "HOME": HOME,
        **CUT_OFF,
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    ports = [{"name": "serve", "containerPort": settings.port, "protocol": "TCP"}]
    if is_head:
        ports += [
            {"name": "gcs-server", "containerPort": 6379, "protocol": "TCP"},
            {"name": "dashboard", "containerPort": 8265, "protocol": "TCP"},
        ]
    return {
        "metadata": {"labels": {"app.kubernetes.io/part-of": configuration}},
        "spec": {
            **({} if is_head else ISOLATED),
            "securityContext": unprivileged(settings.port),
            "containers": [
                {
                    "name": "ray-head" if is_head else "ray-worker",
                    "image": options.image,
                    "env": [environment_variable(name, value) for name, value in env.items()],
                    "ports": ports,
                    "resources": {"requests": amounts, "limits": amounts},
                    "securityContext": {
                        "allowPrivilegeEscalation": False,
                        "capabilities": {"drop": ["ALL"]},
                    },
                    "volumeMounts": [
                        mount(name, path, read_only) for name, path, read_only, _ in volumes
                    ],
                }
            ],
            "volumes": [{"name": name, **volume} for name, _, _, volume in volumes],
        },
    }


def _yaml(config: Mapping[str, Any]) -> str:
    import yaml

    text: str = yaml.safe_dump(config, sort_keys=False, width=100, allow_unicode=True)
    return text
