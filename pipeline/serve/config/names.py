"""What an instance may be called: its name becomes a file's name and a model's name."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

LONGEST = 64
FORBIDDEN = "/\\," + (':*?"<>|' if os.name == "nt" else "")


def wrong(name: str) -> str:
    """Why `name` cannot be an instance's, or nothing."""
    if not name or name != name.strip():
        return "a name must not be empty, nor begin or end with a space"
    if len(name) > LONGEST:
        return f"a name has at most {LONGEST} characters"
    if name.startswith("."):
        return "a name must not begin with a dot"
    if any(sign in FORBIDDEN or not sign.isprintable() for sign in name):
        return f"a name must not hold any of {' '.join(FORBIDDEN)} or control characters"
    return ""


def alike(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """The names that differ from an earlier one only in letter case, after it."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(name.casefold(), name)
        if other != name:
            yield other, name
