"""Kill a program that hangs, or does not end in time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def watched(
    patience: float | None, write: Callable[[str], None], kill: Callable[[], None]
) -> Iterator[Callable[[], None]]:
    """Yield a function to call at each sign of life: `kill` is called after `patience` seconds
    without one, and at the end for what was left behind. Without `patience` nothing is killed."""
    if patience is None:
        yield lambda: None
        return
    heard, over = threading.Event(), threading.Event()

    def watch() -> None:
        while heard.wait(patience):
            heard.clear()
            if over.is_set():
                return
        write(f"killed: it had printed nothing for {patience:g} s")
        kill()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield heard.set
    finally:
        over.set()
        heard.set()
        thread.join()
        kill()


@contextmanager
def limited(
    seconds: float | None, write: Callable[[str], None], kill: Callable[[], None]
) -> Iterator[None]:
    """Call `kill` once the block has lasted so many seconds; None lets it last."""
    if seconds is None:
        yield
        return

    def end() -> None:
        write(f"killed: it had not ended after {seconds:g} s")
        kill()

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
