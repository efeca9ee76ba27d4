"""API keys: read from files, compared in constant time, never shown."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from pathlib import Path

Stamp = tuple[int, int, int] | None


def stamp(path: Path) -> Stamp:
    """What tells that a file is another one; None where there is none."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


class Keys:
    """The keys of files, one on each line, read again when a file changes."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[Stamp, tuple[str, ...]]] = {}

    def of(self, file: str) -> tuple[str, ...]:
        """The keys in `file`; none where it cannot be read."""
        now = stamp(Path(file))
        known = self._known.get(file)
        if known is None or known[0] != now:
            try:
                text = Path(file).read_text(encoding="utf-8")
            except (OSError, ValueError):
                text = ""
            lines = (line.strip() for line in text.splitlines())
            known = self._known[file] = (now, tuple(line for line in lines if line))
        return known[1]

    def allow(self, file: str, headers: Mapping[str, str]) -> bool:
        """Whether a request with `headers` brings a key of `file`."""
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not given:
            given = headers.get("x-api-key", "")
        told = given.strip().encode("latin-1", "replace")  # as it came; servers decode it so
        right = [hmac.compare_digest(told, key.encode()) for key in self.of(file)]
        return any(right)
