"""A folder of unpacked programs: filled from archives, held against its receipts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from pipeline.core import log
from pipeline.core.errors import PipelineError
from pipeline.core.store import hashing, receipts, stat_cache
from pipeline.core.store.publish import remove
from pipeline.core.store.receipts import Recipe
from pipeline.core.text import plural


def files(folder: Path) -> list[Path]:
    """The files and links of a folder; the receipts and their lock are hidden."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def is_current(folder: Path, recipe: Recipe) -> bool:
    """Whether exactly the files with receipts are there, as the recipe made them."""
    return _moved(folder, recipe) == []


def settle(folder: Path, recipe: Recipe) -> bool:
    """The same, hashing once each file that was copied or restored."""
    moved = _moved(folder, recipe)
    if not moved:
        return moved is not None
    log.info(f"{folder.name}: {plural(len(moved), 'file')} with another time; hashing once")
    entries = receipts.load(folder)
    if any(hashing.sha256(path) != entries[path.name].sha256 for path in moved):
        return False
    for path in moved:
        entries[path.name] = replace(entries[path.name], mtime_ns=path.stat().st_mtime_ns)
    receipts.save(folder, entries)
    return True


def _moved(folder: Path, recipe: Recipe) -> list[Path] | None:
    """The files with another time than their receipt; None where more than that is different."""
    entries = receipts.load(folder)
    if not entries or {path.name for path in files(folder)} != entries.keys():
        return None
    moved = []
    for name, entry in entries.items():
        try:
            size, mtime_ns = stat_cache.stamp(folder / name)
        except OSError:  # a link to nowhere
            return None
        if entry.recipe != recipe or entry.size != size:
            return None
        if entry.mtime_ns != mtime_ns:
            moved.append(folder / name)
    return moved


def fill(folder: Path, packed: Iterable[Path]) -> None:
    """Make `folder` of all files of the archives, side by side: so programs find their libraries.

    Some archives have a folder on top, or two. A file of an earlier archive stays. Raises
    PipelineError.
    """
    from pipeline.core import archives

    folder.mkdir()
    names: set[str] = set()
    for archive in packed:
        inside, before = folder / ".unpacked", frozenset(names)
        for path in archives.unpack(archive, inside):
            name = path.name.casefold()  # two names that are one on some disks
            if path.name.startswith(".") or name in before:
                continue
            if name in names:
                raise PipelineError(f"{archive.name}: holds two files named {path.name}")
            names.add(name)
            path.rename(folder / path.name)
        remove(inside)
    for path in files(folder):
        if not path.is_file() or path.resolve().parent != folder.resolve():
            raise PipelineError(f"{folder.name}: {path.name} is a link to what is not beside it")
