"""The health check of a container: whether its servers answer, or whatever is on 8080 where it has
none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.core import paths
from pipeline.core.errors import PipelineError
from pipeline.core.text import is_digits
from pipeline.serve.config import instances, named, profiles
from pipeline.serve.health import is_ready
from pipeline.serve.keys import is_loopback
from pipeline.serve.server import DEMAND, GATEWAY, Server
from pipeline.serve.supervisor import liveness, state
from pipeline.serve.supervisor.state import ASLEEP, EXITED, FAILED, STOPPED, UNLOADING, Folder

from . import boot
from .boot import BootSource

OVER = (EXITED, STOPPED)
SECONDS = 2.0  # for each server to answer
PUBLISHED = "PUBLISHED_PORTS"  # of the container, if set by who starts it


def errors(environ: Mapping[str, str]) -> list[str]:
    """One line for each server that does not answer. Raises PipelineError."""
    home = paths.home()
    up = {at: resting(at) for at in state.folders(home) if liveness.living(at)}
    servers = [x for at, asleep in up.items() for x in running(at) if x.name not in asleep]
    missing = []
    for source in boot.boot(environ).sources:
        if state.folder(home, source.name) in up:
            continue
        if source.is_profile:
            servers.append(of_profile(environ))
        else:
            missing.append(f"{source.name}: none of its servers is up")
    if not (servers or missing or any(up.values())):
        servers.append(_named("llama-server"))
    return missing + [
        f"{x.name} does not answer at {x.url}" for x in servers if not is_ready(x, SECONDS)
    ]


def running(at: Folder) -> list[Server]:
    """The servers of a configuration that should answer."""
    return [server for server, status in _with_states(at) if status not in OVER]


def resting(at: Folder) -> set[str]:
    """The names of those that need not answer: they are loaded when a request names them."""
    return {
        server.name
        for server, status in _with_states(at)
        if status in (ASLEEP, UNLOADING) or (server.start == DEMAND and status not in ("", FAILED))
    }


def _with_states(at: Folder) -> list[tuple[Server, str]]:
    """The servers of a configuration, each with its state; empty where that is not known."""
    wanted, statuses = state.read_wanted(at), state.statuses_of(state.read_state(at))
    states = {name: status.state for name, status in statuses.items()}
    return [(x, states.get(name, "")) for name, x in state.servers_of(wanted).items()]


def _named(name: str, **address: Any) -> Server:
    """A server of which only the address matters."""
    return Server(name=name, executable="", cmd=(), folder="", log_file="", **address)


def of_profile(environ: Mapping[str, str]) -> Server:
    """The server of the profile that the environment names, by address. Raises PipelineError."""
    profile = environ[named.PROFILE].strip()
    loaded = profiles.load_profile(Path(named.registry(environ)), profile, environ)
    return _named(profile, **instances.reached_at(instances.resolve(loaded.specs[0], None)))


def unreachable(
    folders: Sequence[Folder], profile: BootSource | None, environ: Mapping[str, str]
) -> str:
    """A warning about servers that clients outside the container cannot reach; empty for none."""
    groups = [running(at) for at in folders]
    if profile:
        try:
            groups.append([of_profile(environ)])
        except PipelineError:
            return ""  # `serve` reports what is wrong with it
    servers = [server for group in groups for server in group]
    if servers and all(is_loopback(server.host) for server in servers):
        return (
            f"{', '.join(server.url for server in servers)}: reachable from this container only; "
            "host 0.0.0.0 opens it to others (LLAMACPP_HOST_OVERRIDE for a profile)"
        )
    ports = environ.get(PUBLISHED, "").replace(",", " ").split()
    if not all(map(is_digits, ports)):
        return f"{PUBLISHED}={environ[PUBLISHED]}: must be ports with commas, such as 8080,9000"
    inside = [server for group in groups for server in unpublished(group, ports)] if ports else []
    if not inside:
        return ""
    return (
        f"{', '.join(f'{server.name} on {server.port}' for server in inside)}: not published, only "
        f"{', '.join(ports)} is; a gateway on that port would serve all instances of its file"
    )


def unpublished(servers: Sequence[Server], ports: Sequence[str]) -> list[Server]:
    """Those of one configuration that listen for others, but on an unpublished port; none where its
    gateway is published."""
    public = [server for server in servers if not is_loopback(server.host)]
    if any(server.engine == GATEWAY and str(server.port) in ports for server in public):
        return []
    return [server for server in public if str(server.port) not in ports]
