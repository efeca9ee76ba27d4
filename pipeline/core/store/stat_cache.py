"""What was once computed from a file, kept for as long as its size and modification time stay.

For files that are not ours (a model folder, a GGUF used in place) and have no receipt. A cache file
holds one entry a file: `{path: {"stamp": [size, mtime], "value": …}}`.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from . import json_file
from .hashing import sha256
from .locks import alone_with
from .publish import flush


def recall(cache: Path, file: Path) -> Any | None:
    """The value that `remember` stored for `file`; None where the file has changed since."""
    entry = _load(cache).get(str(file))
    try:
        return entry["value"] if entry and entry["stamp"] == stamp(file) else None
    except (OSError, KeyError, TypeError):
        return None


def stamp(file: Path) -> list[int]:
    """The file's size in bytes and its modification time in ns."""
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns]


def remember(cache: Path, file: Path, value: Any, stamp: list[int]) -> None:
    """Store a JSON value for `file`. Take its `stamp` before the value is computed, since somebody
    may write to the file meanwhile.

    A value that cannot be stored is computed again the next time, no more.
    """
    with suppress(OSError):  # a disk or file that only reading is allowed on
        flush(file)  # after a power cut it could have this stamp, and other bytes
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with alone_with(cache.with_name(f".{cache.name}.lock")):
            json_file.write(cache, _load(cache) | {str(file): {"stamp": stamp, "value": value}})
    except OSError:
        return


def forget(cache: Path, path: Path) -> None:
    """Drop the entry of the file `path`, or those of all files below the folder."""
    if cache.exists():
        with alone_with(cache.with_name(f".{cache.name}.lock")):
            entries = {n: v for n, v in _load(cache).items() if not Path(n).is_relative_to(path)}
            json_file.write(cache, entries)


def identity(cache: Path, file: Path) -> str:
    """SHA-256 of `file`, in hex, hashed only where its stamp is new."""
    digest = recall(cache, file)
    if digest is None:
        before = stamp(file)
        digest = sha256(file)
        remember(cache, file, digest, before)
    return str(digest)


def _load(cache: Path) -> dict[str, Any]:
    return json_file.read(cache, lambda data: dict(data.items())) or {}
