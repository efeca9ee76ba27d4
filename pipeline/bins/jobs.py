"""How many compilers run at once: what the processors allow, and what the memory does."""

from __future__ import annotations

GIB = 1024**3
# Peak of one compiler, in bytes. nvcc's and its kin's are measured on the largest kernels.
NEEDS = {"cuda": 2 * GIB, "hip": 2 * GIB, "sycl": 2 * GIB}
USUAL = GIB


def jobs(backend: str, processors: int, memory: int) -> int:
    """At least one; `memory` is what is free, in bytes."""
    return max(1, min(processors, memory // NEEDS.get(backend, USUAL)))
