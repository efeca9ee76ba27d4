"""What was once found out about a file, remembered for as long as its stamp stays the same.

For files that are not ours (a model folder, a GGUF used in place) and have no receipt.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .hashing import sha256
from .publish import publish_text


def recall(book: Path, file: Path) -> Any | None:
    """What `remember` noted about `file`, if its size and time are still those of then."""
    note = _load(book).get(str(file))
    try:
        return note["value"] if note and note["stamp"] == stamp(file) else None
    except (OSError, KeyError, TypeError):
        return None


def stamp(file: Path) -> list[int]:
    """The file's size in bytes and its modification time in ns."""
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns]


def remember(book: Path, file: Path, value: Any, stamp: list[int]) -> None:
    """Note a JSON value about `file`, found out when it carried `stamp`: take the stamp first,
    since somebody may write to the file meanwhile.

    A note that cannot be written is only a loss of time.
    """
    from filelock import FileLock

    try:
        book.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(book.with_name(f".{book.name}.lock")):
            notes = _load(book)
            notes[str(file)] = {"stamp": stamp, "value": value}
            publish_text(book, json.dumps(notes))
    except OSError:
        return


def forget(book: Path, path: Path) -> None:
    """Drop the notes about the file `path`, or about all files below the folder."""
    from filelock import FileLock

    if book.exists():
        with FileLock(book.with_name(f".{book.name}.lock")):
            notes = {n: v for n, v in _load(book).items() if not Path(n).is_relative_to(path)}
            publish_text(book, json.dumps(notes))


def identity(book: Path, file: Path) -> str:
    """SHA-256 of `file`, in hex, hashed only when its stamp is new."""
    known = recall(book, file)
    if known is None:
        before = stamp(file)
        known = sha256(file)
        remember(book, file, known, before)
    return str(known)


def _load(book: Path) -> dict[str, Any]:
    try:
        notes = json.loads(book.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return notes if isinstance(notes, dict) else {}
