"""The servers of a file on a running cluster: deployed, listed, read and taken down."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from pipeline.bins import binaries
from pipeline.bins.hardware import nvidia
from pipeline.core import log
from pipeline.core.errors import PipelineError, UsageError, doitw
from pipeline.core.paths import Home
from pipeline.core.store.locks import mark_used, only_one
from pipeline.core.text import table
from pipeline.deploy.ray import adapt, deployed, environment, local, nodes
from pipeline.deploy.ray import cluster as clusters
from pipeline.deploy.ray.cluster import (
    ApplicationDetails,
    Cluster,
    ClusterGone,
    ReplicaDetails,
    ServeDetails,
)
from pipeline.deploy.ray.config import ClusterPlan
from pipeline.deploy.ray.deployed import Deployed
from pipeline.serve import address
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

from .programs import Programs
from .servers import Servers
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
GONE_SECONDS = 60.0  # without an answer, until a deployment is given up
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


# start=1


def start(servers: Servers, planned: ClusterPlan, at: str) -> None:
    """Deploy to the cluster at `at`, or to a Ray on this machine, and wait until all is ready.
    Raises PipelineError."""
    servers.at.path.mkdir(parents=True, exist_ok=True, mode=0o700)
    with only_one(servers.at.cluster):
        before = deployed.read(servers.at)
        target = _there(before, at) or _started(servers, planned, at)
        cluster = target.cluster
        if target.local:
            try:
                local.wait(target.local, cluster, _output(servers, planned))
            except PipelineError:
                target.local.stop()
                deployed.forget(servers.at)
                raise
        details = cluster.serves()
        body = clusters.with_others(details, planned.body)
        clusters.require_free(details, planned.body, planned.configuration, cluster.shown)
        there = cluster.nodes()
        nodes.require_fit(planned.servers, there)
        if line := nodes.short(planned.servers, planned.ingresses, there):
            log.info(f"warning: {line}")
        _compare_version(cluster)
        changed = clusters.changed(details, planned.body)
        deployed.write(servers.at, target)
        if changed:
            log.info(f"deploying {', '.join(changed)} to {cluster.shown}")
            cluster.deploy(body)
        details = _wait(
            cluster, [application["name"] for application in planned.body["applications"]]
        )
    if not changed:
        log.info(f"nothing to do: {cluster.shown} serves all of {servers.configuration.label}")
    log.info(f"the gateway listens on {_gateway(details, planned)}")


def _there(before: Deployed | None, at: str) -> Deployed | None:
    """The cluster that the servers are on already, if it is the one that is meant and lives."""
    if before is None:
        return None
    is_same = before.address == at if at else before.local and before.local.process()
    if is_same:
        return before
    if not (before.local and not before.local.process()):
        raise UsageError(
            f"{before.config}: is deployed to {before.address}", f"first {doitw('down config=…')}"
        )
    before.local.stop()  # what it left on the disk
    return None


def _started(servers: Servers, planned: ClusterPlan, at: str) -> Deployed:
    """The cluster at an address, or one that is started now. Raises PipelineError."""
    made = Deployed(
        config=servers.requested.source, configuration=planned.configuration, address=at
    )
    if at:
        return made
    cards, custom = len(nvidia.find()), own_resources(servers.programs)
    node = local.here(cards, custom, cpus=planned.cpus)
    nodes.require_fit(planned.servers, [node])
    python = environment_of(servers.home, servers.request.offline)
    log.info(f"starting Ray on this machine, with {nodes.shown(node.resources)}")
    env = environment.variables(os.environ, servers.home)
    output, token_file = _output(servers, planned), servers.at.path / "ray.token"
    ray, found = local.start(python, node, env, output, token_file)
    target = replace(made, address=found, local=ray)
    deployed.write(servers.at, target)  # at once: what is not known is never ended
    return target


def _output(servers: Servers, planned: ClusterPlan) -> Path:
    """The log of a Ray on this machine."""
    return servers.home.logs / f"ray-{planned.configuration}.log"


def environment_of(home: Home, offline: bool) -> Path:
    """The Python of Ray's environment, which is made unless it is there. Raises PipelineError."""
    made = environment.installed(home)
    made.make(why="once for all configurations", offline=offline)
    mark_used(made.folder)
    return made.python


