"""Which processes belong to a configuration: a variable in their environment says it.

It is inherited, so it also finds what moved to another group or session, or lost its parent.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable

import psutil

from .state import Folder, read_state

VARIABLE = "LLAMA_PIPELINE_FLEET"
PATIENCE = 2.0  # seconds, for what is killed to be gone
Found = dict[str, list[psutil.Process]]  # by the variable's value


def server(marker: str, name: str) -> str:
    """The variable's value in the processes of the instance `name`; the supervisor's own and its
    warden's is `marker` alone."""
    return f"{marker}/{name}"


def everywhere() -> dict[str, Found]:
    """The living processes of this user, by the configuration's marker."""
    found: dict[str, Found] = {}
    with contextlib.suppress(OSError):  # no file can be opened any more
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if (value := _value(process)) and _is_ours(process):
                    of_one = found.setdefault(value.partition("/")[0], {})
                    of_one.setdefault(value, []).append(process)
    return found


def marked(at: Folder) -> Found:
    """Those of one configuration. A server whose environment cannot be read (it may have rights
    that we lack) is known by what the supervisor wrote of it."""
    found, state = everywhere().get(at.marker, {}), read_state(at)
    for one in state.instances if state else ():
        value = server(at.marker, one.name)
        process = find(one.pid, one.started, value)
        with contextlib.suppress(psutil.Error):
            here = found.get(value, [])  # psutil may have kept one whose number was used before
            if process and process.pid not in [other.pid for other in here] and _is_ours(process):
                found[value] = [*here, process]
    return found


def end(at: Folder, which: Callable[[str], bool], spare: Iterable[int] = ()) -> int:
    """Kill every process whose value of the variable is one of `which`, until none is left.

    Returns how many there were.
    """
    ended: set[int] = set()
    deadline, kept = time.monotonic() + PATIENCE, set(spare)
    while time.monotonic() < deadline:
        meant = [them for value, them in marked(at).items() if which(value)]
        found = [one for them in meant for one in them if one.pid not in kept]
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

    Returns how many there were.
    """
    return end(at, lambda value: keepers or "/" in value, spare)


def start_time(pid: int) -> float:
    """When a process began, in seconds since 1970."""
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).create_time()
    return time.time()


def find(pid: int | None, started: float | None, value: str) -> psutil.Process | None:
    """The process `pid`, if it lives and is the one that began at `started`, or has the variable's
    `value`: a clock that was set moves all start times."""
    with contextlib.suppress(psutil.Error, OSError):
        process = psutil.Process(pid) if pid and started else None
        if process and process.status() != psutil.STATUS_ZOMBIE:
            is_it = abs(process.create_time() - (started or 0)) < 2 or _value(process) == value
            return process if is_it else None
    return None


def _value(process: psutil.Process) -> str:
    return str(process.environ().get(VARIABLE, ""))


def _is_ours(process: psutil.Process) -> bool:
    return not hasattr(os, "getuid") or process.uids().real == os.getuid()
