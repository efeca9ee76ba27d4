"""A run begins: others see it, and what a killed one has left is cleared."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from pipeline.core import download, paths
from pipeline.core.paths import Home
from pipeline.core.store import active, artifacts, publish, receipts
from pipeline.core.store.artifacts import UNFINISHED
from pipeline.core.store.locks import alone_with, locked_if_free

RECEIPTS = f".{receipts.FILE}.part"  # they are written under a lock of their own
MOMENT = 0.5  # seconds; a small file that a process is writing has its name by then


def begin(home: Home, files: Iterable[Path] | None = None) -> None:
    """Record this run, and that it uses `files`, as `active.begin` does; clear what killed runs
    have left."""
    active.begin(home.run, files)
    clear(home)


def clear(home: Home) -> None:
    """Where a run was killed, remove what it has left and nobody makes now. What was downloaded
    stays: the next download goes on from there."""
    records = active.killed(home.run)
    if not records:
        return
    for folder in _folders(home):
        for path in _unfinished(folder):
            _remove(path)
    _remove_records(home)
    _remove_answers(home)
    for record in records:  # last: where this run is killed before, the next one clears it all
        record.unlink(missing_ok=True)


def _folders(home: Home) -> Iterator[Path]:
    """Where runs make files and folders, each under a lock."""
    cache = paths.cache(home)
    yield from (home.bins, *(home.bins / x for x in (".build", ".source", ".ui", "packages")))
    yield from (cache, *_folders_in(cache / "archives"), *_folders_in(home.models))
    for folder in (each for kind in ("gguf", "source") for each in home.model_folders(kind)):
        if folder.is_symlink() or folder.parent.is_symlink():  # to another disk
            yield from _folders_in(folder)


def _folders_in(top: Path) -> Iterator[Path]:
    for folder, names, _ in os.walk(top):
        names[:] = [name for name in names if not UNFINISHED.fullmatch(name)]
        yield Path(folder)


def _unfinished(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if UNFINISHED.fullmatch(path.name))


def _remove(path: Path) -> None:
    if path.name == RECEIPTS:
        with alone_with(path.with_name(f"{receipts.FILE}.lock")):
            publish.remove(path)
        return
    if match := UNFINISHED.fullmatch(path.name):
        with locked_if_free(path.with_name(match["name"])) as is_free:
            there = os.path.lexists(path)  # else another run has removed it
            if is_free and there and not _is_download(path):
                artifacts.finish(path)


def _is_download(path: Path) -> bool:
    """Whether the file, or the one that its name belongs to, can be downloaded further."""
    made = path.with_suffix("") if download.journal(path.with_suffix("")) == path else path
    return made.is_file() and download.journal(made).is_file()


def _remove_answers(home: Home) -> None:
    """What models answered while quants were compared: up to 2 GiB, each under its own lock."""
    if (home.run / "quality").is_dir():
        from pipeline.report import quality  # seldom needed

        for path in quality.left_behind(home):
            publish.remove(path)


def _remove_records(home: Home) -> None:
    """Those in `run`, which are written without a lock: a living process is done in a moment."""
    left = [path for folder in _folders_in(home.run) for path in _unfinished(folder)]
    if not left:
        return
    before = {path: path.stat().st_mtime_ns for path in left if path.exists()}
    time.sleep(MOMENT)
    for path, written in before.items():
        with suppress(FileNotFoundError):
            if path.stat().st_mtime_ns == written:
                publish.remove(path)
