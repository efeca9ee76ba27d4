"""One at a time, and one user."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import EACCES, ENOSPC, EROFS
from pathlib import Path

from pipeline.core import log
from pipeline.core.errors import PipelineError
from pipeline.core.store.publish import full_disk_is_an_error


@contextmanager
def alone(lock: Path, waiting: str = "", *, needed: bool = True) -> Iterator[None]:
    """Hold a lock; say `waiting` once where another process holds it. One that is not `needed` is
    done without where the disk takes none."""
    from filelock import FileLock, Timeout

    with full_disk_is_an_error(lock.parent):
        lock.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _require_own(lock.parent)
        held = FileLock(lock, mode=0o600)
        try:
            held.acquire(timeout=0 if waiting else -1)
        except Timeout:
            log.info(f"{waiting}; waiting for it")
            held.acquire()
        except OSError as error:
            if needed or error.errno not in (EACCES, ENOSPC, EROFS):
                raise
        try:
            yield
        finally:
            held.release()


def _require_own(folder: Path) -> None:
    """Two users would not see each other's processes."""
    if hasattr(os, "getuid") and folder.stat().st_uid != os.getuid():
        owner = str(folder.stat().st_uid)
        with suppress(KeyError):  # a number without a name
            owner = folder.owner()
        raise PipelineError(
            f"{folder} belongs to {owner}", f"do it as {owner}, or set LLAMA_PIPELINE_HOME"
        )
