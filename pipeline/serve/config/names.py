"""What an instance may be called: its name becomes a file's name and a model's name."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

LONGEST = 64
RESERVED = ("gateway",)  # runs beside the instances
DEVICES = {"con", "prn", "aux", "nul"}  # no names of files on Windows, whatever follows a dot
DEVICES |= {f"{port}{number}" for port in ("com", "lpt") for number in range(1, 10)}
FORBIDDEN = "/\\," + (':*?"<>|' if os.name == "nt" else "")


def wrong(name: str) -> str:
    """Why `name` cannot be an instance's, or nothing."""
    if not name or name != name.strip():
        return "a name must not be empty, nor begin or end with a space"
    if len(name) > LONGEST:
        return f"a name has at most {LONGEST} characters"
    if name.startswith(".") or name.endswith("."):
        return "a name must not begin or end with a dot"
    if name.casefold() in RESERVED:
        return "this name is reserved; take another one"
    if name.partition(".")[0].rstrip().casefold() in DEVICES:
        return "a name must not be that of a device on Windows"
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
