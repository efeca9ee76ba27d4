"""Ray Serve's configuration: an application for each server of a file, and one for the gateway.

A change of an application's `args` restarts all of its replicas and no others, so each server is an
application of its own. What the gateway knows of them is its `user_config`, which changes in place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import Struct, field, json

from pipeline.serve.gateway.settings import GatewaySettings
from pipeline.serve.server import BOOT, DEMAND, GATEWAY, LLAMA_CPP, Server

OURS = "pipeline.deploy.ray.app:"  # begins the import path of every application of ours
SERVER_APP, GATEWAY_APP = f"{OURS}server", f"{OURS}gateway"
REPLICA, INGRESS = "Replica", "Ingress"  # their deployments
CPU, GPU, MEMORY = "CPU", "GPU", "memory"  # as Ray names them; memory in bytes

DRAIN_SECONDS = 300.0  # that answers under way have when a replica is to stop
HEALTH_PERIOD = 10.0  # seconds
HEALTH_MARGIN = 10.0  # seconds for a check, beside the probe's own
UPSCALE_SECONDS = 5.0  # of more work before a replica is added
LOOK_BACK_SECONDS = 10.0  # over which Serve averages the requests under way
DOWNSCALE_SECONDS = 600.0  # of less work before one is removed: a new one has to load first
INGRESS_CPUS = 0.25  # as docs/cluster.md computes it
INGRESS_MEMORY = 256 * 1024**2  # bytes
INGRESS_REQUESTS = 1000  # that one replica of the gateway has under way

REPLICAS = "ray"  # the folder in a home's `run` with the files of its node's replicas


class Resources(Struct, frozen=True, kw_only=True):
    """What a replica needs of a node. `memory` in bytes; `custom` by name, such as
    `backend:vulkan`. With `is_divided` the GPUs may be on several nodes, and all else is needed of
    the node with the first of them."""

    cpus: float = 1.0
    gpus: int = 0
    memory: int = 0
    custom: Mapping[str, float] = field(default_factory=dict)
    is_divided: bool = False

    @property
    def amounts(self) -> dict[str, float]:
        """All of it by Ray's names; without those of which none is needed."""
        named = {CPU: self.cpus, GPU: self.gpus, MEMORY: self.memory, **self.custom}
        return {name: count for name, count in named.items() if count}

    @property
    def bundles(self) -> list[dict[str, float]]:
        """The same in parts that a node each can hold: vLLM takes one GPU of each."""
        if not self.is_divided:
            return [self.amounts]
        others: list[dict[str, float]] = [{GPU: 1, **self.custom}] * (self.gpus - 1)
        return [{**self.amounts, GPU: 1}, *others]

    @property
    def deployment_options(self) -> dict[str, Any]:
        """As Serve names them. Where they are divided, the replica itself takes no GPU."""
        options: dict[str, Any] = {
            "ray_actor_options": {
                "num_cpus": self.cpus,
                "num_gpus": 0 if self.is_divided else self.gpus,
                "memory": self.memory,
                **({"resources": dict(self.custom)} if self.custom else {}),
            }
        }
        if self.is_divided:  # on as few nodes as possible
            options |= {"placement_group_bundles": self.bundles, "placement_group_strategy": "PACK"}
        return options


class ServedOnCluster(Struct, frozen=True, kw_only=True):
    """What the gateway knows of a server; its application has the same name."""

    engine: str = LLAMA_CPP
    kind: str = "chat"
    aliases: tuple[str, ...] = ()
    slots: int = 1  # requests that one replica answers at a time
    start: str = BOOT  # demand: there may be no replica until a request needs one
    ready_timeout: float = 600.0


class IngressConfig(Struct, frozen=True, kw_only=True):
    """The `user_config` of the gateway's deployment. `configuration` names the file of servers:
    one cluster serves one."""

    configuration: str
    settings: GatewaySettings
    servers: Mapping[str, ServedOnCluster]


