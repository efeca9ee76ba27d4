"""One maker at a time.

The operating system drops the lock when its holder dies, however it dies. On a disk whose locks do
not work no run waits: each makes its own, under a temporary name that no other run has, and one of
them stays.
"""

from __future__ import annotations

import glob
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.core import log

if TYPE_CHECKING:
    from filelock import BaseFileLock

RUN = os.urandom(4).hex()  # in the temporary names of this run, where locks do not work
LEFT_SECONDS = 24 * 3600.0  # after which what a killed run left there is removed

_troubles: dict[Path, str] = {}  # by folder; empty: locks work there


@contextmanager
def only_one(target: Path, waiting: str = "") -> Iterator[None]:
    """Hold the lock of the artifact `target`; say so once, or `waiting`, while another run holds
    it.

    The holder may take it again: `is_singleton` makes it one lock within this process.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if trouble(target.parent):
        _remove_left(target)
        yield
        return
    lock = file_lock(lock_of(target), is_singleton=True)
    with _held(lock, waiting or f"another run is making {target.name}; waiting for it"):
        yield


@contextmanager
def alone_with(file: Path, waiting: str = "", *, mode: int = -1) -> Iterator[None]:
    """Hold the lock of a file for as long as it takes to read and write it; log `waiting` once
    while another run holds it. `mode`: of the file of the lock, where it is made here."""
    if trouble(file.parent):
        yield
        return
    with _held(file_lock(file, mode=mode), waiting):
        yield


@contextmanager
def _held(lock: BaseFileLock, waiting: str) -> Iterator[None]:
    from filelock import Timeout

    try:
        try:
            lock.acquire(timeout=0 if waiting else -1)
        except Timeout:
            log.info(waiting)
            lock.acquire()
    except OSError as error:
        error.filename = error.filename or lock.lock_file  # the system names no file
        raise
    try:
        yield
    finally:
        lock.release()


def mark_used(target: Path) -> None:
    """Give the lock of `target` the present time, by which it counts as used."""
    with suppress(OSError):
        os.utime(lock_of(target))


def is_held(target: Path) -> bool:
    """Whether another run holds the lock of `target`, or may: where locks do not work, or nothing
    can be written, that is unknown. The lock file keeps its time."""
    path = lock_of(target)
    try:
        if not trouble(path.parent) and not path.exists():
            return False
        with locked_if_free(target) as is_free:
            return not is_free
    except OSError:
        return True


@contextmanager
def locked_if_free(target: Path) -> Iterator[bool]:
    """Hold the lock of `target` unless another run does, or may; yields whether it is held. The
    lock file keeps its time."""
    from filelock import Timeout

    path = lock_of(target)
    if trouble(path.parent):
        yield False
        return
    stat = path.stat() if path.exists() else None
    lock = file_lock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        if stat:
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        yield True
    finally:
        lock.release()


def lock_of(target: Path) -> Path:
    """The file whose lock is that of `target`."""
    return target.with_name(f".{target.name}.lock")


def file_lock(path: Path, *, mode: int = -1, is_singleton: bool = False) -> BaseFileLock:
    """A lock of the operating system's: never one that a file is by being there, which a killed
    run leaves behind."""
    from filelock import FileLock

    return FileLock(path, mode=mode, is_singleton=is_singleton, fallback_to_soft=False)


def trouble(folder: Path) -> str:
    """Why locks do not work on the disk of `folder`, or nothing; reported once. Raises OSError
    where nothing can be written there."""
    if folder not in _troubles:
        try:
            why = _lock_error(folder)
        except OSError as error:
            error.filename = str(folder)  # instead of a file for this test
            raise
        if why and not any(_troubles.values()):
            log.info(
                f"warning: {folder}: locks do not work on this disk ({why}), so runs at the same "
                "time do not wait for each other; each makes its own, and one of them stays"
            )
        _troubles[folder] = why
    return _troubles[folder]


def own_name(folder: Path) -> str:
    """What makes temporary names in `folder` this run's own, where locks do not work."""
    return f".{RUN}" if _troubles.get(folder) else ""


def _lock_error(folder: Path) -> str:
    if sys.platform == "win32":
        return ""
    import fcntl

    # On Linux the file has no name, so that a kill leaves nothing.
    nameless = sys.platform == "linux"
    make = tempfile.TemporaryFile if nameless else tempfile.NamedTemporaryFile
    with (
        make(dir=folder, prefix=".lock-") as first,
        Path(f"/proc/self/fd/{first.fileno()}" if nameless else first.name).open("r+b") as second,
    ):
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return f"flock: {error.strerror}"
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return ""
    return "flock does not exclude others"


def _remove_left(target: Path) -> None:
    """Remove what killed runs left under names of their own."""
    name = f".{glob.escape(target.name)}.*"
    olds = target.parent.glob(f"{name}.old") if target.exists() else ()
    for path in (*target.parent.glob(f"{name}.part*"), *olds):
        try:
            if time.time() - path.lstat().st_mtime > LEFT_SECONDS:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        except OSError:
            continue
