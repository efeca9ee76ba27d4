"""Which processes belong to a configuration: a variable in their environment marks them.

It is inherited, so it also finds processes that moved to another group or session, or lost their
parent. `traces` finds those that have cleared it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable

import psutil

from . import traces
from .state import VARIABLE as VARIABLE
from .state import Folder, read_state, statuses_of
from .traces import is_ours

PATIENCE = 2.0  # seconds, for what is killed to be gone
Processes = dict[str, list[psutil.Process]]  # by the variable's value


def server(at: Folder, name: str) -> str:
    """The variable's value in the processes of a server; the supervisor's has no name in it."""
    return f"{at.marker}/{name}"


def everywhere() -> dict[str, Processes]:
    """All marked processes of this user, by the configuration's marker."""
    by_marker: dict[str, Processes] = {}
    with contextlib.suppress(OSError):  # too many open files
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if is_ours(process) and (value := traces.value(process)):
                    processes = by_marker.setdefault(value.partition("/")[0], {})
                    processes.setdefault(value, []).append(process)
    return by_marker


def marked(at: Folder) -> Processes:
    """The marked processes of one configuration. A server whose environment cannot be read (it may
    have rights that we lack) is recognised by the state that the supervisor wrote."""
    processes = everywhere().get(at.marker, {})
    for name, status in statuses_of(read_state(at)).items():
        value = server(at, name)
        process = find(status.pid, status.started, value)
        with contextlib.suppress(psutil.Error):
            known = processes.get(value, [])  # by pid: psutil may cache a process of a reused pid
            if process and process.pid not in [other.pid for other in known] and is_ours(process):
                processes[value] = [*known, process]
    return processes


def end(at: Folder, which: Callable[[str], bool], spare: Iterable[int] = ()) -> int:
    """Kill every process for whose value of the variable `which` is true, until none is left.
    Returns how many there were."""
    ended: set[int] = set()
    deadline, kept = time.monotonic() + PATIENCE, set(spare)
    while time.monotonic() < deadline:
        groups = [group for value, group in marked(at).items() if which(value)]
        processes = [process for group in groups for process in group if process.pid not in kept]
        if not processes:
            break
        for process in processes:
            with contextlib.suppress(psutil.Error):
                process.kill()  # psutil compares the start time first: pids are reused
                ended.add(process.pid)
        time.sleep(0.02)
    return len(ended)


def end_all(at: Folder, *, supervisor_too: bool = False, spare: Iterable[int] = ()) -> int:
    """Kill every server of a configuration; with `supervisor_too` its supervisor and reaper too.
    Returns how many processes there were."""
    count = end(at, lambda value: supervisor_too or "/" in value, spare)
    traces.forget(at)
    return count


def start_time(pid: int) -> float:
    """When a process began, in seconds since 1970."""
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).create_time()
    return time.time()


def find(pid: int | None, started: float | None, value: str) -> psutil.Process | None:
    """The process `pid`, if it is alive and started at `started`, or has the variable's `value`:
    setting the clock shifts all start times."""
    with contextlib.suppress(psutil.Error, OSError):
        process = psutil.Process(pid) if pid and started else None
        if process and process.status() != psutil.STATUS_ZOMBIE:
            apart = abs(process.create_time() - (started or 0))
            return process if apart < 2 or traces.value(process) == value else None
    return None
