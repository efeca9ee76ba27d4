"""`up`, and `serve` of a profile: the servers of a configuration, started."""

from __future__ import annotations

import os
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from pipeline.core import log
from pipeline.core.errors import PipelineError, UsageError, doitw
from pipeline.core.paths import REPOSITORY, absolute, user_folder
from pipeline.core.process import last_lines
from pipeline.core.text import table
from pipeline.serve.config.named import CARDS, OF_PROFILES, REGISTRY
from pipeline.serve.server import LLAMA_CPP, Server
from pipeline.serve.supervisor import state
from pipeline.serve.supervisor.state import (
    ENDED,
    FAILED,
    PAUSING,
    READY,
    DesiredState,
    Folder,
    ServerStatus,
    require_known,
)

from . import gateway, launch, ps
from . import serve as serving
from .servers import Servers
from .summary import summary

LOG_LINES = 1000  # of a server, to find in what it said of itself

# What a service needs of the environment that it was written in: paths, and what a profile reads.
PATHS = ("LLAMA_PIPELINE_HOME", "LLAMA_PIPELINE_CACHE", "LLAMA_SERVER_BINS_DIR", REGISTRY)


def wanted(servers: Servers) -> DesiredState:
    """What `up` starts: with name= only these. Writes the keys that are needed. Raises
    PipelineError."""
    from pipeline.serve.config import instances

    configuration = servers.configuration
    servers.require_placed()
    launch.install_models(servers)
    for made in instances.write_keys(configuration, servers.flags(), servers.keys):
        log.info(made)
    if configuration.gateway.enable:
        gateway.ready(servers)
    found = chosen(servers, planned(servers))
    for server in found.instances:
        serving.require_servable(servers.home, server, servers.flags() or {})
    for warning in launch.warnings(servers, found.instances):
        log.info(f"warning: {warning}")
    return found


def asked_for(servers: Servers, found: Sequence[Server]) -> DesiredState:
    """What `up` asks for, of what is planned: with name= these beside what runs already. Raises
    UsageError where a name is unknown."""
    from pipeline.serve.supervisor import control

    return control.merged(servers.at, chosen(servers, found), servers.requested.names)


def chosen(servers: Servers, found: Sequence[Server]) -> DesiredState:
    """Of what is planned, what is named. Raises UsageError where a name is unknown."""
    requested = servers.requested
    require_known(requested.names, [one.name for one in found])
    return DesiredState(
        config=requested.source,
        instances=tuple(one for one in found if not requested.names or one.name in requested.names),
        max_loading=requested.max_loading or servers.configuration.master.max_loading,
    )


def planned(servers: Servers) -> tuple[Server, ...]:
    """What would be started, the gateway among it. Raises PipelineError."""
    configuration = servers.configuration
    has_gateway = configuration.gateway.enable and configuration.master.enable
    return (*launch.servers_of(servers), *([gateway.instance(servers)] if has_gateway else []))


def up(servers: Servers) -> None:
    """Start what is asked for and is not there yet. Raises PipelineError where one is not ready."""
    from pipeline.serve.supervisor import control

    asked = wanted(servers)
    require_own_places(servers, asked)
    names = servers.requested.names
    if servers.requested.background is False:
        control.run_foreground(servers.at, asked, report=reporter(servers), names=names)
        log.info("stopped")
        return
    failed = control.up(servers.at, asked, report=reporter(servers), names=names)
    for line in launch.not_started(servers, asked.instances):
        log.info(f"not started: {line}")
    ps.show(servers.request, [servers.at], reasons=False)
    if failed:
        raise PipelineError(
            "\n".join(f"{one.name} is {seen.state}: {seen.reason}" for one, seen in failed),
            f"{doitw('up')} retries what has failed; {doitw('logs name=…')} shows more",
        )
    stay(servers.at, [one for one in asked.instances if not one.background])


def require_own_places(servers: Servers, asked: DesiredState) -> None:
    """Raise UsageError where servers of another configuration have a log or a port of these."""
    from pipeline.serve.config.addresses import Address

    others = [
        (server, there.config)
        for other in state.folders(servers.home)
        if other != servers.at and (there := state.read_wanted(other))
        for server in running(other, there)
    ]
    wrong = []
    for one in asked.instances:
        for other_server, config in others:
            if one.log_file == other_server.log_file:
                wrong.append(f"{one.name}: {one.log_file} is written by a server of {config}")
            at = Address(one.host, one.port)
            if at.clashes(Address(other_server.host, other_server.port)):
                wrong.append(f"{one.name}: {at.host}:{at.port} is taken by a server of {config}")
    if wrong:
        hint = "give each its own: control.log_file, server.port; or stop the other: "
        raise UsageError("\n".join(wrong), hint + doitw("down config=…"))


