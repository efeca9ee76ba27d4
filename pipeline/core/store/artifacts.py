"""How every file and folder is made: lock, check again, make beside, verify, publish, record."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from stat import S_ISDIR
from typing import Any

from msgspec.structs import replace

from pipeline.core.errors import PipelineError
from pipeline.core.paths import CHOSEN_BY

from . import receipts
from .locks import only_one, own_name
from .publish import (
    FULL,
    disk_errors,
    flush,
    part,
    publish_file,
    publish_folder,
    recover_folder,
    remove,
    require_space,
)
from .receipts import Entry, Recipe

# Of a file or folder that is being made, or was about to be replaced or removed; and beside it the
# journal of a download, the folder of a converter or of pip.
UNFINISHED = re.compile(r"\.(?P<name>.+?)(\.[0-9a-f]{8})?\.(?P<kind>part|old)(\.[a-z]+)?")
OWN = re.compile(r"\.state\.json|\..+\.lock|\.lock-.*")  # receipts and locks
BLOCK = 512  # bytes, of `st_blocks`


def make(
    target: Path,
    recipe: Recipe,
    maker: Callable[[Path], None],
    *,
    need: int = 0,
    source: Mapping[str, Any] | None = None,
    keep: bool = True,
    force: bool = False,
    sandbox: str | None = None,
) -> Entry:
    """Have `maker(path)` make `target`, unless its receipt says that it was made by `recipe`.

    `need` is the disk space in bytes that making takes. `keep=False` marks an intermediate file,
    unless it was kept before. `sandbox` is noted in the receipt. Raises what `maker` raises, with
    nothing published.
    """
    with disk_errors(target.parent), only_one(target):
        known = receipts.of(target)
        if known and not force and receipts.revalidate(target, recipe):
            known = receipts.load(target.parent)[target.name]
            if keep and not known.keep:
                known = replace(known, keep=True)
                receipts.change(target, known)
            return known
        keep = keep or (known is not None and known.keep and known.mtime_ns is not None)
        made = part(target)
        remove(made)
        require_space(target.parent, need)
        start = time.monotonic()
        try:
            maker(made)
            entry = receipts.stamp(
                made,
                recipe,
                source=source,
                keep=keep,
                seconds=time.monotonic() - start,
                sandbox=sandbox,
            )
            if not force and (other := _of_another_run(target, recipe)):
                return other
            publish_file(made, target)
        except PipelineError:
            # The other run may have removed what it is made of.
            if not force and (other := _of_another_run(target, recipe)):
                return other
            raise
        finally:
            remove(made)
        receipts.change(target, entry)
        return entry


def _of_another_run(target: Path, recipe: Recipe) -> Entry | None:
    """What another run has made meanwhile, where locks do not work: the first result stays."""
    if own_name(target.parent) and receipts.revalidate(target, recipe):
        return receipts.load(target.parent)[target.name]
    return None


@contextmanager
def locked_folder(target: Path, chosen_by: str = CHOSEN_BY) -> Iterator[None]:
    """Hold the lock of the folder `target`, and repair what an interrupted run left of it: check
    again under the lock, then make it with `new_folder`. A full disk is a PipelineError.
    `chosen_by` says which variable sets its place."""
    with disk_errors(target.parent, chosen_by), only_one(target):
        recover_folder(target)
        yield


@contextmanager
def new_folder(target: Path, *, need: int = 0) -> Iterator[Path]:
    """The path, not there yet, at which to make the folder that takes the place of `target`;
    after an error it is removed and `target` stays as it was.

    `need` is the disk space in bytes that making takes. Call it under `locked_folder`, and write
    the receipts of the files into the new folder: so they are published with them.
    """
    made = part(target)
    remove(made)
    require_space(target.parent, need)
    try:
        yield made
        publish_folder(made, target)
    finally:
        remove(made)


def publish(
    target: Path,
    recipe: Recipe,
    *,
    source: Mapping[str, Any],
    sha256: str,
    seconds: float,
    journal: Path | None = None,
) -> None:
    """Publish what was made under the target's `part` name, and whose sha256 was proven, and
    record it. Call it under the target's lock.

    `journal` tells how far it was made. It is removed before the receipt is written, since after
    that no run looks for it.
    """
    made = part(target)
    entry = receipts.stamp(made, recipe, source=source, seconds=seconds, digest=sha256)
    publish_file(made, target)
    remove(made)  # where it was another name of the same file, renaming has left it
    if journal:
        remove(journal)
    receipts.change(target, entry)


def keep(target: Path) -> None:
    """Mark an intermediate file as one to keep."""
    with only_one(target):
        entry = receipts.of(target)
        if entry:
            receipts.change(target, replace(entry, keep=True))


def discard(target: Path) -> None:
    """Remove an intermediate file; its receipt stays. Call it under the target's lock."""
    remove(target)
    _drop_receipt(target, keep=True)


