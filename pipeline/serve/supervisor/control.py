"""The user's side of a configuration: up, down, and the same in the foreground.

They write the desired state and wait for the supervisor to reach it; there is no other channel to
it. Writers take turns, and a second `up` of the same configuration waits for the first.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from errno import EACCES, EROFS
from pathlib import Path

from msgspec.structs import replace

from pipeline.core import log
from pipeline.core.errors import PipelineError, doitw
from pipeline.core.store.locks import alone_with, file_lock, trouble
from pipeline.core.store.publish import FULL, disk_errors
from pipeline.serve.server import BOOT, GATEWAY, Server

from . import launch, marker, supervisor
from .environment import missing
from .liveness import LOCK_SECONDS, is_running, living
from .policy import Timing
from .state import (
    ASLEEP,
    ENDED,
    READY,
    SETTLED,
    STOPPED,
    DesiredState,
    Folder,
    Order,
    Report,
    ServerStatus,
    State,
    read_state,
    read_wanted,
    require_known,
    running_of,
    servers_of,
    statuses_of,
    write_wanted,
)

POLL_SECONDS = 0.05
GRACE_SECONDS = 5.0
UP = "instances that are up:"
EXIT_SECONDS = 1.0  # for the supervisor's process to be gone after it released its lock


def merged(at: Folder, wanted: DesiredState, names: Sequence[str]) -> DesiredState:
    """The desired state: `wanted`, or with `names` those servers of it in addition to what runs."""
    if not names:
        return wanted
    before, state = read_wanted(at), living(at)
    current = before.instances if before and (state or is_running(at)) else ()
    if before and state and state.asked == before.asked:
        current = tuple(server for server in current if server.name in running_of(state))
    kept = [server for server in current if server.name not in names]
    added = [server for server in wanted.instances if server.name in names]
    needs = {**(before.needs if before else {}), **wanted.needs}
    return replace(wanted, instances=(*kept, *added), needs=needs)


def changes(at: Folder, wanted: DesiredState) -> list[tuple[str, str]]:
    """What `up` would do: each name with start, keep, restart or stop."""
    old, state, new = servers_of(read_wanted(at)), living(at), servers_of(wanted)
    running = running_of(state)
    actions = []
    for name, server in new.items():
        if name not in running:
            actions.append((name, "start" if server.start == BOOT else "start on demand"))
        else:
            actions.append((name, "keep" if server.is_as(old.get(name)) else "restart"))
    removed = [name for name in statuses_of(state) if name in running and name not in new]
    return actions + [(name, "stop") for name in removed]


def up(
    at: Folder,
    wanted: DesiredState,
    *,
    report: Report,
    timing: Timing | None = None,
    names: Sequence[str] = (),
) -> list[tuple[Server, ServerStatus]]:
    """Bring the servers to the desired state, in the background; return once each is ready or has
    failed, and those that are no longer wanted are stopped. With `names` these are started in
    addition to what runs.

    `report` is called whenever a server is ready, has ended, or waits for its restart. Returns
    those that are neither ready nor asleep. After Ctrl-C, what was started keeps running. Raises
    PipelineError where no supervisor can run.
    """
    with alone(at.path / "up.lock", "another `up` of this configuration is running"):
        wanted = _publish(at, wanted, names)
        warn_of_outdated(at)
        state = living(at)
        if state and (variables := missing(state.pid, wanted.instances)):
            log.info(
                f"warning: the running supervisor was started without {', '.join(variables)}, "
                f"which downloading servers get from it; to pass them on: {doitw('down')}, then up"
            )
        try:
            return _wait_until_settled(at, wanted, report, timing or Timing())
        except KeyboardInterrupt:
            log.info(
                f"interrupted; what was started keeps running: {doitw('ps')} lists it, "
                f"{doitw('down')} stops it"
            )
            raise


def warn_of_outdated(at: Folder) -> None:
    """Say that the running supervisor is of an older version of this project, if it is."""
    state = living(at)
    if state and state.is_outdated:
        log.info(
            "warning: the running supervisor was started by an older version of this project and "
            f"ignores what is new; to replace it, with its servers: {doitw('down')}, then up"
        )


def run_foreground(
    at: Folder,
    wanted: DesiredState,
    *,
    report: Report,
    names: Sequence[str] = (),
) -> None:
    """Do as `up` in the foreground: be the supervisor until a signal or `down` ends it. With
    `names` only these servers.

    Returns once all are stopped. Call it in the main thread. Raises PipelineError where a
    supervisor is already running.
    """
    already_up = PipelineError(
        f"{wanted.config} is already up in the background", f"stop it first: {doitw('down')}"
    )
    if is_running(at):
        raise already_up
    _publish(at, wanted, names)
    if not supervisor.supervise(at, Timing(), report):
        raise already_up


def order(at: Folder, names: Sequence[str], *, loads: bool) -> int:
    """Have the servers of these names loaded, or unloaded; return the order's number, which their
    states will have. Raises UsageError where a name is unknown, PipelineError where none is up."""
    with alone(at.path / "wanted.lock"):
        wanted = read_wanted(at)
        if wanted is None or not is_running(at):
            raise PipelineError("nothing is up", f"start it first: {doitw('up config=…')}")
        known = [server.name for server in wanted.instances if server.engine != GATEWAY]
        require_known(names, known, UP)
        number = time.time_ns()
        given = dict.fromkeys(names, Order(loads=loads, number=number))
        write_wanted(at, replace(wanted, orders={**wanted.orders, **given}))
        return number


def obey(at: Folder, names: Sequence[str], *, loads: bool) -> list[tuple[str, ServerStatus]]:
    """Load or unload these servers, and wait until it is done; return those that were not loaded.
    Raises PipelineError where the supervisor ends meanwhile, or does not react."""
    number, done = order(at, names, loads=loads), dict[str, ServerStatus]()
    deadline = time.monotonic() + launch.REACTION_SECONDS
    while len(done) < len(names):
        if (state := living(at)) is None:
            raise PipelineError("the supervisor is gone, and so are they", f"its log is {at.log}")
        taken_up = [x for x in state.instances if x.name in names and x.order >= number]
        for status in taken_up:
            if _is_done(status, loads):
                done.setdefault(status.name, status)
        if len(taken_up) < len(names) and time.monotonic() > deadline:
            raise launch.hangs(at)
        time.sleep(POLL_SECONDS)
    return [(name, status) for name, status in done.items() if loads and status.state != READY]


def _is_done(status: ServerStatus, loads: bool) -> bool:
    if loads:
        return status.state in (READY, *ENDED) or bool(status.problem)
    return status.state in (ASLEEP, *ENDED)


def down(at: Folder, names: Sequence[str] = (), *, grace: float = GRACE_SECONDS) -> list[str]:
    """Stop the servers of these names, or all that are up; return their names.

    Where the supervisor is dead, or hangs for `grace` seconds beyond their stop_timeout, their
    processes are ended without it, and a message says so.
    Raises UsageError where a name is unknown.
    """
    if not at.path.exists():
        require_known(names, [], UP)
        return []
    with alone(at.path / "wanted.lock", needed=bool(names)):
        wanted, state = read_wanted(at), read_state(at)
        if wanted is None and names and is_running(at):
            raise PipelineError(
                f"{at.wanted}: missing or damaged, so the others would be stopped too",
                f"{doitw('up')} writes it anew; {doitw('down')} without name= stops all",
            )
        before = wanted or DesiredState(config="")
        known = list(servers_of(before) | statuses_of(state))
        require_known(names, known, UP)
        running = [name for name in known if not state or not _is_stopped(state, name)]
        ending = list(dict.fromkeys(names)) or running
        rest = tuple(x for x in before.instances if names and x.name not in names)
        if wanted is None or wanted.instances != rest:
            try:
                write_wanted(at, replace(before, instances=rest))
            except OSError as error:
                if rest:
                    raise
                log.info(f"{at.wanted}: {error.strerror}; stopping them by a signal")
                _signal_supervisor(at, kill=False)
    patience = max([x.stop_timeout for x in before.instances], default=10.0) + grace
    if not _stopped_in_time(at, before.asked, ending if rest else [], patience):
        log.info(f"the supervisor did not stop them within {patience:g} s; killing them")
        _signal_supervisor(at, kill=True)  # it hangs, and holds the lock
        marker.end_all(at, supervisor_too=True)
        if rest:
            launch.start(at, Timing())
    _end_leftovers(at)
    deadline = time.monotonic() + EXIT_SECONDS
    while not rest and not is_running(at) and living(at) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    return ending


def _stopped_in_time(at: Folder, asked: int, names: list[str], patience: float) -> bool:
    """Wait until these are stopped; without names, until the supervisor is gone."""
    deadline = time.monotonic() + patience
    while is_running(at):
        state, wanted = living(at), read_wanted(at)
        if wanted and wanted.asked != asked:
            log.info("another `up` was started meanwhile")
            return True
        if names and state and all(_is_stopped(state, name) for name in names):
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


def _is_stopped(state: State, name: str) -> bool:
    status = statuses_of(state).get(name)
    return status is None or status.state == STOPPED


def _signal_supervisor(at: Folder, *, kill: bool) -> None:
    """Ask the supervisor to stop, or kill it."""
    import psutil

    state = living(at)
    with suppress(psutil.Error):
        if state and state.pid != os.getpid():
            process = psutil.Process(state.pid)
            process.kill() if kill else process.terminate()


def _end_leftovers(at: Folder) -> None:
    """End what a killed supervisor left behind, unless another one has started."""
    from filelock import Timeout

    try:
        if trouble(at.path):
            raise OSError
        with file_lock(at.lock, mode=0o600).acquire(LOCK_SECONDS, 0.01):
            count = marker.end_all(at)
    except Timeout:
        return
    except OSError:  # a full or read-only disk, or one without locks
        count = 0 if living(at) else marker.end_all(at)
    if count:
        log.info(f"ended {count} processes that had no supervisor any more")


def _publish(at: Folder, wanted: DesiredState, names: Sequence[str]) -> DesiredState:
    """Write the desired state under a new number; return it."""
    with alone(at.path / "wanted.lock"):
        before, state = read_wanted(at), read_state(at)
        newest = max(before.asked if before else 0, state.asked if state else 0)
        number = max(newest + 1, time.time_ns())  # new even where both files are lost
        wanted = replace(merged(at, wanted, names), asked=number)
        write_wanted(at, wanted)
        return wanted


def _wait_until_settled(
    at: Folder, wanted: DesiredState, report: Report, timing: Timing
) -> list[tuple[Server, ServerStatus]]:
    """Wait until each server is ready or has ended, and those that are no longer wanted are
    stopped; see to it that there is a supervisor. Returns the servers that are not well."""
    watch = launch.SupervisorWatch(at, wanted, timing)
    reported: dict[str, ServerStatus] = {}
    while True:
        state, latest = living(at), read_wanted(at)
        if latest and latest.asked < wanted.asked:  # of an `up` at the same time, without locks
            write_wanted(at, wanted)
        for server, status in _news(wanted, latest, statuses_of(state), reported):
            reported[server.name] = status
            report(server, status)
        if _is_settled(wanted, state, reported):
            results = [(server, reported[server.name]) for server in wanted.instances]
            return [(server, status) for server, status in results if not _is_well(server, status)]
        watch.check(state)
        time.sleep(POLL_SECONDS)


def _is_settled(
    wanted: DesiredState, state: State | None, reported: Mapping[str, ServerStatus]
) -> bool:
    names = servers_of(wanted)
    others = [x for name, x in statuses_of(state).items() if name not in names]
    return all(x.state == STOPPED for x in others) and all(
        name in reported and reported[name].state in SETTLED for name in names
    )


def _news(
    wanted: DesiredState,
    latest: DesiredState | None,
    statuses: Mapping[str, ServerStatus],
    reported: Mapping[str, ServerStatus],
) -> Iterator[tuple[Server, ServerStatus]]:
    """What has changed of the wanted servers since it was reported."""
    for server in wanted.instances:
        now = statuses.get(server.name)
        if latest and server.name not in servers_of(latest):
            now = ServerStatus(name=server.name, state=STOPPED, asked=wanted.asked)
        if now and now.asked >= wanted.asked and reported.get(server.name) != now:
            yield server, now


def _is_well(server: Server, status: ServerStatus) -> bool:
    """Whether it is ready, or asleep as it should be."""
    is_refused = server.start == BOOT and status.problem
    return status.state == READY or (status.state == ASLEEP and not is_refused)


@contextmanager
def alone(lock: Path, waiting: str = "", *, needed: bool = True) -> Iterator[None]:
    """Hold a lock; log `waiting` once where another process holds it. Unless it is `needed`, go on
    without it where the disk takes no file."""
    with disk_errors(lock.parent), ExitStack() as held:
        lock.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _require_own(lock.parent)
        try:
            waits = f"{waiting}; waiting for it" if waiting else ""
            held.enter_context(alone_with(lock, waits, mode=0o600))
        except OSError as error:
            if needed or error.errno not in (EACCES, EROFS, *FULL):
                raise
        yield


def _require_own(folder: Path) -> None:
    """Raise PipelineError where another user owns the folder: users cannot see each other's
    processes, so a configuration belongs to one user."""
    if hasattr(os, "getuid") and folder.stat().st_uid != os.getuid():
        owner = str(folder.stat().st_uid)
        with suppress(KeyError):  # a number without a name
            owner = folder.owner()
        raise PipelineError(
            f"{folder} belongs to {owner}", f"run this as {owner}, or set LLAMA_PIPELINE_HOME"
        )
