"""The memory and processors available now, within the limits of a container, a service or a job."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

GROUP = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")
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
    for files in MEMORY:
        cached = files[-1]
        for limit, used, stat in _of_groups(*files[:-1]):
            with suppress(OSError, ValueError):  # another version's, or no limit: "max"
                lines = dict(line.split() for line in _read(stat).splitlines())
                room = int(_read(limit)) - int(_read(used)) + int(lines.get(cached, 0))
                if with_files:
                    room += int(lines.get(cached.replace("inactive", "active"), 0))
                free = min(free, room)
    return max(0, free)


def total() -> int:
    """Bytes of memory that all processes together may have."""
    import psutil

    total = int(psutil.virtual_memory().total)
    for file, *_ in MEMORY:
        for (limit,) in _of_groups(file):
            with suppress(OSError, ValueError):  # another version's, or no limit: "max"
                total = min(total, int(_read(limit)))
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
    for quota, period in _quotas():
        count = max(1, min(count, math.ceil(quota / period))) if quota > 0 else count
    return count


def _quotas() -> Iterator[tuple[int, int]]:
    """Microseconds of computing time in each period, and the period."""
    for (both,) in _of_groups("cpu.max"):
        with suppress(OSError, ValueError):  # none, or "max"
            quota, period = map(int, _read(both).split())
            yield quota, period
    for files in _of_groups("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"):
        with suppress(OSError, ValueError):
            quota, period = (int(_read(file)) for file in files)
            yield quota, period


def _of_groups(*files: str) -> Iterator[tuple[Path, ...]]:
    """Files of the process's control group and of each above it, whose limits hold too: those of a
    unit of systemd's or a job of Slurm's stand deep in the tree, a container's at its top."""
    controller = str(Path(files[0]).parent)  # a folder of version 1; `.` for version 2
    top = GROUP / controller
    own = PurePosixPath(_own_groups().get(controller, "/"))
    inside = own.relative_to("/") if ".." not in own.parts else PurePosixPath()
    for folder in dict.fromkeys((inside, *inside.parents, PurePosixPath())):
        yield tuple(top / folder / Path(file).name for file in files)


def _own_groups() -> dict[str, str]:
    """The paths of the process's groups, by their folder."""
    groups: dict[str, str] = {}
    with suppress(OSError):
        for line in OWN_GROUPS.read_text(encoding="utf-8", errors="replace").splitlines():
            _, controllers, path = line.split(":", 2)
            groups |= dict.fromkeys(controllers.split(",") if controllers else ["."], path)
    return groups


def _read(file: Path) -> str:
    return file.read_text(encoding="ascii").strip()
