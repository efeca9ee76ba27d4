"""What this machine has to give right now, a container's limits included."""

from __future__ import annotations

import math
import os
from pathlib import Path

GROUP = Path("/sys/fs/cgroup")


def memory() -> int:
    """Bytes that a new process could have."""
    import psutil

    free = int(psutil.virtual_memory().available)
    try:
        limit = (GROUP / "memory.max").read_text(encoding="ascii").strip()
        if limit == "max":
            return free
        used = int((GROUP / "memory.current").read_text(encoding="ascii"))
        # Files read lately count as used there, and give way when memory is asked for.
        told = dict(line.split() for line in (GROUP / "memory.stat").read_text().splitlines())
        return max(0, min(free, int(limit) - used + int(told.get("inactive_file", 0))))
    except (OSError, ValueError):
        return free


def processors() -> int:
    """How many programs can compute at the same time."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        quota, period = (GROUP / "cpu.max").read_text(encoding="ascii").split()
        return max(1, min(count or 1, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # none, or "max"
        return count or 1
