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
    left: SimpleQueue[Item] = SimpleQueue()
    done: SimpleQueue[BaseException | None] = SimpleQueue()
    for item in items:
        left.put(item)
    waiting = left.qsize()

    def work() -> None:
        while True:
            try:
                item = left.get_nowait()
            except Empty:
                return
            try:
                function(item)
                done.put(None)
            except BaseException as error:  # of any kind: the caller gets it
                done.put(error)
                return

    for _ in range(min(at_once, waiting)):
        threading.Thread(target=work, daemon=True).start()
    while waiting:
        try:
            error = done.get(timeout=TICK)
        except Empty:
            continue
        if error:
            raise error
        waiting -= 1
