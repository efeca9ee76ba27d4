"""The servers on the cluster, in the state that Serve tells."""

from __future__ import annotations

from collections.abc import Mapping
from time import time
from typing import Any

import anyio
from anyio import to_thread
from msgspec import Struct, convert
from msgspec.structs import replace
from ray import serve
from ray.serve.context import _get_global_client

from pipeline.core import log
from pipeline.serve.gateway.remote import RemoteView
from pipeline.serve.gateway.servers import Target, of_targets
from pipeline.serve.server import DEMAND, Server, elsewhere
from pipeline.serve.supervisor.state import ASLEEP, FAILED, LOADING, READY, WAITING, Folder

from .cluster import FAILED as NOT_DEPLOYED
from .cluster import ApplicationDetails, ServeDetails
from .config import REPLICA, ServedOnCluster
from .relay import HEADER

LOOK_SECONDS = 1.0  # between two looks at the states


def server_of(name: str, served: ServedOnCluster) -> Server:
    """The record of a server on the cluster; a lease says where one of its replicas is."""
    return elsewhere(
        name,
        engine=served.engine,
        kind=served.kind,
        aliases=served.aliases,
        start=served.start,
        ready_timeout=served.ready_timeout,
    )


class ReplicaAddress(Struct, frozen=True, kw_only=True):
    """Where a replica is reached, and with which keys: that of a lease for a request, that of its
    relay for questions of our own, which Serve does not count."""

    host: str
    port: int
    relay_key: str
    lease: str = ""
    server_key: str | None = None

    def target(self, target: Target, key: str) -> Target:
        """The replica of `target`, for what is sent with one of the two keys."""
        instance = replace(target.instance, host=self.host, port=self.port)
        headers = [(HEADER.encode(), key.encode())]
        if self.server_key:
            headers.append((b"authorization", f"Bearer {self.server_key}".encode()))
        return replace(target, instance=instance, headers=tuple(headers))


class ClusterView(RemoteView):
    """The instances, each an application of Serve's. `watch` must run."""

    def __init__(self, at: Folder) -> None:
        super().__init__(at, [])
        self._handles: dict[str, Any] = {}

    def handle(self, name: str) -> Any:
        """Serve's handle of the replicas of an instance. Raises RayServeException."""
        if name not in self._handles:
            self._handles[name] = serve.get_deployment_handle(
                REPLICA, name, _check_exists=False, _record_telemetry=False
            )
        return self._handles[name]

    def take(self, servers: Mapping[str, ServedOnCluster]) -> None:
        """Take over a changed list; what is known of the servers stays."""
        before = self._targets
        self._targets = {}
        for name, served in servers.items():
            target = Target(instance=server_of(name, served), state=WAITING)
            if known := before.get(name):
                at = known.instance
                instance = replace(target.instance, host=at.host, port=at.port)
                target = replace(known, instance=instance)
            self._targets[name] = target
        self._list()

    def reached(self, name: str, address: ReplicaAddress) -> None:
        """A replica answers at this address, which questions go to from now on."""
        if target := self._targets.get(name):
            now = address.target(target, address.relay_key)
            if now != target:
                self._targets[name] = now
                self._list()

    def _list(self) -> None:
        self._servers = of_targets(tuple(self._targets.values()))

    async def watch(self) -> None:
        """Ask Serve for the states, for ever."""
        while True:
            try:
                applications = (await to_thread.run_sync(details)).applications
                for name in [*self._targets]:
                    await self._update(name, applications.get(name))
            except Exception as error:  # Ray's, where its controller or a replica is gone
                log.info(f"the state of the cluster is unknown, asking again: {error}")
            await anyio.sleep(LOOK_SECONDS)

    async def _update(self, name: str, application: ApplicationDetails | None) -> None:
        before = self._targets[name]
        nodes = running_on(application)
        state, reason = observed(application, before.instance)
        if (state, reason, nodes) == (before.state, before.reason, before.nodes):
            return
        if state == READY and before.state != READY:
            answer = await self.handle(name).address.remote()
            self.reached(name, convert(answer, ReplicaAddress))
        if name not in self._targets:  # meanwhile
            return
        ready_at = before.ready_at if state == before.state else time() if state == READY else None
        now = self._targets[name]
        self._targets[name] = replace(
            now, state=state, reason=reason, nodes=nodes, ready_at=ready_at
        )
        self._list()
        if (state, reason) != (before.state, before.reason):
            log.info(f"{name} is {state}" + (f": {reason}" if reason else ""))


def details() -> ServeDetails:
    """What Serve runs: as `serve.status()`, which leaves out where, asks for it."""
    return convert(_get_global_client().get_serve_details(), ServeDetails, strict=False)


def running_on(application: ApplicationDetails | None) -> tuple[str, ...]:
    """The addresses of the nodes with a running replica of an instance, one for each replica."""
    replicas = application.replicas if application else []
    return tuple(sorted(each.node_ip or "" for each in replicas if each.state == "RUNNING"))


def observed(application: ApplicationDetails | None, server: Server) -> tuple[str, str]:
    """The state of a server by its application, and why it is not ready."""
    if application is None:
        return WAITING, "it is not deployed"
    if running_on(application):
        return READY, ""
    deployment = application.deployments.get(REPLICA)
    message = (deployment and deployment.message) or application.message
    if application.status == NOT_DEPLOYED:
        return FAILED, message
    if server.start == DEMAND and not application.replicas:
        return ASLEEP, ""
    return LOADING, message
