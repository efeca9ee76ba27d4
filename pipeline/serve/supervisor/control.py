"""What a user does to a configuration: up, down, and the same in the foreground.

They write what is wanted and wait for the supervisor to have made it so; there is no other way to
talk to it. Two that write take turns, and two `up` of one configuration wait for each other.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from errno import EACCES, ENOSPC, EROFS
from pathlib import Path

from pipeline.core import log
from pipeline.core.errors import PipelineError, UsageError, did_you_mean, doitw
from pipeline.core.paths import REPOSITORY
from pipeline.core.process import Process, last_lines, start_detached
from pipeline.core.store.publish import full_disk_is_an_error
from pipeline.serve.server import Server

from . import marker
from .environment import for_supervisor, missing
from .liveness import LOCK_SECONDS, is_running, living
from .policy import Timing
from .state import (
    ENDED,
    READY,
    SETTLED,
    STOPPED,
    STOPPING,
    DesiredState,
    Folder,
    Seen,
    by_name,
    read_state,
    read_wanted,
    write_wanted,
)

LOOK_SECONDS = 0.05
STARTS = 3  # of a supervisor that ends by itself
GRACE_SECONDS = 5.0
TAKEN_SECONDS = 10.0  # for a supervisor that lives to see what is wanted
EXIT_SECONDS = 1.0  # for the supervisor's process to be gone, once it has let go of its lock
Report = Callable[[Server, Seen], None]


def merged(at: Folder, wanted: DesiredState, names: Sequence[str]) -> DesiredState:
    """What `wanted` comes to: with names, those of it beside what runs already."""
    if not names:
        return wanted
    before, state = read_wanted(at), living(at)
    there = before.instances if before and (state or is_running(at)) else ()
    if before and state and state.asked == before.asked:
        running = {one.name for one in state.instances if one.state not in ENDED}
        there = tuple(one for one in there if one.name in running)
    kept = [one for one in there if one.name not in names]
    return replace(
        wanted, instances=(*kept, *(one for one in wanted.instances if one.name in names))
    )


def changes(at: Folder, wanted: DesiredState) -> list[tuple[str, str]]:
    """What `up` would do: each name with start, keep, restart or stop."""
    before, state = read_wanted(at), living(at)
    old = by_name(before.instances) if before else {}
    seen = {one.name: one.state for one in state.instances} if state else {}
    over = {name for name, what in seen.items() if what in SETTLED and what != READY}
    told = []
    for new in wanted.instances:
        if new.name not in seen or new.name in over:
            told.append((new.name, "start"))
        else:
            told.append((new.name, "keep" if old.get(new.name) == new else "restart"))
    gone = [name for name in seen if name not in by_name(wanted.instances) and name not in over]
    return told + [(name, "stop") for name in gone]


def up(
    at: Folder,
    wanted: DesiredState,
    *,
    report: Report,
    pace: Timing | None = None,
    names: Sequence[str] = (),
) -> list[tuple[Server, Seen]]:
    """Make it so, in the background; return once each instance is ready, or is not to be, and
    what is wanted no more is stopped. With `names` these are started beside what runs.

    `report` is called whenever one is ready, has ended, or waits to be started again. Returns those
    that are not ready. Interrupted, it leaves what was started running, and says so. Raises
    PipelineError where there can be no supervisor.
    """
    with alone(at.path / "up.lock", "another `up` of this configuration is under way"):
        asked = _publish(at, wanted, names)
        there = living(at)
        if there and (lacks := missing(there.pid, asked.instances)):
            log.info(
                f"warning: the running supervisor was started without {', '.join(lacks)}, which "
                f"downloading servers get from it; to pass them on: {doitw('down')}, then up"
            )
        try:
            return _settled(at, asked, report, pace or Timing())
        except KeyboardInterrupt:
            log.info(
                f"interrupted; what was started keeps running: {doitw('ps')} lists it, "
                f"{doitw('down')} stops it"
            )
            raise


def run_foreground(
    at: Folder,
    wanted: DesiredState,
    *,
    report: Report,
    pace: Timing | None = None,
    names: Sequence[str] = (),
) -> None:
    """Make it so and stay, as the supervisor, until a signal or `down` ends it. With `names` only
    these of it.

    Returns once all is stopped. Call it in the main thread. Raises PipelineError where a supervisor
    runs already.
    """
    from .supervisor import supervise

    taken = PipelineError(
        f"{wanted.config} is already up in the background", f"stop it first: {doitw('down')}"
    )
    if is_running(at):
        raise taken
    _publish(at, wanted, names)
    if not supervise(at, pace or Timing(), report):
        raise taken


def down(at: Folder, names: Sequence[str] = (), *, grace: float = GRACE_SECONDS) -> list[str]:
    """Stop the instances of these names, or all that are up; return their names.

    Where the supervisor is dead, or hangs for `grace` seconds beyond their stop_timeout, their
    processes are ended without it, and that is said.
    Raises UsageError where a name is unknown.
    """
    if not at.path.exists():
        _require_known(names, [])
        return []
    with alone(at.path / "wanted.lock", needed=bool(names)):
        told, state = read_wanted(at), read_state(at)
        if told is None and names and is_running(at):
            raise PipelineError(
                f"{at.wanted}: missing or damaged, so the others would be stopped too",
                f"{doitw('up')} writes it anew; {doitw('down')} without name= stops all",
            )
        before = told or DesiredState(config="")
        seen = {one.name: one.state for one in state.instances} if state else {}
        known = dict.fromkeys([*by_name(before.instances), *seen])
        _require_known(names, list(known))
        there = [x for x in known if not state or seen.get(x, STOPPED) != STOPPED]
        ending = list(dict.fromkeys(names)) or there
        rest = tuple(one for one in before.instances if names and one.name not in names)
        if told is None or told.instances != rest:
            try:
                write_wanted(at, replace(before, instances=rest))
            except OSError as error:
                if rest:
                    raise
                log.info(f"{at.wanted}: {error.strerror}; a signal stops them")
                _signal_supervisor(at, kill=False)
    patience = max([one.stop_timeout for one in before.instances], default=10.0) + grace
    if not _stopped_in_time(at, before.asked, ending if rest else [], patience):
        log.info(f"the supervisor did not stop them in {patience:g} s; they are ended without it")
        _signal_supervisor(at, kill=True)  # it holds the lock and does nothing
        marker.end_all(at, keepers=True)
        if rest:
            _start_supervisor(at, Timing())
    _end_leftovers(at)
    deadline = time.monotonic() + EXIT_SECONDS
    while not rest and not is_running(at) and living(at) and time.monotonic() < deadline:
        time.sleep(LOOK_SECONDS)
    return ending


def _require_known(names: Sequence[str], known: list[str]) -> None:
    wrong = [f"name={x}: there is no such instance{did_you_mean(x, known)}" for x in names]
    wrong = [text for text, name in zip(wrong, names, strict=True) if name not in known]
    if wrong:
        listed = ", ".join(known) or "none"
        raise UsageError("\n".join(wrong), f"the instances that are up: {listed}")


def _stopped_in_time(at: Folder, asked: int, names: list[str], patience: float) -> bool:
    """Wait until these are stopped, or without names until the supervisor is gone."""
    deadline = time.monotonic() + patience
    while is_running(at):
        state, wanted = living(at), read_wanted(at)
        if wanted and wanted.asked != asked:
            log.info("another `up` has begun meanwhile")
            return True
        seen = {one.name: one.state for one in state.instances} if state else {}
        if names and state and all(seen.get(name, STOPPED) == STOPPED for name in names):
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(LOOK_SECONDS)
    return True


def _signal_supervisor(at: Folder, *, kill: bool) -> None:
    """Ask it to stop, or kill it."""
    import psutil

    state = living(at)
    with suppress(psutil.Error):
        if state and state.pid != os.getpid():
            process = psutil.Process(state.pid)
            process.kill() if kill else process.terminate()


def _end_leftovers(at: Folder) -> None:
    """End what a killed supervisor left, unless another one has begun."""
    from filelock import FileLock, Timeout

    try:
        with FileLock(at.lock, mode=0o600).acquire(LOCK_SECONDS, 0.01):
            count = marker.end_all(at)
    except Timeout:
        return
    except OSError:  # a full disk, or one that takes nothing
        count = 0 if living(at) else marker.end_all(at)
    if count:
        log.info(f"ended {count} processes that were left without a supervisor")


def _publish(at: Folder, wanted: DesiredState, names: Sequence[str]) -> DesiredState:
    """Write what is wanted, under a number of its own; return that."""
    with alone(at.path / "wanted.lock"):
        before, state = read_wanted(at), read_state(at)
        newest = max(before.asked if before else 0, state.asked if state else 0)
        asked = max(newest + 1, time.time_ns())  # another one even where both files are lost
        wanted = replace(merged(at, wanted, names), asked=asked)
        write_wanted(at, wanted)
        return wanted


def _settled(
    at: Folder, wanted: DesiredState, report: Report, pace: Timing
) -> list[tuple[Server, Seen]]:
    """Wait until each has become what it will be; see to it that there is a supervisor."""
    told: dict[str, Seen] = {}
    supervisor: Process | None = None
    starts, taken = 0, time.monotonic()
    while True:
        state, still = living(at), read_wanted(at)
        seen = {one.name: one for one in state.instances} if state else {}
        for one in wanted.instances:
            now = seen.get(one.name)
            if still and one.name not in by_name(still.instances):
                now = Seen(name=one.name, state=STOPPED, asked=wanted.asked)
            if now and now.asked >= wanted.asked and told.get(one.name) != now:
                told[one.name] = now
                report(one, now)
        ours = by_name(wanted.instances)
        stopping = any(x.state != STOPPED for name, x in seen.items() if name not in ours)
        if all(name in told and told[name].state in SETTLED for name in ours) and not stopping:
            break
        ended = supervisor is None or supervisor.poll() is not None
        is_behind = state is None or state.asked < wanted.asked
        if not is_behind or any(one.state == STOPPING for one in seen.values()):
            taken = time.monotonic()
        elif time.monotonic() > taken + TAKEN_SECONDS and is_running(at):
            raise PipelineError(
                f"the supervisor does not take it up; its log is {at.log}",
                f"{doitw('down')}, then up again",
            )
        if state is None and ended and not is_running(at):
            if starts == STARTS:
                said = last_lines(at.log)
                raise PipelineError(f"the supervisor ended by itself:\n{said}", f"see {at.log}")
            starts += 1
            supervisor = _start_supervisor(at, pace)
        time.sleep(LOOK_SECONDS)
    return [(one, told[one.name]) for one in wanted.instances if told[one.name].state != READY]


def _start_supervisor(at: Folder, pace: Timing) -> Process:
    words = [sys.executable, "-m", "pipeline.serve.supervisor.supervisor", str(at.path)]
    wanted = read_wanted(at)
    env = for_supervisor(os.environ, wanted.instances if wanted else ())
    env |= {marker.VARIABLE: at.marker}
    return start_detached([*words, json.dumps(asdict(pace))], log=at.log, env=env, cwd=REPOSITORY)


@contextmanager
def alone(lock: Path, waiting: str = "", *, needed: bool = True) -> Iterator[None]:
    """Hold a lock; say `waiting` once where another process holds it. One that is not `needed` is
    done without where the disk takes none."""
    from filelock import FileLock, Timeout

    with full_disk_is_an_error(lock.parent):
        lock.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _require_own(lock.parent)
        held = FileLock(lock, mode=0o600)
        try:
            held.acquire(timeout=0 if waiting else -1)
        except Timeout:
            log.info(f"{waiting}; waiting for it")
            held.acquire()
        except OSError as error:
            if needed or error.errno not in (EACCES, ENOSPC, EROFS):
                raise
        try:
            yield
        finally:
            held.release()


def _require_own(folder: Path) -> None:
    """Two users would not see each other's processes."""
    if hasattr(os, "getuid") and folder.stat().st_uid != os.getuid():
        owner = str(folder.stat().st_uid)
        with suppress(KeyError):  # a number without a name
            owner = folder.owner()
        raise PipelineError(
            f"{folder} belongs to {owner}", f"do it as {owner}, or set LLAMA_PIPELINE_HOME"
        )
