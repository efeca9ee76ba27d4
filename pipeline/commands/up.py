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
from pipeline.serve.config.named import REGISTRY
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

from . import gateway, install_model, ps
from . import serve as serving
from .model import Steps
from .servers import Configured, require
from .summary import summary

LOG_LINES = 1000  # of a server, to find in what it said of itself

# What a service needs of the environment that it was written in: paths, and what a profile reads.
PATHS = ("LLAMA_PIPELINE_HOME", "LLAMA_PIPELINE_CACHE", "LLAMA_SERVER_BINS_DIR", REGISTRY)


def wanted(configured: Configured) -> DesiredState:
    """What `up` starts: with name= only these. Writes the keys that are needed. Raises
    PipelineError."""
    from pipeline.serve.config import instances

    configuration = configured.configuration
    if wrong := configured.misplaced():
        raise UsageError("\n".join(wrong))
    install_model.place(configured.steps)
    for made in instances.write_keys(configuration, configured.flags(), configured.keys):
        log.info(made)
    if configuration.gateway.enable:
        gateway.ready(configured)
    found = chosen(configured, planned(configured))
    for server in found.instances:
        serving.require_servable(configured.steps, server, configured.flags() or {})
    return found


def asked_for(configured: Configured, found: Sequence[Server]) -> DesiredState:
    """What `up` asks for, of what is planned: with name= these beside what runs already. Raises
    UsageError where a name is unknown."""
    from pipeline.serve.supervisor import control

    return control.merged(configured.at, chosen(configured, found), configured.wish.names)


def chosen(configured: Configured, found: Sequence[Server]) -> DesiredState:
    """Of what is planned, what is named. Raises UsageError where a name is unknown."""
    wish = configured.wish
    require_known(wish.names, [one.name for one in found])
    return DesiredState(
        config=wish.source,
        instances=tuple(one for one in found if not wish.names or one.name in wish.names),
        max_loading=wish.max_loading or configured.configuration.master.max_loading,
    )


def planned(configured: Configured) -> tuple[Server, ...]:
    """What would be started, the gateway among it. Raises PipelineError."""
    configuration = configured.configuration
    has_gateway = configuration.gateway.enable and configuration.master.enable
    return (*configured.instances(), *([gateway.instance(configured)] if has_gateway else []))


def up(steps: Steps) -> None:
    """Start what is asked for and is not there yet. Raises PipelineError where one is not ready."""
    from pipeline.serve.supervisor import control

    configured = require(steps)
    asked = wanted(configured)
    require_own_logs(steps, configured.at, asked)
    names = configured.wish.names
    if configured.wish.background is False:
        control.run_foreground(configured.at, asked, report=reporter(configured), names=names)
        log.info("stopped")
        return
    failed = control.up(configured.at, asked, report=reporter(configured), names=names)
    for line in configured.not_started(asked.instances):
        log.info(f"not started: {line}")
    ps.show(steps, [configured.at], reasons=False)
    if failed:
        raise PipelineError(
            "\n".join(f"{one.name} is {seen.state}: {seen.reason}" for one, seen in failed),
            f"{doitw('up')} retries what has failed; {doitw('logs name=…')} shows more",
        )
    stay(configured.at, [one for one in asked.instances if not one.background])


def require_own_logs(steps: Steps, at: Folder, asked: DesiredState) -> None:
    """Raise UsageError where servers of another configuration write to a log of these."""
    from pipeline.serve.supervisor import liveness

    taken: dict[str, str] = {}
    for other in state.folders(steps.home):
        if other != at and (there := state.read_wanted(other)) and liveness.is_running(other):
            taken |= {one.log_file: there.config for one in there.instances}
    wrong = [
        f"{one.name}: {one.log_file} is written by a server of {taken[one.log_file]}"
        for one in asked.instances
        if one.log_file in taken
    ]
    if wrong:
        raise UsageError("\n".join(wrong), "say where its log goes: control.log_file or log_dir")


def serve(steps: Steps) -> None:
    """The one server of a profile, in the foreground until asked to stop. Raises PipelineError."""
    configured = require(steps)
    found = wanted(configured).instances
    if len(found) != 1:
        names = ", ".join(one.name for one in found) or "nothing"
        raise UsageError(
            f"serve: {configured.configuration.label} asks for {names}",
            f"start them: {doitw('up')}",
        )
    serving.run(
        steps,
        found[0],
        ctx_is_asked=configured.names_context(found[0].name),
        not_started=configured.not_started(found),
    )


def systemd(steps: Steps) -> None:
    """Print a unit of systemd that keeps the configuration up. Raises PipelineError."""
    from pipeline.serve.config.profile_options import CARDS_OVERRIDE, OVERRIDES
    from pipeline.serve.supervisor.unit import systemd_unit

    configured = require(steps)
    if configured.is_overridden:
        raise UsageError(
            f"{configured.is_overridden} is set: a unit is no place for it",
            "write it into the file",
        )
    wish, given = configured.wish, dict(configured.given)
    named = {"config": wish.config} if wish.config else {"profile": wish.profile}
    engine = {"engine": wish.engine} if wish.engine else {}
    words = {**given, **named, **engine, "background": "0"}
    env = {name: str(absolute(os.environ[name])) for name in PATHS if os.environ.get(name)}
    kept = (*OVERRIDES, CARDS_OVERRIDE) if wish.profile else ()
    env |= {name: os.environ[name] for name in kept if name in os.environ}
    times = [draft.control.stop_timeout for draft in configured.configuration.enabled]
    print(
        systemd_unit(
            configured.configuration.label,
            [str(REPOSITORY / "doitw"), "up", *(f"{n}={v}" for n, v in words.items())],
            folder=user_folder(),
            env=env,
            stop_timeout=max(times, default=10.0),
        ),
        end="",
    )


def reporter(configured: Configured) -> Callable[[Server, ServerStatus], None]:
    """What says each change that a user waits for; of a server that is ready, its summary."""

    def tell(server: Server, seen: ServerStatus) -> None:
        report(server, seen)
        if seen.state == READY and server.engine == LLAMA_CPP:
            output = last_lines(Path(server.log_file), LOG_LINES)
            asked = configured.names_context(server.name)
            rows = summary(configured.steps, server, output, ctx_is_asked=asked)
            del rows["url"]  # the line before has it
            log.info(textwrap.indent(table(list(rows.items())), "  "))

    return tell


def report(instance: Server, seen: ServerStatus) -> None:
    """One line for each change that a user waits for."""
    if seen.state == READY:
        log.info(f"{instance.name}: ready at {instance.url}")
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