def running(at: Folder, desired: DesiredState) -> list[Server]:
    """The servers of a configuration that have not ended."""
    from pipeline.serve.supervisor import liveness

    if not liveness.is_running(at):
        return []
    actual = state.read_state(at)
    ended = {one.name for one in actual.instances if one.state in state.ENDED} if actual else set()
    return [server for server in desired.instances if server.name not in ended]


def serve(servers: Servers) -> None:
    """The one server of a profile, in the foreground until asked to stop. Raises PipelineError."""
    found = wanted(servers).instances
    if len(found) != 1:
        names = ", ".join(one.name for one in found) or "nothing"
        raise UsageError(
            f"serve: {servers.configuration.label} asks for {names}",
            f"start them: {doitw('up')}",
        )
    serving.run(
        servers.programs,
        found[0],
        ctx_is_asked=servers.names_context(found[0].name),
        not_started=launch.not_started(servers, found),
    )


def systemd(servers: Servers) -> None:
    """Print a unit of systemd that keeps the configuration up. Raises PipelineError."""
    from pipeline.serve.supervisor.unit import systemd_unit

    if servers.is_overridden:
        raise UsageError(
            f"{servers.is_overridden} is set: a unit is no place for it",
            "write it into the file",
        )
    requested = servers.requested
    named = {"config": requested.config} if requested.config else {"profile": requested.profile}
    engine = {"engine": requested.engine} if requested.engine else {}
    words = {**servers.variables, **named, **engine, "background": "0"}
    env = {name: str(absolute(os.environ[name])) for name in PATHS if os.environ.get(name)}
    kept = (*OF_PROFILES, CARDS) if requested.profile else ()
    env |= {name: os.environ[name] for name in kept if name in os.environ}
    times = [draft.control.stop_timeout for draft in servers.configuration.enabled]
    print(
        systemd_unit(
            servers.configuration.label,
            [str(REPOSITORY / "doitw"), "up", *(f"{n}={v}" for n, v in words.items())],
            folder=user_folder(),
            env=env,
            stop_timeout=max(times, default=10.0),
        ),
        end="",
    )


def reporter(servers: Servers) -> Callable[[Server, ServerStatus], None]:
    """What says each change that a user waits for; of a server that is ready, its summary."""

    def tell(server: Server, seen: ServerStatus) -> None:
        report(server, seen)
        if seen.state == READY and server.engine == LLAMA_CPP:
            output = last_lines(Path(server.log_file), LOG_LINES)
            asked = servers.names_context(server.name)
            rows = summary(servers.programs, server, output, ctx_is_asked=asked)
            for name in ("url", "key"):  # the line before has them
                rows.pop(name, None)
            log.info(textwrap.indent(table(list(rows.items())), "  "))

    return tell


def report(instance: Server, seen: ServerStatus) -> None:
    """One line for each change that a user waits for."""
    if seen.state == READY:
        key = f", with the key in {instance.api_key_file}" if instance.api_key_file else ""
        log.info(f"{instance.name}: ready at {instance.url}{key}")
    elif seen.state == PAUSING:
        log.info(f"{instance.name}: is started again: {first_line(seen.reason)}")
    elif seen.state == FAILED:
        log.info(f"{instance.name}: failed: {first_line(seen.reason)}")


def first_line(reason: str) -> str:
    """The reason without the last lines of the log."""
    return reason.partition("\n")[0].removesuffix(":")


def stay(at: Folder, instances: Sequence[Server]) -> None:
    """Stay with those that are not for the background, until they end; a stop ends them."""
    from pipeline.serve.supervisor import control, liveness

    if not instances:
        return
    names = [one.name for one in instances]
    try:
        log.info(
            f"staying with {', '.join(names)}; Ctrl-C stops {'them' if len(names) > 1 else 'it'}"
        )
        while there := liveness.living(at):
            seen = [one for one in there.instances if one.name in names]
            if all(one.state in ENDED for one in seen):
                break
            time.sleep(0.2)
    except KeyboardInterrupt:
        control.down(at, names)
        log.info("stopped")
        return
    if there is None:
        raise PipelineError("the supervisor is gone, and they with it", f"its log is {at.log}")
    if failed := [one for one in seen if one.state == FAILED]:
        raise PipelineError("\n".join(f"{one.name} is failed: {one.reason}" for one in failed))
