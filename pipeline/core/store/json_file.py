"""JSON files that save work: where one is missing or damaged, the work is done again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from .publish import publish_text

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
