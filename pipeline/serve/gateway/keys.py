"""API keys: read from files, compared in constant time, never shown."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from pathlib import Path

from pipeline.serve.keys import keys_of

Stamp = tuple[int, int, int] | None


def stamp(path: Path) -> Stamp:
    """What tells that a file is another one; None where there is none."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


class Keys:
    """The keys of files, read again when a file changes."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[Stamp, tuple[str, ...]]] = {}

    def of(self, file: str) -> tuple[str, ...]:
        """The keys in `file`; none where it cannot be read."""
        now = stamp(Path(file))
        known = self._known.get(file)
        if known is None or known[0] != now:
            try:
                known = now, keys_of(Path(file))
            except OSError:
                known = now, ()
            self._known[file] = known
        return known[1]

    def allow(self, file: str, headers: Mapping[str, str]) -> bool:
        """Whether a request with `headers` brings a key of `file`."""
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not given:
            given = headers.get("x-api-key", "")
        told = given.strip().encode("latin-1", "replace")  # as it came; servers decode it so
        right = [hmac.compare_digest(told, key.encode()) for key in self.of(file)]
        return any(right)
