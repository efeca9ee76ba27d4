"""The servers of a file deployed to a cluster, or to a Ray on this machine, which is started for
them."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from msgspec.structs import replace

from pipeline.bins import binaries
from pipeline.bins.hardware import nvidia
from pipeline.core import log
from pipeline.core.errors import PipelineError, UsageError, doitw
from pipeline.core.paths import Home
from pipeline.core.python_environment import PYTHON
from pipeline.core.store.locks import mark_used, only_one
from pipeline.deploy.ray import adapt, deployed, environment, local, nodes
from pipeline.deploy.ray import cluster as clusters
from pipeline.deploy.ray.cluster import Cluster, ClusterGone, ServeDetails
from pipeline.deploy.ray.config import ClusterPlan
from pipeline.deploy.ray.deployed import Deployed
from pipeline.serve import address
from pipeline.serve.keys import is_loopback
from pipeline.serve.supervisor.state import ASLEEP, FAILED, LOADING, READY, WAITING

from .programs import Programs
from .ray_cluster import UNHEALTHY, state, wait_until_gone
from .servers import Servers

POLL_SECONDS = 1.0
GONE_SECONDS = 60.0  # without an answer, until a deployment is given up


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
            if failed := clusters.failed(details, changed):  # Serve does not try the same again
                cluster.deploy(clusters.left_out(body, failed))
                wait_until_gone(cluster, failed)
            cluster.deploy(body)
        details = _wait(
            cluster, [application["name"] for application in planned.body["applications"]]
        )
    if not changed:
        log.info(f"nothing to do: {cluster.shown} serves all of {servers.configuration.label}")
    _report_gateway(details, planned, target)


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
    cards, custom = len(nvidia.listed()), own_resources(servers.programs)
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
    """The Python of Ray's environment, which is made unless it is there, or the image has one.
    Raises PipelineError."""
    own = environment.IMAGES_OWN / PYTHON
    if own.exists():
        return own
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
            details, answered = cluster.serves(), time.monotonic()
        except ClusterGone:
            if time.monotonic() - answered > GONE_SECONDS:
                raise
            time.sleep(POLL_SECONDS)
            continue
        states = dict.fromkeys(names, WAITING)
        for name in names:
            line = f"{name}: {WAITING}"
            if each := details.applications.get(name):
                states[name] = state(each)
                why = each.problem.partition("\n")[0] if states[name] == LOADING else ""
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


def _report_gateway(details: ServeDetails, planned: ClusterPlan, target: Deployed) -> None:
    options = details.http_options or {}
    host, port = str(options.get("host", "")), int(options.get("port", 0))
    settings = planned.settings
    if (host, port) != (settings.host, settings.port):
        log.info(
            f"warning: Serve ran already, and listens on {host}:{port} instead of "
            f"{settings.host}:{settings.port}: that cannot change while it runs"
        )
    where = "" if target.local else ", and on every other node with a replica"
    key = f", with the key in {settings.api_key_file}" if settings.api_key_file else ""
    log.info(f"the gateway listens on {reached_at(target.address, host, port)}{where}{key}")


def reached_at(cluster: str, host: str, port: int) -> str:
    """The URL, from this machine, of the gateway on the cluster with the dashboard `cluster`: that
    of its head, where the gateway listens on every address."""
    head = urlsplit(cluster).hostname or ""
    if is_loopback(head):
        return address.shown(host, port)
    if is_loopback(host):
        return f"{address.url(host, port)} of each node, for its own programs alone"
    return address.url(head if address.is_anywhere(host) else host, port)
