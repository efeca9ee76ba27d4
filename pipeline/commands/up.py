"""`up`, and `serve` of a profile: the servers of a configuration, started."""

from __future__ import annotations

import functools
import os
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

from msgspec.structs import replace

from pipeline.core import log
from pipeline.core.errors import PipelineError, UsageError, doitw
from pipeline.core.paths import REPOSITORY, absolute, user_folder
from pipeline.core.process import attached, last_lines
from pipeline.core.text import byte_count, table
from pipeline.serve import served
from pipeline.serve.config import instances, options
from pipeline.serve.config.named import CARDS, OF_PROFILES, REGISTRY
from pipeline.serve.server import GATEWAY, LLAMA_CPP, Server
from pipeline.serve.supervisor import control, liveness, unit
from pipeline.serve.supervisor.state import (
    ASLEEP,
    ENDED,
    FAILED,
    PAUSING,
    READY,
    DesiredState,
    Folder,
    ServerStatus,
    Stamp,
    require_known,
    stamp,
)

from . import gateway, launch, leftovers, needs, ps
from . import serve as serving
from .servers import Servers
from .summary import summary

TICK = 0.5  # seconds between two looks at the file that is watched
LOG_LINES = 1000  # from the end of a server's log, which its summary is made of

# What a service needs of the environment that it was written in: paths, and what a profile reads.
PATHS = ("LLAMA_PIPELINE_HOME", "LLAMA_PIPELINE_CACHE", "LLAMA_SERVER_BINS_DIR", REGISTRY)


def prepare(servers: Servers) -> DesiredState:
    """What `up` starts (of name= only these), models and keys in place. Raises PipelineError."""
    configuration = servers.configuration
    servers.require_placed()
    launch.install_models(servers)
    for made in instances.write_keys(configuration, servers.flags(), servers.keys):
        log.info(made)
    if configuration.gateway.enable:
        gateway.ready(servers)
    desired = chosen(servers, planned(servers))
    for server in desired.instances:
        serving.require_servable(servers.home, server, servers.flags() or {})
    for warning in launch.warnings(servers, desired.instances):
        log.info(f"warning: {warning}")
    return desired


def chosen(servers: Servers, instances: Sequence[Server]) -> DesiredState:
    """Of what is planned, what is named. The budget is that of the whole file: the others may run
    already, and keep to it. Raises UsageError where a name is unknown."""
    requested, names = servers.requested, servers.requested.names
    require_known(names, [server.name for server in instances])
    desired = DesiredState(
        config=requested.source,
        instances=tuple(server for server in instances if not names or server.name in names),
        max_loading=requested.max_loading or servers.configuration.master.max_loading,
    )
    if not replace(desired, instances=tuple(instances)).unloads:
        return desired
    budget, computed = needs.budget(servers), needs.of_servers(servers, desired.instances)
    for line in needs.require_fit(servers, desired.instances, computed, budget):
        log.info(f"warning: {line}")
    master = servers.configuration.master
    return replace(
        desired,
        memory=budget,
        needs=computed,
        swap_wait=master.swap_wait,
        saved_slots=byte_count(master.saved_slots),
    )


def planned(servers: Servers) -> tuple[Server, ...]:
    """What would be started, the gateway among it. Raises PipelineError."""
    configuration = servers.configuration
    has_gateway = configuration.gateway.enable and configuration.master.enable
    return (*launch.servers_of(servers), *([gateway.instance(servers)] if has_gateway else []))


def up(servers: Servers) -> None:
    """Start the servers that do not run yet. Raises PipelineError where one does not get ready."""
    if servers.requested.watch:
        watch(servers)
        return
    desired, names = prepare(servers), servers.requested.names
    require_own_places(servers, desired)
    files = [file for server in desired.instances for file in served.files(server)]
    leftovers.begin(servers.home, files)
    tell = functools.partial(report, servers)
    if servers.requested.background is False:
        control.run_foreground(servers.at, desired, report=tell, names=names)
        log.info("stopped")
        return
    failed = control.up(servers.at, desired, report=tell, names=names)
    for line in launch.not_started(servers, desired.instances):
        log.info(f"not started: {line}")
    ps.show(servers.request, [servers.at], reasons=False)
    if failed:
        raise PipelineError(
            "\n".join(
                f"{x.name} is {status.state}: {status.problem or status.reason}"
                for x, status in failed
            ),
            f"{doitw('up')} retries what has failed; {doitw('logs name=…')} shows more",
        )
    stay(servers.at, [server for server in desired.instances if not server.background])


def watch(servers: Servers) -> None:
    """Run `up` now and after each change of the file, until Ctrl-C, which leaves the servers up.
    A wrong file is reported, and its servers stay as they are."""
    file = Path(servers.requested.config)
    words = [f"{name}={value}" for name, value in servers.words.items() if name != "watch"]
    command = [sys.executable, "-m", "doit", "up", *words]
    leftovers.begin(servers.home, [])  # it uses no model itself: others may be removed
    env = {**os.environ, "LLAMA_PIPELINE_CWD": str(user_folder())}
    try:
        while True:
            seen = _settled(file)
            attached(command, cwd=REPOSITORY, env=env)
            log.info(f"watching {file}; Ctrl-C ends that and leaves the servers up")
            while stamp(file) == seen:
                time.sleep(TICK)
            log.info(f"{file.name} has changed")
    except KeyboardInterrupt:
        log.info(f"no longer watching; {doitw('down')} stops the servers")


