"""quant=auto for what is made here: the decision of an earlier run, kept until refresh=1.

Another decision might be made when memory is fuller, and a second run must find the same file.
"""

from __future__ import annotations

from pathlib import Path

from pipeline.core.paths import Home
from pipeline.core.store import json_file
from pipeline.core.store.locks import only_one

from . import quants
from .chain import QuantRequest
from .resolve import Resolved

# What is chosen from, best first: none needs an importance matrix, and above Q8_0 more bits are
# hardly to be noticed.
CANDIDATES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K")


def candidates(wanted: QuantRequest) -> tuple[str, ...]:
    """What is chosen from for a request: an importance matrix and keep_f16 are of no use for what
    the converter writes itself."""
    if wanted.imatrix or wanted.keep_f16:
        return tuple(quant for quant in CANDIDATES if quant not in quants.DIRECT)
    return CANDIDATES


def path(home: Home, resolved: Resolved, wanted: QuantRequest, ctx_size: int | None) -> Path:
    """Where the decision between the candidates for a model at a context is kept."""
    question = f"{ctx_size or 'smallest'}-{candidates(wanted)[0].lower()}"
    return home.models / "resolved" / f"{resolved.slug}__auto-{question}.json"


def store(where: Path, quant: str, why: str) -> None:
    """Keep a decision."""
    with only_one(where):
        json_file.write(where, {"quant": quant, "why": why})


def stored(where: Path) -> str:
    """The quant decided on; empty where there is no decision that can be used."""
    quant = json_file.read(where, lambda decision: str(decision["quant"]))
    return quant if quant in quants.TYPES else ""
