"""How much memory a model takes, as llama.cpp itself would allocate it, and which context fits."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline.core import notes
from pipeline.core.process import capture

from .gguf import Header

MIB = 1024 * 1024
SMALLEST_CONTEXT = 4096  # tokens; never reduced below this
STEP = 256  # tokens; llama.cpp pads its cache to this
MARGIN = 256 * MIB  # for the server itself and whoever else wants some


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes for weights, cache and compute buffers."""

    weights: int
    context: int
    compute: int

    @property
    def total(self) -> int:
        return self.weights + self.context + self.compute


@dataclass(frozen=True, slots=True)
class Fit:
    """A context in tokens, what it takes (None: not known) and what there is, in bytes."""

    ctx_size: int
    memory: Memory | None
    available: int
    trained: int

    @property
    def fits(self) -> bool:
        return self.memory is None or self.memory.total + MARGIN <= self.available


def available() -> int:
    """Bytes that a new process could have, a container's limit included."""
    import psutil

    free = int(psutil.virtual_memory().available)
    try:
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        if limit == "max":
            return free
        used = int((group / "memory.current").read_text(encoding="ascii"))
        # Files read lately count as used there, and give way when memory is asked for.
        told = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return max(0, min(free, int(limit) - used + int(told.get("inactive_file", 0))))
    except (OSError, ValueError):
        return free


def parse(text: str) -> Memory | None:
    """The sum over the devices of llama-fit-params' table, which is in MiB."""
    rows = re.findall(r"^\S+ (\d+) (\d+) (\d+)\s*$", text, re.M)
    if not rows:
        return None
    weights, context, compute = (sum(int(row[i]) for row in rows) * MIB for i in range(3))
    return Memory(weights, context, compute)


def measure(
    program: Path, build: str, model: Path, options: list[str], ctx_size: int, book: Path
) -> Memory | None:
    """What `model` takes at this context; asked of llama-fit-params once, then noted."""
    question = f"{build} {ctx_size} {' '.join(options)}"
    stamp = notes.stamp(model)
    known = notes.recall(book, model) or {}
    if question not in known:
        found = parse(
            capture(
                [program, "-m", model, "-c", str(ctx_size), *options, "-fitp", "on", "--no-repack"],
                timeout=120,
            )
            or ""
        )
        if found is None:
            return None
        known[question] = [found.weights, found.context, found.compute]
        notes.remember(book, model, known, stamp)
    return Memory(*known[question])


def fit(
    header: Header,
    asked: int | None,
    room: int,
    measured: Callable[[int], Memory | None],
) -> Fit:
    """The context asked for, or the longest up to the trained one that fits into `room` bytes."""
    trained = header.context_length or SMALLEST_CONTEXT
    if asked:
        return Fit(asked, measured(asked), room, trained)
    best = Fit(trained, measured(trained), room, trained)
    if best.fits or trained <= SMALLEST_CONTEXT:
        return best
    low, high = SMALLEST_CONTEXT, -(-trained // STEP) * STEP
    best = Fit(low, measured(low), room, trained)
    while best.fits and high - low > STEP:
        middle = (low + high) // 2 // STEP * STEP
        if middle in (low, high):
            break
        tried = Fit(middle, measured(middle), room, trained)
        low, high, best = (middle, high, tried) if tried.fits else (low, middle, best)
    return best
