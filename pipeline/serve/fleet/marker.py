"""Which processes belong to a configuration: a variable in their environment says it.

It is inherited, so it also finds what moved to another group or session, or lost its parent.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil

from .state import Folder, read_state

VARIABLE = "LLAMA_PIPELINE_FLEET"
PATIENCE = 2.0  # seconds, for what is killed to be gone


def server(marker: str, name: str) -> str:
    """The variable's value in the processes of the instance `name`; the supervisor's own and its
    warden's is `marker` alone."""
    return f"{marker}/{name}"


def everywhere() -> dict[str, list[psutil.Process]]:
    """The living processes of all configurations and of this user, by the variable's value."""
    found: dict[str, list[psutil.Process]] = {}
    with contextlib.suppress(OSError):  # no file can be opened any more
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if (value := _value(process)) and _is_ours(process):
                    found.setdefault(value, []).append(process)
    return found


def marked(marker: str) -> dict[str, list[psutil.Process]]:
    """Those of one configuration."""
    return {value: them for value, them in everywhere().items() if of(value) == marker}


def of(value: str) -> str:
    """The configuration's marker in the variable's value."""
    return value.partition("/")[0]


def end(marker: str, which: Callable[[str], bool], spare: Iterable[int] = ()) -> int:
    """Kill every process whose value of the variable is one of `which`, until none is left.

    Returns how many there were.
    """
    ended: set[int] = set()
    deadline, kept = time.monotonic() + PATIENCE, set(spare)
    while time.monotonic() < deadline:
        found = [
            process
            for value, processes in marked(marker).items()
            for process in processes
            if which(value) and process.pid not in kept
        ]
        if not found:
            break
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.kill()  # psutil looks at the start time first: numbers are used again
                ended.add(process.pid)
        time.sleep(0.02)
    return len(ended)


def end_all(at: Folder, *, keepers: bool = False, spare: Iterable[int] = ()) -> int:
    """Kill every server of a configuration, with `keepers` the supervisor and the warden too.

    A server whose environment cannot be read is known by what the supervisor wrote of it. Returns
    how many there were.
    """
    count = end(at.marker, lambda value: keepers or "/" in value, spare)
    state = read_state(at)
    for one in state.instances if state else ():
        if is_it(one.pid, one.started, server(at.marker, one.name)):
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(one.pid)
                if _is_ours(process):
                    process.kill()
                    count += 1
    return count


def start_time(pid: int) -> float:
    """When a process began, in seconds since 1970."""
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).create_time()
    return time.time()


def is_it(pid: int | None, started: float | None, value: str) -> bool:
    """Whether the process `pid` lives and is the one that began at `started`, or has the
    variable's `value`: a clock that was set moves all start times."""
    if pid is None or started is None:
        return False
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return abs(process.create_time() - started) < 2 or _value(process) == value
    except (psutil.Error, OSError):
        return False


def has_open(pid: int, path: Path) -> bool:
    """Whether the process `pid` lives and has that file open."""
    with contextlib.suppress(psutil.Error, OSError):
        return any(path.samefile(one.path) for one in psutil.Process(pid).open_files())
    return False


def _value(process: psutil.Process) -> str:
    return str(process.environ().get(VARIABLE, ""))


def _is_ours(process: psutil.Process) -> bool:
    return not hasattr(os, "getuid") or process.uids().real == os.getuid()
