"""How many compilers run at once: what the processors allow, and what the memory does."""

from __future__ import annotations

from pipeline.core import log
from pipeline.core.text import size

GIB = 1024**3
# Peak of one compiler, in bytes, measured on the largest sources of each.
NEEDS = {"cuda": 2 * GIB, "hip": 2 * GIB, "sycl": 2 * GIB, "vulkan": 2 * GIB}
USUAL = GIB


def jobs(asked: int | None, backend: str, processors: int, memory: int) -> int:
    """How many to run: those asked for, or one for each processor, as far as the memory that is
    free (bytes) allows. At least one. Says where that is less than was asked for."""
    fit = max(1, memory // NEEDS.get(backend, USUAL))
    if asked and asked > fit:
        log.info(
            f"jobs={asked}: {fit} are run, for which the free memory is enough ({size(memory)})"
        )
    return min(asked or max(1, processors), fit)