def own_resources(programs: Programs) -> dict[str, float]:
    """What this machine has beside what Ray sees: backends, and NVIDIA's cards by their names."""
    found = {f"card:{name}": 1.0 for name in nvidia.ids()}
    if programs.are_done():
        devices = binaries.devices(programs.binaries.program("llama-server"), os.environ)
        names = {adapt.backend_of(device) for device in devices}
        found |= {f"backend:{name}": 1.0 for name in sorted(filter(None, names))}
    return found


def _compare_version(cluster: Cluster) -> None:
    theirs, ours = cluster.version(), environment.version()
    if theirs and theirs != ours:
        log.info(f"warning: {cluster.shown} runs Ray {theirs}; this was made for {ours}")


def _wait(cluster: Cluster, names: Sequence[str]) -> ServeDetails:
    """Report each application's state until all run. Ctrl-C leaves them to the cluster. Raises
    PipelineError where one fails."""
    reported: dict[str, str] = {}
    answered = time.monotonic()
    while True:
        try:
            details = cluster.serves()
            answered = time.monotonic()
        except ClusterGone:
            if time.monotonic() - answered > GONE_SECONDS:
                raise
            time.sleep(POLL_SECONDS)
            continue
        states = {}
        for name in names:
            each = details.applications.get(name)
            states[name] = state(each) if each else WAITING
            why = each.problem.partition("\n")[0] if each and states[name] == LOADING else ""
            line = f"{name}: {states[name]}" + (f": {why}" if why else "")
            if reported.get(name) != line:
                reported[name] = line
                log.info(line)
        if failed := [name for name in names if states[name] in (FAILED, UNHEALTHY)]:
            raise PipelineError(
                "\n".join(f"{name}: {details.applications[name].problem}" for name in failed),
                f"{doitw('logs config=… name=…')} shows more; the others keep running",
            )
        if all(each in (READY, ASLEEP) for each in states.values()):
            return details
        time.sleep(POLL_SECONDS)


def _gateway(details: ServeDetails, planned: ClusterPlan) -> str:
    options = details.http_options or {}
    host, port = str(options.get("host", "")), int(options.get("port", 0))
    settings = planned.settings
    if (host, port) != (settings.host, settings.port):
        log.info(
            f"warning: Serve ran already, and listens on {host}:{port} instead of "
            f"{settings.host}:{settings.port}: that cannot change while it runs"
        )
    where = "" if planned.ingresses == 1 else ", on every node with a replica of it"
    return address.url(host, port) + where


# ps, logs, down


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
    servers = _known_servers(details)
    return [
        ClusterRow(
            name=name,
            engine=str(servers.get(name, {}).get("engine", GATEWAY)),
            model=next(iter(servers.get(name, {}).get("aliases", ())), name),
            state=state(each),
            replicas=sum(one.state == RUNNING for one in each.replicas),
            wanted=each.wanted,
            nodes=tuple(dict.fromkeys(one.node_ip or "" for one in each.replicas)),
            reason="" if state(each) in (READY, ASLEEP) else each.problem,
            cluster=cluster.shown,
        )
        for name, each in details.ours.items()
        if details.configuration == known.configuration
    ]


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


def _known_servers(details: ServeDetails) -> Mapping[str, Any]:
    """What the gateway knows of the servers, by name."""
    gateway = details.ours.get(GATEWAY)
    deployments = (gateway.deployed_app_config or {})["deployments"] if gateway else []
    return next((each["user_config"]["servers"] for each in deployments), {})


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
            _wait_until_gone(cluster, ended)
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


def _wait_until_gone(cluster: Cluster, names: Sequence[str]) -> None:
    """Return once Serve has removed these applications. Raises PipelineError."""
    deadline = time.monotonic() + DOWN_SECONDS
    while left := [name for name in names if name in cluster.serves().applications]:
        if time.monotonic() > deadline:
            raise PipelineError(
                f"{', '.join(left)}: still there after {DOWN_SECONDS:g} s",
                "the cluster goes on removing them; run it again to see",
            )
        time.sleep(POLL_SECONDS)
