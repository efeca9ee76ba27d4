"""Whole or not at all: everything is made beside its target, flushed, then renamed."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.core.errors import PipelineError
from pipeline.core.text import size

# A file system wants some room of its own, and estimates are estimates.
SPARE_BYTES = 64 * 1024 * 1024


def part(target: Path) -> Path:
    """The name under which `target` is made. Its lock makes sure that one run uses it."""
    return target.with_name(f".{target.name}.part")


def remove(path: Path) -> None:
    """Remove a file or a whole folder; nothing there is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def require_space(folder: Path, need: int) -> None:
    """Raise PipelineError unless `need` bytes and some spare fit on the disk of `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if need and free < need + SPARE_BYTES:
        raise PipelineError(
            f"{folder}: {size(need + SPARE_BYTES)} are needed there and {size(free)} are free",
            "free some space, or set LLAMA_PIPELINE_HOME to a folder on another disk",
        )


@contextmanager
def full_disk_is_an_error(folder: Path, chosen_by: str = "LLAMA_PIPELINE_HOME") -> Iterator[None]:
    """Say it plainly where the disk of `folder`, which `chosen_by` names, is full or may not be
    written."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise PipelineError(
                f"{folder}: the disk is full; what was being made is not there, all else is",
                f"free some space, or set {chosen_by} to a folder on another disk",
            ) from None
        ours = error.filename is None or str(error.filename).startswith(str(folder))
        if ours and error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise PipelineError(
                f"{error.filename or folder}: {error.strerror}",
                f"set {chosen_by} to a folder that you may write to",
            ) from None
        raise


def flush(path: Path) -> None:
    """Force a file, or the names in a folder, to the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders, and orders its renames itself
    handle = os.open(path, os.O_RDONLY if path.is_dir() or os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish_file(made: Path, target: Path) -> None:
    """Rename the finished `made` to `target`, in the same folder, for good."""
    flush(made)
    made.replace(target)
    flush(target.parent)


def publish_text(target: Path, text: str) -> None:
    """Write a small text whole or not at all."""
    made = part(target)
    try:
        made.write_text(text, encoding="utf-8", newline="\n")
        publish_file(made, target)
    finally:
        made.unlink(missing_ok=True)


def publish_same(file: Path, target: Path) -> None:
    """Publish `file` under another name too: a link where the disk allows it, else a copy."""
    made = part(target)
    remove(made)
    try:
        try:
            os.link(file, made)
        except OSError:
            require_space(target.parent, file.stat().st_size)
            shutil.copyfile(file, made)
        publish_file(made, target)
    finally:
        remove(made)


def publish_folder(made: Path, target: Path) -> None:
    """Put the finished folder `made` in the place of `target`, in the same parent folder."""
    for path in (*made.rglob("*"), made):
        if not path.is_symlink():
            flush(path)
    if not target.exists():
        made.rename(target)
    elif _exchange(made, target):
        remove(made)
    else:
        # No atomic exchange here: for an instant neither stands under its name.
        # A cut between the two renames is mended by `recover_folder`.
        aside = target.with_name(f".{target.name}.old")
        remove(aside)
        target.rename(aside)
        made.rename(target)
        remove(aside)
    flush(target.parent)


def recover_folder(target: Path) -> None:
    """Finish or undo what a cut `publish_folder` left. Call it under the target's lock."""
    remove(part(target))  # unfinished, or after the exchange the old one
    aside = target.with_name(f".{target.name}.old")
    if aside.exists():
        if target.exists():
            remove(aside)
        else:
            aside.rename(target)


def is_cut(target: Path) -> bool:
    """Whether a cut `publish_folder` left something, or another run is in the midst of it."""
    return part(target).exists() or target.with_name(f".{target.name}.old").exists()


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step where the system can: Linux and macOS, most file systems."""
    if os.name != "posix":
        return False
    library = ctypes.CDLL(None)
    first, second = os.fsencode(one), os.fsencode(other)
    if sys.platform == "linux" and hasattr(library, "renameat2"):
        at_cwd, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of linux/fs.h
        return bool(library.renameat2(at_cwd, first, at_cwd, second, exchange) == 0)
    if sys.platform == "darwin" and hasattr(library, "renamex_np"):
        swap = 2  # RENAME_SWAP of sys/stdio.h
        return bool(library.renamex_np(first, second, swap) == 0)
    return False
