"""Running programs: each is shown first, logged, and never left behind.

`spawn` starts them, `lifetime` ends a child with this process, `stop` ends one, `watchdog` ends one
that hangs.
"""

from __future__ import annotations

from .spawn import (
    LAST_LINES,
    WINDOWS,
    Process,
    allow_many_files,
    attached,
    become,
    capture,
    last_lines,
    lines_of,
    outcome,
    private,
    run,
    shown,
    start,
    start_attached,
    start_detached,
)

__all__ = [
    "LAST_LINES",
    "WINDOWS",
    "Process",
    "allow_many_files",
    "attached",
    "become",
    "capture",
    "last_lines",
    "lines_of",
    "outcome",
    "private",
    "run",
    "shown",
    "start",
    "start_attached",
    "start_detached",
]
