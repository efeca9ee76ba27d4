"""API keys: read from files, compared in constant time, never shown."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from pathlib import Path

from pipeline.serve.keys import keys_of
from pipeline.serve.supervisor.state import Stamp, stamp


class Keys:
    """The keys of files, read again when a file changes."""

    def __init__(self) -> None:
        self._cache: dict[str, tuple[Stamp, tuple[str, ...]]] = {}

    def of(self, file: str) -> tuple[str, ...]:
        """The keys in `file`; none where it cannot be read."""
        current = stamp(Path(file))
        cached = self._cache.get(file)
        if cached is None or cached[0] != current:
            try:
                cached = current, keys_of(Path(file))
            except OSError:
                cached = current, ()
            self._cache[file] = cached
        return cached[1]

    def allow(self, file: str, headers: Mapping[str, str]) -> bool:
        """Whether a request with `headers` carries a key of `file`."""
        scheme, _, token = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            token = headers.get("x-api-key", "")
        sent = token.strip().encode("latin-1", "replace")  # the bytes as sent: servers decode so
        matches = [hmac.compare_digest(sent, key.encode()) for key in self.of(file)]
        return any(matches)
