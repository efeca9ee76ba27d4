"""Whether the servers of a container answer: those that were started, or whatever is on 8080."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.core import paths
from pipeline.core.errors import PipelineError
from pipeline.serve import health
from pipeline.serve.config import named
from pipeline.serve.fleet import standing, state
from pipeline.serve.fleet.state import EXITED, STOPPED, Folder
from pipeline.serve.instance import Instance

from .boot import Source

OVER = (EXITED, STOPPED)
SECONDS = 2.0  # for each server to answer
LOOPBACK = ("localhost", "::1")


def ask(environ: Mapping[str, str]) -> list[str]:
    """What is wrong with the servers; nothing where each answers. Raises PipelineError."""
    home = paths.home()
    up = [at for at in state.folders(home) if standing.living(at)]
    servers = [one for at in up for one in running(at)]
    profile = environ.get(named.PROFILE, "").strip()
    if profile and state.folder(home, named.of_profile(profile, environ)) not in up:
        servers.append(of_profile(profile, environ))
    if not servers:
        servers.append(Instance(name="llama-server", executable="", cmd=(), folder="", log_file=""))
    return [f"{one.name} does not answer at {one.url}" for one in servers if not answers(one)]


def answers(one: Instance) -> bool:
    """Whether its /health says 200."""
    path = f"{one.prefix}/health"
    return health.is_ready(one.address, one.port, path, tls=one.tls, timeout=SECONDS)


def running(at: Folder) -> list[Instance]:
    """The servers of a configuration that should answer."""
    wanted, found = state.read_wanted(at), state.read_state(at)
    over = {one.name for one in found.instances if one.state in OVER} if found else set()
    return [one for one in (wanted.instances if wanted else ()) if one.name not in over]


def of_profile(profile: str, environ: Mapping[str, str]) -> Instance:
    """Where the server of a profile listens. Raises PipelineError."""
    from pipeline.serve.config import addresses, instances
    from pipeline.serve.config.profiles import load_profile

    found = load_profile(Path(named.registry(environ)), profile, environ, patient=True)
    given = instances.given(found.drafts[0], None)
    at = addresses.address(given)
    return Instance(
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


def unreachable(
    folders: Sequence[Folder], profile: Source | None, environ: Mapping[str, str]
) -> str:
    """That nothing outside of the container reaches its servers; empty where something does."""
    servers = [one for at in folders for one in running(at)]
    if profile:
        try:
            servers.append(of_profile(environ[named.PROFILE].strip(), environ))
        except PipelineError:
            return ""  # `serve` says what is wrong with it
    if not servers or not all(is_loopback(one.host) for one in servers):
        return ""
    return (
        f"{', '.join(one.url for one in servers)}: only this container reaches that; a host of "
        "0.0.0.0 lets others in (LLAMACPP_HOST_OVERRIDE for a profile)"
    )


def is_loopback(host: str) -> bool:
    return host in LOOPBACK or host.startswith("127.")
