"""Call a function for several items at once, for work that waits for the network."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from queue import Empty, SimpleQueue
from typing import TypeVar

TICK = 0.2  # seconds; a longer wait would not let Ctrl-C through on Windows
Item = TypeVar("Item")


def for_each(function: Callable[[Item], object], items: Iterable[Item], at_once: int) -> None:
    """Call `function` for each item, `at_once` at a time. Raises the first exception of any.

    The threads are daemons: one that waits for a silent server does not keep the program from
    ending, as those of a ThreadPoolExecutor would.
    """
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