def take_away(target: Path, *, keep_receipt: bool = False) -> None:
    """Remove a file or folder with its receipt. Killed halfway it is unfinished, and never taken
    for what it was. `keep_receipt`: what was made from it stays up to date."""
    aside = part(target)
    remove(aside)
    if os.path.lexists(target):
        target.rename(aside)
        flush(target.parent)  # else a power cut could leave a part of it in its place
    try:
        _drop_receipt(target, keep=keep_receipt)
    except OSError as error:
        if error.errno not in FULL:
            raise
        remove(aside)  # makes room for the receipts of the others
        _drop_receipt(target, keep=keep_receipt)
    remove(aside)


def _drop_receipt(target: Path, *, keep: bool) -> None:
    """Drop the receipt, or `keep` it as that of a file which was removed on purpose."""
    if entry := receipts.of(target):
        receipts.change(target, replace(entry, mtime_ns=None) if keep else None)


def finish(unfinished: Path) -> None:
    """Remove what a killed run left of making, replacing or taking away an artifact. A folder that
    was about to be replaced, and was not, is put back."""
    match = UNFINISHED.fullmatch(unfinished.name)
    if match and match["kind"] == "old":
        recover_folder(unfinished.with_name(match["name"]))
        return
    flush(unfinished.parent)  # the rename that set it aside
    remove(unfinished)
    if match and not os.path.lexists(target := unfinished.with_name(match["name"])):
        _drop_receipt(target, keep=True)


def remove_empty(folder: Path, top: Path) -> None:
    """Remove `folder` and the folders above it, below `top`, that are empty."""
    while folder != top and folder.is_relative_to(top) and folder.is_dir() and is_empty(folder):
        remove(folder)
        folder = folder.parent


def is_empty(folder: Path) -> bool:
    """Whether a folder holds nothing but receipts of what is gone, locks, and empty folders, which
    a killed run may have left. What this user may not list is no such folder."""

    def counts_as_nothing(path: Path) -> bool:
        if path.is_symlink() or not path.is_dir() or UNFINISHED.fullmatch(path.name):
            return OWN.fullmatch(path.name) is not None
        return is_empty(path)

    try:
        return all(map(counts_as_nothing, folder.iterdir()))
    except PermissionError:
        return False


def allocated(paths: Iterable[Path]) -> int:
    """How many bytes become free when all of `paths` are removed: the holes of a file take none,
    nor does a file that has another name elsewhere."""
    names: dict[tuple[int, int], int] = {}
    stats = {}
    for path in paths:
        for file in (
            (path, *path.rglob("*")) if path.is_dir() and not path.is_symlink() else (path,)
        ):
            with contextlib.suppress(FileNotFoundError):
                stat = file.lstat()
                key = stat.st_dev, stat.st_ino
                names[key] = names.get(key, 0) + 1
                stats[key] = stat
    return sum(
        getattr(stat, "st_blocks", -(-stat.st_size // BLOCK)) * BLOCK
        for key, stat in stats.items()
        if S_ISDIR(stat.st_mode) or names[key] >= stat.st_nlink
    )
