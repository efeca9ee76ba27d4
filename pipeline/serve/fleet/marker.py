"""Which processes belong to a configuration: a variable in their environment says it.

It is inherited, so it also finds what moved to another group or session, or lost its parent.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable

import psutil

VARIABLE = "LLAMA_PIPELINE_FLEET"
PATIENCE = 2.0  # seconds, for what is killed to be gone


def server(marker: str, name: str) -> str:
    """The variable's value in the processes of the instance `name`; the supervisor's own and its
    warden's is `marker` alone."""
    return f"{marker}/{name}"


def marked(marker: str) -> dict[str, list[psutil.Process]]:
    """The living processes of a configuration and of this user, by the variable's value."""
    found: dict[str, list[psutil.Process]] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            value = _value(process)
            if value.partition("/")[0] == marker and _is_ours(process):
                found.setdefault(value, []).append(process)
    return found


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


def end_servers(marker: str) -> int:
    """Kill every server of a configuration."""
    return end(marker, lambda value: "/" in value)


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


def _value(process: psutil.Process) -> str:
    return str(process.environ().get(VARIABLE, ""))


def _is_ours(process: psutil.Process) -> bool:
    return not hasattr(os, "getuid") or process.uids().real == os.getuid()
