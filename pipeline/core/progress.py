"""Progress of long work: a bar on a terminal, elsewhere a line for every tenth, and of transfers
lines of JSON where AS_JSON is set."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Protocol

from . import log
from .text import printable, size

if TYPE_CHECKING:
    from rich.progress import Progress, Task

Update = Callable[[float, float], None]
AS_JSON = "LLAMA_PIPELINE_PROGRESS"  # in the environment that a program starts this one with
JSON_SECONDS = 0.25  # between two lines of JSON
PATIENCE = 1.0
_drawing = threading.Lock()
WINDOW = 20.0  # seconds over which the speed is taken


class Count(Protocol):
    """Count bytes as done, or with a minus as not done after all. `arrived=False`: they do not
    count for the speed."""

    def __call__(self, count: int, *, arrived: bool = True) -> None: ...


@contextmanager
def bar(title: str) -> Iterator[Update]:
    """Yield `update(done, total)`, in any unit."""
    if not sys.stderr.isatty():
        yield _lines(title)
        return

    def summary(task: Task) -> str:
        left = task.time_remaining
        words = [f"{task.percentage:.0f} %", duration(task.elapsed or 0)]
        return ", ".join([*words, *([f"{duration(left)} left"] if left else [])])

    with _drawn(title, summary) as update:
        yield update


@contextmanager
def transfer(
    title: str, total: int, patience: float = PATIENCE, *, digest: str = ""
) -> Iterator[Count]:
    """Count bytes from any thread; shows how many are done, at what speed, and the time left.

    `patience` is the least seconds between two lines, where stderr is not a terminal. `digest` is
    the sha256 by which a program tells transfers apart.
    """
    rate = TransferRate(total)

    def count(count: int, *, arrived: bool = True) -> None:
        rate.count(count, arrived=arrived)
        update(rate.done, total)

    if os.environ.get(AS_JSON):
        update = _json_lines(digest)
        yield count
        return
    if not sys.stderr.isatty():
        update = _lines(title, rate.summary, patience)
        yield count
        return

    with _drawn(title, lambda task: rate.summary(f"{size(rate.done)} of {size(total)}")) as update:
        yield count


@contextmanager
def _drawn(title: str, summary: Callable[[Task], str]) -> Iterator[Update]:
    """A bar on the terminal, followed by a summary that is computed at each refresh, so that a
    stall shows."""
    with _drawing:
        progress = _bars()
    task = progress.add_task(printable(title), total=None, visible=False, summary=summary)
    shown = 0.0

    def update(done: float, total: float) -> None:
        nonlocal shown
        if time.monotonic() - shown > 0.1:  # not each time: threads would wait for each other
            shown = time.monotonic()
            # Only now, since a bar would disturb what is printed before the work starts.
            with _drawing:
                progress.start()
            progress.update(task, completed=done, total=total, visible=True)

    try:
        yield update
    finally:
        with _drawing:
            progress.remove_task(task)
            if not progress.tasks:
                progress.stop()


@cache
def _bars() -> Progress:
    """All bars of this process, one below the other: work is done side by side."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn
    from rich.table import Column
    from rich.text import Text

    class Summary(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(task.fields["summary"](task))

    # The text needs most of a line of 80.
    columns = BarColumn(bar_width=16), Summary(table_column=Column(no_wrap=True))
    words = TextColumn("{task.description}"), *columns
    console = Console(file=log.unfiltered(sys.stderr))
    return Progress(*words, console=console, transient=True)


def _lines(title: str, summary: Callable[[str], str] = str, patience: float = 0) -> Update:
    """Print a line for each tenth, at most one in `patience` seconds: short work needs one, not
    ten."""
    tenth, last_line = 0, time.monotonic()
    lock = threading.Lock()

    def update(done: float, total: float) -> None:
        nonlocal tenth, last_line
        reached, now = int(10 * done / total) if total else 0, time.monotonic()
        with lock:
            if reached > tenth and (reached == 10 or now - last_line >= patience):
                tenth, last_line = reached, now
                log.info(f"{title}: {summary(f'{10 * reached} %')}")

    return update


def _json_lines(digest: str) -> Update:
    """Prints the figures themselves, from time to time and at the end."""
    last_line, lock = -JSON_SECONDS, threading.Lock()

    def update(done: float, total: float) -> None:
        nonlocal last_line
        now = time.monotonic()
        with lock:
            if done >= total or now - last_line >= JSON_SECONDS:
                last_line = now
                log.info(json.dumps({"done": int(done), "total": int(total), "digest": digest}))

    return update


class TransferRate:
    """How fast bytes arrive, on any thread, and how long the rest will take."""

    def __init__(self, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.total, self.done = total, 0
        self._clock = clock
        self._arrived = 0
        self._samples = deque([(clock(), 0)])
        self._lock = threading.Lock()

    def count(self, count: int, *, arrived: bool) -> None:
        with self._lock:
            self.done += count
            if arrived:
                self._arrived += count
            now = self._clock()
            if now - self._samples[-1][0] > WINDOW / 40:
                self._samples.append((now, self._arrived))
                while now - self._samples[1][0] > WINDOW:
                    self._samples.popleft()

    def summary(self, done: str) -> str:
        """`done`, followed by the speed and the time left as far as they are known."""
        with self._lock:
            then, before = self._samples[0]
            passed = self._clock() - then
            speed = (self._arrived - before) / passed if passed else 0.0
        if speed < 1:
            return done
        words = [done, f"{size(speed)}/s"]
        if self.done < self.total:
            words.append(f"{duration((self.total - self.done) / speed)} left")
        return ", ".join(words)


def duration(seconds: float) -> str:
    """`45 s`, `2 min 10 s`, `3 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
