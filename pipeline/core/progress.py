"""Progress of long work: a bar on a terminal, elsewhere a line for every tenth."""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from . import log
from .text import size

Update = Callable[[float, float], None]
PATIENCE = 1.0
WINDOW = 20.0  # seconds over which the speed is taken


class Count(Protocol):
    """Count bytes as done, or with a minus as not done after all. `arrived=False`: they do not
    count for the speed."""

    def __call__(self, count: int, *, arrived: bool = True) -> None: ...


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
            # Only now, since a bar would disturb what is printed before the work starts.
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
            log.info(f"{title}: {10 * reached} %")

    yield update


@contextmanager
def transfer(title: str, total: int, patience: float = PATIENCE) -> Iterator[Count]:
    """Count bytes from any thread; shows how many are done, at what speed, and the time left.

    `patience` is the least seconds between two lines, where stderr is not a terminal.
    """
    rate = TransferRate(total)
    lock = threading.Lock()
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
        from rich.table import Column
        from rich.text import Text

        class TransferColumn(ProgressColumn):
            def render(self, task: Task) -> Text:  # at each refresh, so that a stall shows
                with lock:
                    return Text(", ".join(rate.summary(f"{size(rate.done)} of {size(total)}")))

        # The text needs most of a line of 80.
        summary = TransferColumn(table_column=Column(no_wrap=True))
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=16), summary)
        progress = Progress(*columns, console=Console(stderr=True), transient=True)
        task = progress.add_task(title, total=total)
        shown = 0.0

        def show(count: int, *, arrived: bool = True) -> None:
            nonlocal shown
            with lock:
                rate.count(count, arrived=arrived)
                now = time.monotonic()
                if now - shown < 0.1:
                    return
                shown = now
            progress.start()
            progress.update(task, completed=rate.done)

        try:
            yield show
        finally:
            progress.stop()
        return

    tenth, last_line = 0, time.monotonic()

    def write(count: int, *, arrived: bool = True) -> None:
        nonlocal tenth, last_line
        with lock:
            rate.count(count, arrived=arrived)
            reached = 10 * rate.done // total if total else 0
            now = time.monotonic()
            # Short work needs one line, not ten.
            if reached > tenth and (reached == 10 or now - last_line >= patience):
                tenth, last_line = reached, now
                log.info(f"{title}: {', '.join(rate.summary(f'{10 * reached} %'))}")

    yield write


class TransferRate:
    """How fast bytes arrive and how long the rest will take."""

    def __init__(self, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.total, self.done = total, 0
        self._clock = clock
        self._arrived = 0
        self._samples = deque([(clock(), 0)])

    def count(self, count: int, *, arrived: bool) -> None:
        self.done += count
        if arrived:
            self._arrived += count
        now = self._clock()
        if now - self._samples[-1][0] > WINDOW / 40:
            self._samples.append((now, self._arrived))
            while now - self._samples[1][0] > WINDOW:
                self._samples.popleft()

    def summary(self, done: str) -> list[str]:
        """What is done, the speed and the time left, as far as known."""
        then, before = self._samples[0]
        passed = self._clock() - then
        speed = (self._arrived - before) / passed if passed else 0.0
        if speed < 1:
            return [done]
        words = [done, f"{size(speed)}/s"]
        if self.done < self.total:
            words.append(f"{duration((self.total - self.done) / speed)} left")
        return words


def duration(seconds: float) -> str:
    """`45 s`, `2 min 10 s`, `3 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