def _settled(file: Path) -> Stamp:
    """Its stamp, once nobody writes to it; an editor may also replace it by another one."""
    before, now = None, stamp(file)
    while before != now or now is None:
        time.sleep(TICK)
        before, now = now, stamp(file)
    return now


def require_own_places(servers: Servers, desired: DesiredState) -> None:
    """Raise UsageError where a server of another configuration has the same log or port."""
    others, errors = list(liveness.running_elsewhere(servers.at)), []
    for server in desired.instances:
        at = options.Address(server.host, server.port)
        for theirs, config in others:
            if os.path.realpath(server.log_file) == os.path.realpath(theirs.log_file):
                errors.append(
                    f"{server.name}: {server.log_file} is written by a server of {config}"
                )
            if at.clashes(options.Address(theirs.host, theirs.port)):
                errors.append(
                    f"{server.name}: {at.host}:{at.port} is taken by a server of {config}"
                )
    if errors:
        hint = "give each its own: control.log_file, server.port; or stop the other: "
        raise UsageError("\n".join(errors), hint + doitw("down config=…"))


def serve(servers: Servers) -> None:
    """The one server of a profile, in the foreground until asked to stop. Raises PipelineError."""
    instances = prepare(servers).instances
    if len(instances) != 1:
        names = ", ".join(server.name for server in instances) or "nothing"
        raise UsageError(
            f"serve: {servers.configuration.label} asks for {names}",
            f"start them: {doitw('up')}",
        )
    serving.run(
        servers.programs,
        instances[0],
        servers.names_context(instances[0].name),
        launch.not_started(servers, instances),
    )


def systemd(servers: Servers) -> None:
    """Print a unit of systemd that keeps the configuration up. Raises PipelineError."""
    if servers.set_overrides:
        raise UsageError(
            f"{', '.join(servers.set_overrides)} is set: a unit cannot hold it",
            "write it into the file",
        )
    requested, configuration = servers.requested, servers.configuration
    wrong = {"watch": requested.watch, "dry_run": requested.dry_run}
    if named := [f"{name}=1" for name in wrong if wrong[name]]:
        raise UsageError(f"{' '.join(named)}: a service keeps servers up", "leave it out")
    known = [spec.name for spec in configuration.enabled]
    require_known(requested.names, [*known, *([GATEWAY] if configuration.gateway.enable else [])])
    words = {**servers.words, "background": "0"}
    env = {name: str(absolute(os.environ[name])) for name in PATHS if os.environ.get(name)}
    kept = (*OF_PROFILES, CARDS) if requested.profile else ()
    env |= {name: os.environ[name] for name in kept if name in os.environ}
    times = [spec.control.stop_timeout for spec in configuration.enabled]
    print(
        unit.systemd_unit(
            configuration.label,
            [str(REPOSITORY / "doitw"), "up", *(f"{n}={v}" for n, v in words.items())],
            folder=user_folder(),
            env=env,
            stop_timeout=max(times, default=10.0),
        ),
        end="",
    )


def report(servers: Servers, server: Server, status: ServerStatus) -> None:
    """Log a change that a user waits for; of a server that is ready its summary, too."""
    reason = status.reason.partition("\n")[0].removesuffix(":")  # without lines of its log
    if status.state == PAUSING:
        log.info(f"{server.name}: restarting: {reason}")
    elif status.state == FAILED:
        log.info(f"{server.name}: failed: {reason}")
    if status.state == ASLEEP:
        by_hand = doitw(f"load name={server.name}")
        has_gateway = servers.configuration.gateway.enable
        way = "a request at the gateway loads it" if has_gateway else f"{by_hand} loads it"
        log.info(f"{server.name}: asleep; {status.problem or way}")
    if status.state != READY:
        return
    key = f", with the key in {server.api_key_file}" if server.api_key_file else ""
    log.info(f"{server.name}: ready at {server.shown_url}{key}")
    if server.engine == LLAMA_CPP:
        output = last_lines(Path(server.log_file), LOG_LINES)
        rows = summary(servers.programs, server, output, servers.names_context(server.name))
        for name in ("url", "key"):  # the line before has them
            rows.pop(name, None)
        log.info(textwrap.indent(table(list(rows.items())), "  "))


def stay(at: Folder, instances: Sequence[Server]) -> None:
    """Wait for the end of those that are not for the background; Ctrl-C stops them."""
    if not instances:
        return
    names = [server.name for server in instances]
    try:
        log.info(
            f"waiting for {', '.join(names)}; Ctrl-C stops {'them' if len(names) > 1 else 'it'}"
        )
        while there := liveness.living(at):
            statuses = [status for status in there.instances if status.name in names]
            if all(status.state in ENDED for status in statuses):
                break
            time.sleep(0.2)
    except KeyboardInterrupt:
        control.down(at, names)
        log.info("stopped")
        return
    if there is None:
        raise PipelineError("the supervisor is gone, and so are they", f"its log is {at.log}")
    if failed := [status for status in statuses if status.state == FAILED]:
        raise PipelineError("\n".join(f"{x.name} is failed: {x.reason}" for x in failed))
