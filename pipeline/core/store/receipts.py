"""Receipts: what an artifact was made from, and the size and modification time of its file.

One `.state.json` a folder, one entry an artifact. An artifact is current when its recipe, size and
modification time equal the recorded ones. Any difference is dirty: newer and older are never
compared. Checking reads one small file and the stamp of another.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any

from msgspec import Struct, convert, to_builtins
from msgspec.structs import replace

from pipeline.core import log
from pipeline.core.text import plural

from .hashing import sha256
from .locks import alone_with
from .publish import flush, is_cut, publish_text

SCHEMA = 1
FILE = ".state.json"

SETTLED_NS = 2_000_000_000  # within FAT's granularity two writes may leave the same stamp

_reported: set[Path] = set()  # unreadable receipts are reported once
_cache: dict[Path, tuple[tuple[int, ...], dict[str, Entry]]] = {}  # with the file's stamp

# What an artifact is made from: plain JSON values, so that it equals what was read from the file.
Recipe = Mapping[str, Any]


class Entry(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the receipt says of one artifact.

    `mtime_ns` is None once the file was removed on purpose: its recipe and sha256 stay known, so
    that nothing made from it has to be made again. `keep` is false for an intermediate artifact.
    `sandbox` names what limited the program that made it.
    """

    recipe: Recipe
    size: int
    mtime_ns: int | None
    sha256: str
    made_at: str
    seconds: float
    source: Mapping[str, Any] | None = None
    keep: bool = True
    sandbox: str | None = None


class Status(Enum):
    """How an artifact compares with its receipt."""

    CURRENT = "current"
    MOVED = "copied or restored"  # the same size, another time: a hash decides
    DIRTY = "made differently"
    MISSING = "missing"
    FORCED = "to be made again"


def load(folder: Path) -> dict[str, Entry]:
    """The receipts of `folder`. Unreadable ones are reported and count as none.

    A file is read again only when its stamp has changed.
    """
    path = folder / FILE
    try:
        stat = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError:
        return _read(path)  # which says why
    stamp = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
    cached = _cache.get(path)
    if cached and cached[0] == stamp:
        return dict(cached[1])
    entries = _read(path)
    if entries and time.time_ns() - stat.st_mtime_ns > SETTLED_NS:
        _cache[path] = stamp, dict(entries)
    return entries


def _read(path: Path) -> dict[str, Entry]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["schema"] != SCHEMA:
            raise ValueError(f"schema {data['schema']}, this version reads {SCHEMA}")
        return convert(data["artifacts"], dict[str, Entry])
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        if path not in _reported:
            _reported.add(path)
            log.info(f"{path}: not readable as receipts ({error}); treated as absent")
        return {}


def of(target: Path) -> Entry | None:
    """The receipt of an artifact, whether or not that still holds; None where there is none."""
    return load(target.parent).get(target.name)


def status(target: Path, recipe: Recipe | None = None) -> Status:
    """Compare `target` with its receipt, and the receipt with `recipe` unless that is None."""
    try:
        stat = target.stat()
    except OSError:
        return Status.MISSING
    entry = of(target)
    if entry is None or (recipe is not None and entry.recipe != recipe):
        return Status.DIRTY
    if stat.st_size != entry.size:
        return Status.DIRTY
    return Status.CURRENT if stat.st_mtime_ns == entry.mtime_ns else Status.MOVED


def revalidate(target: Path, recipe: Recipe | None = None) -> bool:
    """Whether `target` is current, by its hash where it was copied or restored."""
    state = status(target, recipe)
    if state is not Status.MOVED:
        return state is Status.CURRENT
    entry = load(target.parent)[target.name]
    log.info(f"{target.name}: mtime changed; rehashing to verify")
    if sha256(target) != entry.sha256:
        change(target, None)
        return False
    flush(target)  # whoever copied it may not have done so
    change(target, replace(entry, mtime_ns=target.stat().st_mtime_ns))
    return True


def known_sha256(target: Path) -> str:
    """SHA-256 of `target` from its receipt, in hex; empty where that does not hold."""
    is_current = status(target) is Status.CURRENT
    return load(target.parent)[target.name].sha256 if is_current else ""


