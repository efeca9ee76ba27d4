"""The servers of a file on a running cluster: listed, read and taken down."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from msgspec import Struct

from pipeline.core import log
from pipeline.core.errors import PipelineError, UsageError, doitw
from pipeline.core.store.locks import only_one
from pipeline.core.text import table
from pipeline.deploy.ray import cluster as clusters
from pipeline.deploy.ray import deployed
from pipeline.deploy.ray.cluster import ApplicationDetails, Cluster, ClusterGone, ReplicaDetails
from pipeline.deploy.ray.deployed import Deployed
from pipeline.serve.server import GATEWAY
from pipeline.serve.supervisor.state import (
    ASLEEP,
    FAILED,
    LOADING,
    READY,
    STOPPING,
    WAITING,
    Folder,
    require_known,
)

from .servers_request import ServersRequest
from .session import Session

RUNNING = "RUNNING"  # of a replica
UNHEALTHY = "unhealthy"
STATES = {
    clusters.RUNNING: READY,
    clusters.DEPLOYING: LOADING,
    clusters.FAILED: FAILED,
    clusters.UNHEALTHY: UNHEALTHY,
    clusters.DELETING: STOPPING,
    clusters.NOT_STARTED: WAITING,
}
POLL_SECONDS = 1.0
DOWN_SECONDS = 900.0  # for answers under way


class ClusterRow(Struct, frozen=True, kw_only=True):
    """A server on a cluster as `ps` shows it. `replicas` run, `wanted` should."""

    name: str
    engine: str
    model: str  # the first alias, else the name
    state: str
    replicas: int
    wanted: int
    nodes: tuple[str, ...]  # the addresses of those with a replica
    reason: str
    cluster: str  # the dashboard


def state(each: ApplicationDetails) -> str:
    """The state of an application, in the words of `ps`."""
    found = STATES.get(each.status, each.status.lower())
    if found == READY and not any(one.state == RUNNING for one in each.replicas):
        return LOADING if each.wanted else ASLEEP
    return found


def rows(at: Folder) -> list[ClusterRow]:
    """The servers of a configuration on its cluster; none where it is on none."""
    known = deployed.read(at)
    if known is None:
        return []
    cluster = known.cluster
    try:
        details = cluster.serves()
    except PipelineError as error:
        log.info(gone(known, error))
        return []
    if details.configuration != known.configuration:
        return []
    servers = details.gateway_config.get("servers", {})
    return [_row(each, servers.get(name, {}), cluster) for name, each in details.ours.items()]


def _row(each: ApplicationDetails, server: Mapping[str, Any], cluster: Cluster) -> ClusterRow:
    """`server` is what the gateway knows of it; nothing of itself."""
    now = state(each)
    return ClusterRow(
        name=each.name,
        engine=server.get("engine", GATEWAY),
        model=next(iter(server.get("aliases", ())), each.name),
        state=now,
        replicas=sum(one.state == RUNNING for one in each.replicas),
        wanted=each.wanted,
        nodes=tuple(dict.fromkeys(one.node_ip or "" for one in each.replicas)),
        reason="" if now in (READY, ASLEEP) else each.problem,
        cluster=cluster.shown,
    )


def text(rows: Sequence[ClusterRow]) -> str:
    """The table of servers on clusters."""
    titles = ("name", "engine", "model", "state", "replicas", "nodes", "cluster")
    cells = [
        (
            *(row.name, row.engine, row.model, row.state, f"{row.replicas}/{row.wanted}"),
            *(", ".join(row.nodes), row.cluster),
        )
        for row in rows
    ]
    return table([titles, *cells])


def gone(known: Deployed, error: PipelineError) -> str:
    """What is known of a cluster that does not answer."""
    if known.local and not known.local.process():
        return (
            f"{known.config}: was on a Ray of this machine, which is gone; "
            f"{doitw('ray config=… start=1')} starts it again, {doitw('down config=…')} forgets it"
        )
    return f"{known.config}: is on a cluster that is gone, or out of reach: {error.message}"


def config(at: Folder) -> str:
    """The file whose servers are on a cluster; empty where nothing is."""
    known = deployed.read(at)
    return known.config if known else ""


def logs(session: Session, places: Sequence[Folder]) -> None:
    """Print the last lines of the logs of the named servers' replicas, and with follow=1 new ones.
    Raises PipelineError."""
    requested = session.request.servers
    found: dict[str, Iterator[str]] = {}
    names: list[str] = []
    for at in places:
        if known := deployed.read(at):
            cluster = known.cluster
            ours = cluster.serves().ours
            names += ours
            for name in requested.names or ours:
                for replica in ours[name].replicas if name in ours else ():
                    found[f"{name} on {replica.node_ip}, {replica.replica_id}"] = _log(
                        cluster, replica, requested
                    )
    require_known(requested.names, names)
    if not found:
        raise UsageError("no replica is running", f"{doitw('ps')} lists the servers")
    if requested.follow and len(found) > 1:
        raise UsageError("follow=1 follows one log", "name=… of a server with one replica")
    for title, pieces in found.items():
        if len(found) > 1:
            print(f"==> {title} <==")
        for piece in pieces:
            print(piece, end="", flush=requested.follow)


def _log(cluster: Cluster, replica: ReplicaDetails, requested: ServersRequest) -> Iterator[str]:
    """The log of a replica's server, else of the replica itself, which is there before it."""
    own, node = replica.log_file_path or "", replica.node_id or ""
    for file in (own.replace("/replica_", "/server_", 1), own) if own else ():
        last = cluster.log(node, file.lstrip("/"), requested.lines)
        if last is not None:
            new = cluster.follow(node, file.lstrip("/"), requested.lines)
            yield from new if requested.follow else (last,)
            return
    yield "no log: the replica has just started, or its node is gone\n"


def down(at: Folder, names: Sequence[str]) -> list[str]:
    """Take the named servers off their cluster, or all of the configuration; a Ray of this machine
    ends with the last application. Returns what was taken down. Raises PipelineError."""
    known = deployed.read(at)
    if known is None:
        return []
    cluster = known.cluster
    with only_one(at.cluster):
        try:
            details = cluster.serves()
        except ClusterGone as error:
            if known.local is None or known.local.process():
                hint = f"where the cluster is gone for good, remove {at.cluster} to forget it"
                raise ClusterGone(error.message, f"{error.hint}; {hint}") from None
            log.info(gone(known, error))
            known.local.stop()
            deployed.forget(at)
            return []
        if details.configuration == known.configuration:
            require_known(names, [name for name in details.ours if name != GATEWAY])
        body, ended = clusters.without(details, names, known.configuration)
        if ended:
            cluster.deploy(body)
            wait_until_gone(cluster, ended)
        others = details.applications.keys() - {*ended}
        if any(details.applications[name].is_ours for name in others):
            return ended
        if known.local and others:
            log.info(f"Ray on this machine keeps running: it serves {', '.join(sorted(others))}")
            return ended
        if known.local and known.local.stop():
            log.info("ended Ray on this machine")
        deployed.forget(at)
    return ended


def wait_until_gone(cluster: Cluster, names: Sequence[str]) -> None:
    """Return once Serve has removed these applications. Raises PipelineError."""
    deadline = time.monotonic() + DOWN_SECONDS
    while left := [name for name in names if name in cluster.serves().applications]:
        if time.monotonic() > deadline:
            raise PipelineError(
                f"{', '.join(left)}: still there after {DOWN_SECONDS:g} s",
                "the cluster goes on removing them; run it again to see",
            )
        time.sleep(POLL_SECONDS)
