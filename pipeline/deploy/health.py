"""Whether the servers of a container answer: those that were started, or whatever is on 8080."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.core import paths
from pipeline.core.errors import PipelineError
from pipeline.serve import health
from pipeline.serve.config import named
from pipeline.serve.keys import is_loopback
from pipeline.serve.server import GATEWAY, Server
from pipeline.serve.supervisor import liveness, state
from pipeline.serve.supervisor.state import EXITED, STOPPED, Folder

from .boot import BootSource

OVER = (EXITED, STOPPED)
SECONDS = 2.0  # for each server to answer
PUBLISHED = "PUBLISHED_PORTS"  # of the container, where whoever starts it says so


def ask(environ: Mapping[str, str]) -> list[str]:
    """What is wrong with the servers; nothing where each answers. Raises PipelineError."""
    home = paths.home()
    up = [at for at in state.folders(home) if liveness.living(at)]
    servers = [one for at in up for one in running(at)]
    profile = environ.get(named.PROFILE, "").strip()
    if profile and state.folder(home, named.of_profile(profile, environ)) not in up:
        servers.append(of_profile(profile, environ))
    if not servers:
        servers.append(Server(name="llama-server", executable="", cmd=(), folder="", log_file=""))
    return [f"{one.name} does not answer at {one.url}" for one in servers if not answers(one)]


def answers(one: Server) -> bool:
    """Whether its /health says 200."""
    path = f"{one.prefix}/health"
    return health.is_ready(one.address, one.port, path, tls=one.tls, timeout=SECONDS)


def running(at: Folder) -> list[Server]:
    """The servers of a configuration that should answer."""
    wanted, found = state.read_wanted(at), state.read_state(at)
    over = {one.name for one in found.instances if one.state in OVER} if found else set()
    return [one for one in (wanted.instances if wanted else ()) if one.name not in over]


def of_profile(profile: str, environ: Mapping[str, str]) -> Server:
    """Where the server of a profile listens. Raises PipelineError."""
    from pipeline.serve.config import addresses, instances
    from pipeline.serve.config.profiles import load_profile

    found = load_profile(Path(named.registry(environ)), profile, environ, patient=True)
    given = instances.given(found.drafts[0], None)
    at = addresses.address(given)
    return Server(
        name=profile,
        executable="",
        cmd=(),
        folder="",
        log_file="",
        host=at.host,
        port=at.port,
        prefix=given.text("api-prefix").rstrip("/"),
        tls=bool(given.text("ssl-cert-file") or given.text("ssl-certfile")),
    )


def out_of_reach(
    folders: Sequence[Folder], profile: BootSource | None, environ: Mapping[str, str]
) -> str:
    """Which servers nothing outside of the container reaches; empty where clients find a way."""
    groups = [running(at) for at in folders]
    if profile:
        try:
            groups.append([of_profile(environ[named.PROFILE].strip(), environ)])
        except PipelineError:
            return ""  # `serve` says what is wrong with it
    servers = [one for group in groups for one in group]
    if servers and all(is_loopback(one.host) for one in servers):
        return (
            f"{', '.join(one.url for one in servers)}: only this container reaches that; a host of "
            "0.0.0.0 lets others in (LLAMACPP_HOST_OVERRIDE for a profile)"
        )
    ports = environ.get(PUBLISHED, "").replace(",", " ").split()
    if not all(port.isdecimal() for port in ports):
        return f"{PUBLISHED}={environ[PUBLISHED]}: is ports with commas between, such as 8080,9000"
    inside = [one for group in groups for one in unpublished(group, ports)] if ports else []
    if not inside:
        return ""
    return (
        f"{', '.join(f'{one.name} on {one.port}' for one in inside)}: not published, only "
        f"{', '.join(ports)} is; a gateway there leads to all instances of its file"
    )


def unpublished(servers: Sequence[Server], ports: Sequence[str]) -> list[Server]:
    """Those of one configuration that listen for others, on a port that is not published; none
    where its gateway is."""
    meant = [one for one in servers if not is_loopback(one.host)]
    if any(one.engine == GATEWAY and str(one.port) in ports for one in meant):
        return []
    return [one for one in meant if str(one.port) not in ports]