def stamp(
    target: Path,
    recipe: Recipe,
    *,
    seconds: float,
    source: Mapping[str, Any] | None = None,
    keep: bool = True,
    digest: str = "",
    sandbox: str | None = None,
) -> Entry:
    """The entry for the finished file `target`, which is hashed unless its `digest` is passed."""
    stat = target.stat()
    return Entry(
        recipe=recipe,
        source=source,
        size=stat.st_size,
        mtime_ns=stat.st_mtime_ns,
        sha256=digest or sha256(target),
        made_at=now(),
        seconds=round(seconds, 1),
        keep=keep,
        sandbox=sandbox,
    )


def now() -> str:
    """The present time as receipts write it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def change(target: Path, entry: Entry | None) -> None:
    """Record `entry` for `target`, or drop its receipt."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with alone_with(target.with_name(f"{FILE}.lock")):
        entries = _read(target.parent / FILE)  # what others wrote must not get lost
        if entry is None:
            if entries.pop(target.name, None) is None:
                return
        else:
            entries[target.name] = entry
        save(target.parent, entries)


def save(folder: Path, entries: Mapping[str, Entry]) -> None:
    """Write all receipts of `folder`; `change` writes one, under a lock."""
    path = folder / FILE
    data = {
        "schema": SCHEMA,
        "artifacts": {
            name: {key: value for key, value in to_builtins(entry).items() if value is not None}
            | {"mtime_ns": entry.mtime_ns}
            for name, entry in sorted(entries.items())
        },
    }
    text = json.dumps(data, indent=1, ensure_ascii=False) + "\n"
    # Names that are not UTF-8 on the disk become escapes of JSON.
    publish_text(path, text.encode("utf-8", "backslashreplace").decode())
    _cache.pop(path, None)


def invalidate(target: Path) -> None:
    """Drop the receipt of `target`, if there is one."""
    if target.name in load(target.parent):
        change(target, None)


# Folders that are published as a whole: each file has the receipt of the folder's recipe


def files_in(folder: Path) -> list[Path]:
    """The files and links of a folder; none where there is no folder. The receipts and their lock
    are hidden."""
    paths = folder.iterdir() if folder.is_dir() else ()
    shown = sorted(path for path in paths if not path.name.startswith("."))
    return [path for path in shown if path.is_symlink() or not path.is_dir()]


def record_folder(
    folder: Path,
    recipe: Recipe,
    *,
    seconds: float,
    source: Mapping[str, Any] | None = None,
    digests: Mapping[Path, str] | None = None,
) -> None:
    """Write the receipts of all files of a finished folder. `digests` are those sha256 that are
    known; the other files are hashed."""
    known = digests or {}
    entries = {
        file.name: stamp(file, recipe, seconds=seconds, source=source, digest=known.get(file, ""))
        for file in files_in(folder)
    }
    save(folder, entries)


def folder_is_current(
    folder: Path, recipe: Recipe | None = None, names: Iterable[str] = ()
) -> bool:
    """Whether a folder was published whole, and each file that has a receipt, or is one of `names`,
    is current."""
    states = _states(folder, recipe, names)
    return {*states.values()} == {Status.CURRENT} and not is_cut(folder)


def revalidate_folder(
    folder: Path, recipe: Recipe | None = None, names: Iterable[str] = ()
) -> bool:
    """As `folder_is_current`, but files that were copied or restored are hashed. No receipt is
    dropped, so that a file that was changed is not taken for a stranger's."""
    states = _states(folder, recipe, names)
    if not states or not {*states.values()} <= {Status.CURRENT, Status.MOVED}:
        return False
    moved = [file for file, state in states.items() if state is Status.MOVED]
    if not moved:
        return True
    log.info(f"{folder.name}: mtime of {plural(len(moved), 'file')} changed; rehashing to verify")
    entries = load(folder)
    if any(sha256(file) != entries[file.name].sha256 for file in moved):
        return False
    for file in moved:
        flush(file)
        entries[file.name] = replace(entries[file.name], mtime_ns=file.stat().st_mtime_ns)
    save(folder, entries)
    return True


def _states(folder: Path, recipe: Recipe | None, names: Iterable[str]) -> dict[Path, Status]:
    files = [folder / name for name in dict.fromkeys([*names, *load(folder)])]
    return {file: status(file, recipe) for file in files}


def forget_folder(folder: Path) -> None:
    """Drop the receipts of all files of `folder`. It stays known as one of ours."""
    if load(folder):
        save(folder, {})
