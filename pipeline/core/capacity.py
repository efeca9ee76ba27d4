"""The memory and processors available now, within a container's limits."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from pathlib import Path

GROUP = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")
# Control groups, version 2 and version 1: the limit, what is used, and which line of memory.stat
# counts cached files that are dropped when memory is needed. Version 1 says "no limit" by a limit
# larger than the machine.
MEMORY = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)


def memory(*, with_files: bool = False) -> int:
    """Bytes that a new process could allocate. `with_files`: those too that hold files which are in
    use, such as the weights of models; the system drops them where it has to."""
    free = _available()
    for limit, used, stat, cached in MEMORY:
        with suppress(OSError, ValueError):  # another version's, or no limit: "max"
            lines = dict(line.split() for line in _read(stat).splitlines())
            room = int(_read(limit)) - int(_read(used)) + int(lines.get(cached, 0))
            if with_files:
                room += int(lines.get(cached.replace("inactive", "active"), 0))
            return max(0, min(free, room))
    return free


def total() -> int:
    """Bytes of memory that all processes together may have."""
    import psutil

    total = int(psutil.virtual_memory().total)
    for limit, *_ in MEMORY:
        with suppress(OSError, ValueError):  # another version's, or no limit: "max"
            return min(total, int(_read(limit)))
    return total


def _available() -> int:
    """Available memory in bytes. Linux has it in a file, and psutil is slow to load; but in some
    containers the file says more than there is, which psutil corrects."""
    with suppress(OSError, ValueError, KeyError):
        lines = (line.split() for line in MEMINFO.read_text(encoding="ascii").splitlines())
        kilobytes = {name: int(value) for name, value, *_ in lines}
        if kilobytes["MemAvailable:"] <= kilobytes["MemTotal:"]:
            return kilobytes["MemAvailable:"] * 1024
    import psutil

    return int(psutil.virtual_memory().available)


def processors() -> int:
    """How many threads can compute at the same time."""
    affine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    count = affine or 1
    try:
        quota, period = map(int, _quota().split())
    except (OSError, ValueError):  # none, or "max"
        return count
    return max(1, min(count, math.ceil(quota / period))) if quota > 0 else count


def _quota() -> str:
    """Microseconds of computing time in each period, and the period."""
    try:
        return _read("cpu.max")
    except OSError:
        return f"{_read('cpu/cpu.cfs_quota_us')} {_read('cpu/cpu.cfs_period_us')}"


def _read(file: str) -> str:
    return (GROUP / file).read_text(encoding="ascii").strip()
