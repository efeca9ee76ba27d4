"""Work on threads, for what waits for the network or for other programs.

The threads are daemons: one that waits for a silent server does not keep the program from ending,
as those of a ThreadPoolExecutor would.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import TypeVar

TICK = 0.2  # seconds; a longer wait would not let Ctrl-C through on Windows
Item = TypeVar("Item")
Value = TypeVar("Value")
Ended = SimpleQueue[BaseException | None]


class Background:
    """A call of `function` on a thread."""

    def __init__(self, function: Callable[[], object]) -> None:
        self._ended: Ended = SimpleQueue()
        _start(function, self._ended)

    def wait(self) -> None:
        """Wait for its end, and raise what it raised."""
        self._finish(_next(self._ended))

    def check(self) -> None:
        """Raise what it raised, if it has ended by now."""
        with suppress(Empty):
            self._finish(self._ended.get_nowait())

    def _finish(self, error: BaseException | None) -> None:
        self._ended.put(error)  # for the next call
        if error:
            raise error


def for_each(function: Callable[[Item], object], items: Iterable[Item], at_once: int) -> None:
    """Call `function` for each item, `at_once` at a time. Raises the first exception of any."""
    waiting = list(items)
    left = iter(waiting)  # each thread takes the next one
    ended: Ended = SimpleQueue()

    def work() -> None:
        for item in left:
            function(item)

    running = min(at_once, len(waiting))
    for _ in range(running):
        _start(work, ended)
    for _ in range(running):
        if error := _next(ended):
            raise error


def within(seconds: float, function: Callable[[], Value]) -> Value:
    """What `function` returns, or raises. Raises TimeoutError where it takes longer than that: its
    thread is left behind, since nothing can end a wait for a server that sends now and then a byte.
    """
    values: list[Value] = []
    ended: Ended = SimpleQueue()
    _start(lambda: values.append(function()), ended)
    if error := _next(ended, time.monotonic() + seconds):
        raise error
    return values[0]


def _start(function: Callable[[], object], ended: Ended) -> None:
    """Call it on a thread, which puts into `ended` what it raised, or None."""

    def work() -> None:
        try:
            function()
        except BaseException as error:  # of any kind: it is raised where the end is awaited
            ended.put(error)
        else:
            ended.put(None)

    threading.Thread(target=work, daemon=True).start()


def _next(ended: Ended, deadline: float = math.inf) -> BaseException | None:
    """What the next to end has raised. Raises TimeoutError at `deadline`."""
    while True:
        try:
            return ended.get(timeout=max(0.0, min(TICK, deadline - time.monotonic())))
        except Empty:
            if time.monotonic() >= deadline:
                raise TimeoutError from None
