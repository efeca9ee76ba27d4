"""What was once found out about a file, remembered for as long as its stamp stays the same.

For files that are not ours (a model folder, a GGUF used in place) and have no receipt.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .hashing import sha256
from .publish import part


def recall(book: Path, file: Path) -> Any | None:
    """What `remember` noted about `file`, if its size and time are still those of then."""
    note = _load(book).get(str(file))
    if not note:
        return None
    try:
        stat = file.stat()
    except OSError:
        return None
    return note["value"] if note["stamp"] == [stat.st_size, stat.st_mtime_ns] else None


def remember(book: Path, file: Path, value: Any) -> None:
    """Note a JSON value about `file`. A note that cannot be written is only a loss of time."""
    from filelock import FileLock

    stat = file.stat()
    try:
        book.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(book.with_name(f".{book.name}.lock")):
            notes = _load(book)
            notes[str(file)] = {"stamp": [stat.st_size, stat.st_mtime_ns], "value": value}
            made = part(book)
            made.write_text(json.dumps(notes, ensure_ascii=False), encoding="utf-8")
            made.replace(book)
    except OSError:
        return


def identity(book: Path, file: Path) -> str:
    """SHA-256 of `file`, in hex, hashed only when its stamp is new."""
    known = recall(book, file)
    if known is None:
        known = sha256(file)
        remember(book, file, known)
    return str(known)


def _load(book: Path) -> dict[str, Any]:
    try:
        notes = json.loads(book.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return notes if isinstance(notes, dict) else {}
