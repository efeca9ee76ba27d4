"""llama.cpp's programs run in the sandbox: they get the model's files and their output, no more.

A model is untrusted and may exploit a program that reads it. The limits on memory and time follow
from the size of the weights.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from pipeline.core import environment, log
from pipeline.core.errors import PipelineError
from pipeline.core.sandbox import Sandbox, is_off, strength
from pipeline.core.store.publish import require_disk

from . import gguf
from .gguf import Header

GIB = 1024**3
HEADER_MEMORY = 4 * GIB  # for reading a header and computing from it
LARGEST_RESULT = 8  # times the weights: 4-bit ones that become 32-bit numbers
GPU_MEMORY = 16 * GIB  # a driver maps memory of its own
# Seconds to start, and bytes of weights a second on the slowest machine.
SLOWEST = {
    "header": (120, 1_000_000_000),
    "convert": (600, 5_000_000),
    "quantize": (600, 100_000),
}


def sandbox(
    program: Path,
    *,
    model: Path | None = None,
    read: Sequence[Path] = (),
    write: Sequence[Path] = (),
    weights: int = 0,
    copies: int = 0,
    memory: int = HEADER_MEMORY,
    gpus: bool | None = None,
) -> Sandbox:
    """For a program of llama.cpp that reads a model, a GGUF or so many bytes of `weights`, and may
    hold `copies` of them in memory beside `memory` bytes of its own.

    The files to be written are created here, since the program may not. `gpus` None: the name of
    the program's folder decides.
    """
    warn()
    if model:
        read, weights = [*gguf.shards(model), *read], gguf.file_bytes(model)
    for path in write:
        if not path.exists():  # to touch a folder fails oddly on a failing disk
            path.touch()
    if gpus is None:
        gpus = not program.resolve().parent.name.endswith("-cpu")
    return Sandbox(
        programs=[program],
        read=read,
        write=write,
        memory=(GPU_MEMORY if gpus else memory) + copies * weights,
        file_bytes=GIB + LARGEST_RESULT * weights,
        gpus=gpus,
    )


@cache
def warn() -> None:
    """Warn once about what the sandbox cannot limit here."""
    if (lacks := strength().lacks) and not is_off():  # which has its own warning
        log.info(
            f"warning: this system cannot limit {lacks} for programs that read a model "
            f"({strength().name}); docs/security.md says what would"
        )


def seconds(step: str, weights: int) -> float:
    """The time limit of a step: longer than the slowest machine takes for these weights."""
    start, bytes_a_second = SLOWEST[step]
    return start + weights / bytes_a_second


def read_made(made: Path) -> Header:
    """The header of a GGUF that a program has made. Raises PipelineError where it is not whole; of
    a full disk the programs do not always notice."""
    try:
        return gguf.read(made)
    except PipelineError:
        require_disk(made.parent)
        raise


def env() -> dict[str, str]:
    """The environment of a program that only reads and writes files."""
    return environment.tools(os.environ)
