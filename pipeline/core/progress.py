"""Progress of long work: a bar on a terminal, a line at every tenth elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .say import say

Update = Callable[[float, float], None]


@contextmanager
def bar(title: str) -> Iterator[Update]:
    """Yield `update(done, total)`, in any unit."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            Progress,
            TaskProgressColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        progress = Progress(*columns, console=Console(stderr=True), transient=True)
        task = progress.add_task(title, total=None)

        def show(done: float, total: float) -> None:
            # Only now, so that what is printed before it stands as it was written.
            progress.start()
            progress.update(task, completed=done, total=total)

        try:
            yield show
        finally:
            progress.stop()
        return

    tenth = 0

    def update(done: float, total: float) -> None:
        nonlocal tenth
        reached = int(10 * done / total) if total else 0
        if reached > tenth:
            tenth = reached
            say(f"{title}: {10 * reached} %")

    yield update
