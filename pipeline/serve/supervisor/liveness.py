"""Whether a configuration has a supervisor, by its lock and by the state that it wrote."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import EROFS
from pathlib import Path

from pipeline.core.errors import PipelineError
from pipeline.core.process import private
from pipeline.core.store.locks import file_lock, trouble
from pipeline.core.store.publish import FULL
from pipeline.serve.guard.port import OwnPort, taken
from pipeline.serve.server import Server

from . import marker
from .state import (
    ENDED,
    Folder,
    State,
    read_state,
    read_wanted,
    running_of,
    servers_of,
    statuses_of,
)

MODULE = "pipeline.serve.supervisor.supervisor"  # what a supervisor's process runs
OTHERS_SECONDS = 5.0  # others probe the lock for an instant; only a supervisor holds it longer
LOCK_SECONDS = 0.03  # so that two who probe the lock do not take each other for a supervisor


def is_running(at: Folder) -> bool:
    """Whether a supervisor holds the lock."""
    from filelock import Timeout

    if not at.lock.exists():
        return False
    try:
        if trouble(at.path):
            return living(at) is not None or bool(_supervisors(at))
        with file_lock(at.lock, mode=0o600).acquire(LOCK_SECONDS, 0.01):
            return False
    except Timeout:
        return True
    except OSError as error:
        if error.errno in (EROFS, *FULL):
            return living(at) is not None
        raise PipelineError(f"{at.lock}: {error.strerror}", "move it out of the way") from None


@contextmanager
def only_supervisor(at: Folder) -> Iterator[bool]:
    """Hold the supervisor's lock while the block runs. Yields whether no other process does."""
    from filelock import Timeout

    if trouble(at.path):
        oldest = _supervisors(at)[:1]  # of some that start at once, before their first state
        if living(at) or oldest not in ([], [os.getpid()]):
            yield False
            return
        with open(at.lock, "ab", opener=private):  # by which `living` knows one in the foreground
            yield True
        return
    lock = file_lock(at.lock, mode=0o600)
    try:
        lock.acquire(OTHERS_SECONDS)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def is_replaced(at: Folder, lock: int) -> bool:
    """Whether the folder was removed, and with it the supervisor's lock, of the inode `lock`:
    another supervisor may start."""
    try:
        return at.lock.stat().st_ino != lock
    except FileNotFoundError:
        return True
    except OSError:  # an error of the disk itself
        return False


def living(at: Folder) -> State | None:
    """The state that the supervisor last wrote, if that supervisor is alive. One in the foreground
    has no marker, so after a change of the clock it is recognised by its lock."""
    state = read_state(at)
    is_alive = state and (
        marker.find(state.pid, state.started, at.marker) or has_open(state.pid, at.lock)
    )
    return state if is_alive else None


def suspended(at: Folder) -> int | None:
    """The pid of the supervisor, if it is suspended (SIGSTOP, Ctrl-Z): it restarts nothing then."""
    import psutil

    state = living(at)
    with suppress(psutil.Error):
        if state and psutil.Process(state.pid).status() == psutil.STATUS_STOPPED:
            return state.pid
    return None


def _supervisors(at: Folder) -> list[int]:
    """The pids of the marked processes that run a supervisor in the background, oldest first."""
    import psutil

    found = []
    for process in marker.marked(at).get(at.marker, []):
        with suppress(psutil.Error):
            if MODULE in process.cmdline():
                found.append((process.create_time(), process.pid))
    return [pid for _, pid in sorted(found)]


def is_left(at: Folder) -> bool:
    """Whether a wanted server was running when the supervisor last wrote its state."""
    return not running_of(read_state(at)).isdisjoint(servers_of(read_wanted(at)))


def running_elsewhere(at: Folder) -> Iterator[tuple[Server, str]]:
    """The servers of other configurations that have not ended, each with its configuration."""
    for path in sorted(at.path.parent.glob("*/wanted.json")):
        other = Folder(path.parent)
        wanted = read_wanted(other)
        if other == at or wanted is None or not is_running(other):
            continue
        statuses = statuses_of(read_state(other))
        for server in wanted.instances:
            if server.name not in statuses or statuses[server.name].state not in ENDED:
                yield server, wanted.config


def port_for(instance: Server, at: Folder, before: OwnPort | None) -> OwnPort:
    """The port for a start; a guarded one is kept from the start `before`. Raises PipelineError
    where its folder is missing or the port is in use, perhaps by a server of another
    configuration."""
    if not Path(instance.folder).is_dir():
        raise PipelineError(f"{instance.folder}: there is no such folder")
    if before and instance.guard:
        return before
    try:
        return taken(instance)
    except PipelineError:
        for other, config in running_elsewhere(at):
            if other.port == instance.port:
                message = f"port {other.port} is taken by {other.name} of {config}, which is up"
                raise PipelineError(message) from None
        raise


def has_open(pid: int, path: Path) -> bool:
    """Whether the process `pid` is alive and has that file open."""
    import psutil

    with suppress(psutil.Error, OSError):
        return any(path.samefile(file.path) for file in psutil.Process(pid).open_files())
    return False
