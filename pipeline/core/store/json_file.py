"""JSON files that save work: where one is missing or damaged, the work is done again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pipeline.core.process import WINDOWS, private

from .publish import part, publish_text

REPLACE_SECONDS = 1.0  # Windows: a file cannot be replaced while somebody reads it
T = TypeVar("T")


def read(path: Path, parse: Callable[[Any], T]) -> T | None:
    """What `parse` makes of the document at `path`; None where it is missing, damaged, or not what
    `parse` expects."""
    try:
        return parse(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def write(path: Path, value: object, *, indent: int | None = None) -> None:
    """Publish a document whole or not at all. Raises OSError."""
    publish_text(path, json.dumps(value, indent=indent) + "\n")


def write_private(path: Path, value: object) -> None:
    """Replace a document whole, readable by this user alone. It is not flushed: for what is
    useless after a power cut. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    made = part(path)
    try:
        with open(made, "w", encoding="utf-8", opener=private) as file:
            file.write(json.dumps(value))  # `dump` takes several times as long
        _replace(made, path)
    finally:
        made.unlink(missing_ok=True)


def _replace(made: Path, path: Path) -> None:
    deadline = time.monotonic() + REPLACE_SECONDS
    while True:
        try:
            made.replace(path)
            return
        except PermissionError:
            if not WINDOWS or time.monotonic() > deadline:
                raise
        time.sleep(0.02)
