"""quant=auto for models that are converted here: the decision is kept until refresh=1.

With less free memory another quant would be chosen, and a second run must find the same file.
"""

from __future__ import annotations

from pathlib import Path

from pipeline.core.paths import Home
from pipeline.core.store import json_file
from pipeline.core.store.locks import only_one

from . import quants
from .quants import QuantRequest
from .resolve import Resolved

# Best first. None needs an importance matrix, and more bits than Q8_0's make hardly any difference.
CANDIDATES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K")


def candidates(requested: QuantRequest) -> tuple[str, ...]:
    """The quants to choose from: what the converter writes itself has no use for an importance
    matrix or keep_f16."""
    if requested.imatrix or requested.keep_f16:
        return tuple(quant for quant in CANDIDATES if quant not in quants.DIRECT)
    return CANDIDATES


def path(home: Home, resolved: Resolved, requested: QuantRequest, ctx_size: int | None) -> Path:
    """The file with the decision for a model at a context size."""
    key = f"{ctx_size or 'smallest'}-{candidates(requested)[0].lower()}"
    return home.models / "resolved" / f"{resolved.slug}__auto-{key}.json"


def store(path: Path, quant: str, why: str) -> None:
    """Store a decision."""
    with only_one(path):
        json_file.write(path, {"quant": quant, "why": why})


def stored(path: Path) -> str:
    """The quant decided on; empty where no usable decision is stored."""
    quant = json_file.read(path, lambda decision: str(decision["quant"]))
    return quant if quant in quants.TYPES else ""
