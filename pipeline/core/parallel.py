"""Work on threads, for what waits for the network or for other programs.

The threads are daemons: one that waits for a silent server does not keep the program from ending,
as those of a ThreadPoolExecutor would.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from queue import Empty, SimpleQueue
from typing import TypeVar

TICK = 0.2  # seconds; a longer wait would not let Ctrl-C through on Windows
Item = TypeVar("Item")


def background(function: Callable[[], object]) -> Callable[[], None]:
    """Call `function` on a thread; returns a function that waits for its end, and raises what it
    raised."""
    ended: SimpleQueue[BaseException | None] = SimpleQueue()

    def work() -> None:
        try:
            function()
        except BaseException as error:  # of any kind: who waits gets it
            ended.put(error)
        else:
            ended.put(None)

    def wait() -> None:
        while True:
            try:
                error = ended.get(timeout=TICK)
            except Empty:
                continue
            ended.put(None)  # for who waits again
            if error:
                raise error
            return

    threading.Thread(target=work, daemon=True).start()
    return wait


def for_each(function: Callable[[Item], object], items: Iterable[Item], at_once: int) -> None:
    """Call `function` for each item, `at_once` at a time. Raises the first exception of any."""
    waiting = list(items)
    left = iter(waiting)  # each thread takes the next one
    ended: SimpleQueue[BaseException | None] = SimpleQueue()

    def work() -> None:
        try:
            for item in left:
                function(item)
        except BaseException as error:  # of any kind: the caller gets it
            ended.put(error)
        else:
            ended.put(None)

    running = min(at_once, len(waiting))
    for _ in range(running):
        threading.Thread(target=work, daemon=True).start()
    while running:
        try:
            error = ended.get(timeout=TICK)
        except Empty:
            continue
        if error:
            raise error
        running -= 1
