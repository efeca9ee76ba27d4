"""The memory and processors available now, within a container's limits."""

from __future__ import annotations

import math
import os
from pathlib import Path

GROUP = Path("/sys/fs/cgroup")


def memory() -> int:
    """Bytes that a new process could allocate."""
    import psutil

    free = int(psutil.virtual_memory().available)
    try:
        limit = (GROUP / "memory.max").read_text(encoding="ascii").strip()
        if limit == "max":
            return free
        used = int((GROUP / "memory.current").read_text(encoding="ascii"))
        # Cached files count as used there; they are dropped when memory is needed.
        stat = dict(line.split() for line in (GROUP / "memory.stat").read_text().splitlines())
        return max(0, min(free, int(limit) - used + int(stat.get("inactive_file", 0))))
    except (OSError, ValueError):
        return free


def processors() -> int:
    """How many threads can compute at the same time."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        quota, period = (GROUP / "cpu.max").read_text(encoding="ascii").split()
        return max(1, min(count or 1, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # none, or "max"
        return count or 1
