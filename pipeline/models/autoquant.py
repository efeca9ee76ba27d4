"""quant=auto for what is made here: the decision of an earlier run, kept until refresh=1.

Another decision might be made when memory is fuller, and a second run must find the same file.
"""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.core.paths import Home
from pipeline.core.publish import publish_text

from . import quants
from .resolve import Resolved

# What is chosen from, best first: none needs an importance matrix, and above Q8_0 more bits are
# hardly to be noticed.
CANDIDATES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K")


def path(home: Home, resolved: Resolved, ctx_size: int | None) -> Path:
    """Where the decision for a model at a context is kept."""
    return home.models / "resolved" / f"{resolved.slug}__auto-{ctx_size or 'smallest'}.json"


def store(where: Path, quant: str, why: str) -> None:
    """Keep a decision."""
    where.parent.mkdir(parents=True, exist_ok=True)
    publish_text(where, json.dumps({"quant": quant, "why": why}) + "\n")


def stored(where: Path) -> str:
    """The quant decided on; empty where there is no decision that can be used."""
    try:
        found = json.loads(where.read_text(encoding="utf-8"))["quant"]
        return found if found in quants.TYPES else ""
    except (OSError, ValueError, TypeError, KeyError):
        return ""
