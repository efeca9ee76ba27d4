"""Messages on stderr; results go to stdout."""

from __future__ import annotations

import sys


def info(text: str) -> None:
    """Print a line about what is being done."""
    print(text, file=sys.stderr, flush=True)