class ClusterServer(Struct, frozen=True, kw_only=True):
    """A server of the file as a cluster runs it. `text` is the file with this server alone, `lock`
    the entries of pipeline.lock for its models."""

    server: Server
    slots: int
    replicas: tuple[int, int]  # the least and the most; equal: no autoscaling
    resources: Resources
    text: str
    lock: str = ""

    @property
    def name(self) -> str:
        return self.server.name

    @property
    def served(self) -> ServedOnCluster:
        """What the gateway knows of it."""
        return ServedOnCluster(
            engine=self.server.engine,
            kind=self.server.kind,
            aliases=self.server.aliases,
            slots=self.slots,
            start=BOOT if self.replicas[0] else DEMAND,
            ready_timeout=self.server.ready_timeout,
        )


class ClusterPlan(Struct, frozen=True, kw_only=True):
    """The servers of a file on a cluster, and so many gateways before them. `configuration` is the
    file's name there, `ingress` what each gateway needs."""

    configuration: str
    servers: tuple[ClusterServer, ...]
    settings: GatewaySettings
    ingresses: int
    ingress: Resources = Resources(cpus=INGRESS_CPUS, memory=INGRESS_MEMORY)

    @property
    def cpus(self) -> float:
        """The processors that all replicas of all servers ask for."""
        servers = sum(each.resources.cpus * each.replicas[1] for each in self.servers)
        return servers + self.ingresses * self.ingress.cpus

    @property
    def body(self) -> dict[str, Any]:
        """What Serve deploys: the body of `PUT /api/serve/applications/`. Serve's proxies listen
        where `settings` says, on every node that has a replica."""
        known = IngressConfig(
            configuration=self.configuration,
            settings=self.settings,
            servers={server.name: server.served for server in self.servers},
        )
        gateway = {
            "name": GATEWAY,
            "route_prefix": "/",
            "import_path": GATEWAY_APP,
            "deployments": [
                {
                    "name": INGRESS,
                    "num_replicas": self.ingresses,
                    "max_ongoing_requests": INGRESS_REQUESTS,
                    "user_config": json.decode(json.encode(known)),
                    "graceful_shutdown_timeout_s": DRAIN_SECONDS,
                    **self.ingress.deployment_options,
                }
            ],
        }
        return {
            "proxy_location": "EveryNode",
            "http_options": {"host": self.settings.host, "port": self.settings.port},
            "applications": [*map(application, self.servers), gateway],
        }


def application(server: ClusterServer) -> dict[str, Any]:
    """The application of one server. Only the gateway reaches it: it has no route."""
    probe = server.server.probe_timeout
    return {
        "name": server.name,
        "route_prefix": None,
        "import_path": SERVER_APP,
        "args": {"name": server.name, "configuration": server.text, "lock": server.lock},
        "deployments": [
            {
                "name": REPLICA,
                **replicas(server),
                "max_ongoing_requests": server.slots,
                "health_check_period_s": HEALTH_PERIOD,
                "health_check_timeout_s": probe + HEALTH_MARGIN,
                "graceful_shutdown_timeout_s": DRAIN_SECONDS + server.server.stop_timeout,
                **server.resources.deployment_options,
            }
        ],
    }


def replicas(server: ClusterServer) -> dict[str, Any]:
    """How many replicas: a number, or the autoscaler's bounds. One is added when three quarters of
    the slots are busy."""
    least, most = server.replicas
    if least == most:
        return {"num_replicas": least}
    idle = server.server.idle_timeout or DOWNSCALE_SECONDS
    return {
        "autoscaling_config": {
            "min_replicas": least,
            "max_replicas": most,
            "target_ongoing_requests": max(1, server.slots * 3 // 4),
            "upscale_delay_s": UPSCALE_SECONDS,
            "look_back_period_s": LOOK_BACK_SECONDS,
            "downscale_delay_s": idle,
        }
    }
