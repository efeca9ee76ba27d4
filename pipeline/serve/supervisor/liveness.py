"""Whether a configuration has a supervisor, by its lock and by what it wrote of itself."""

from __future__ import annotations

from contextlib import suppress
from errno import ENOSPC, EROFS
from pathlib import Path

from pipeline.core.errors import PipelineError

from . import marker
from .state import ENDED, Folder, State, by_name, read_state, read_wanted

LOCK_SECONDS = 0.03  # two that look at a lock do not take each other for a supervisor


def is_running(at: Folder) -> bool:
    """Whether a supervisor holds the lock."""
    from filelock import FileLock, Timeout

    if not at.lock.exists():
        return False
    try:
        with FileLock(at.lock, mode=0o600).acquire(LOCK_SECONDS, 0.01):
            return False
    except Timeout:
        return True
    except OSError as error:
        if error.errno in (EROFS, ENOSPC):
            return living(at) is not None
        raise PipelineError(f"{at.lock}: {error.strerror}", "move it out of the way") from None


def living(at: Folder) -> State | None:
    """What the supervisor last wrote, if it is the one that lives. One in the foreground carries no
    marker, so where the clock was set it is known by its lock."""
    state = read_state(at)
    is_it = state and (
        marker.find(state.pid, state.started, at.marker) or has_open(state.pid, at.lock)
    )
    return state if is_it else None


def is_left(at: Folder) -> bool:
    """Whether something that is wanted was there when the supervisor last wrote."""
    wanted, state = read_wanted(at), read_state(at)
    names = by_name(wanted.instances) if wanted else {}
    return any(x.name in names and x.state not in ENDED for x in (state.instances if state else ()))


def has_open(pid: int, path: Path) -> bool:
    """Whether the process `pid` lives and has that file open."""
    import psutil

    with suppress(psutil.Error, OSError):
        return any(path.samefile(one.path) for one in psutil.Process(pid).open_files())
    return False
