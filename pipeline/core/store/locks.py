"""One maker at a time.

The operating system drops the lock when its holder dies, however it dies.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.core import log


@contextmanager
def only_one(target: Path) -> Iterator[None]:
    """Hold the lock of the artifact `target`; say so once while another run holds it.

    The holder may take it again: `is_singleton` makes it one lock within this process.
    """
    from filelock import FileLock, Timeout

    target.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(target.with_name(f".{target.name}.lock"), is_singleton=True)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info(f"another run is making {target.name}; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
