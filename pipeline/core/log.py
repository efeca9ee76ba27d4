"""What is being done, on stderr; results go to stdout."""

from __future__ import annotations

import sys


def info(text: str) -> None:
    """One line about what is being done."""
    print(text, file=sys.stderr, flush=True)
