"""How big the quants of a model become, by dry runs of llama-quantize on its header alone."""

from __future__ import annotations

import math
import re
import struct
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from pipeline.core.process import outcome

from . import gguf, tools
from .quants import NEED_IMATRIX, TENSOR_TYPES, row_bytes

# `[   1/ 291] token_embd.weight - [ 4096, 32000, 1, 1], type = bf16, size = … MiB (q4_K)`:
# the type in brackets is there where it changes.
TENSOR = re.compile(
    r"^\[ *\d+/ *\d+\] .* - \[([\d, ]+)\], type = +(\w+), size = .*?(?:\((\w+)\))? *$", re.M
)
ALIGNMENT = 32  # GGUF_DEFAULT_ALIGNMENT; llama-quantize keeps no other
VERSION = "general.quantization_version"
ADDED = 45  # bytes, where it has to be added
# With an importance matrix llama-quantize chooses some types differently. A dry run does not use
# its values: one entry, `x`, with one value, in the older format.
MATRIX = struct.pack("<ii1siif", 1, 1, b"x", 1, 1, 1.0)


def quant_sizes(
    program: Path, skeleton: Path, quants: Iterable[str], *, imatrix: bool = False
) -> dict[str, int]:
    """The file size in bytes of each quant made from `skeleton`, split or not, as one file.

    `imatrix`: as made with an importance matrix; types that need one always are. A type that
    llama-quantize refuses for this model is left out.
    """
    first, *others = (gguf.read(path) for path in gguf.shards(skeleton))
    # The first part of a split one has the texts; the table of tensors is in all of them.
    start = first.data + sum(header.data for header in others)
    start += 0 if VERSION in first.values else ADDED
    sizes = {}
    with tempfile.TemporaryDirectory() as folder:
        matrix = Path(folder) / "imatrix.dat"
        matrix.write_bytes(MATRIX)
        for quant in quants:
            options = ["--imatrix", str(matrix)] if imatrix or quant in NEED_IMATRIX else []
            status, out, err = outcome(
                [program, *options, "--dry-run", skeleton, quant],
                timeout=120,
                env=tools.env(),
                sandbox=tools.sandbox(program, read=[*gguf.shards(skeleton), matrix]),
            )
            tensors = tensor_bytes(out + err)
            if status == 0 and tensors is not None:
                sizes[quant] = _padded(start) + tensors
    return sizes


def tensor_bytes(output: str) -> int | None:
    """The size of the tensors by the output of a dry run; None where it has none, or a type that is
    not known here."""
    total = 0
    for size in _sizes(output):
        if not size:
            return None
        total += _padded(size)
    return total or None


def _sizes(output: str) -> Iterator[int]:
    """Bytes of each tensor; 0 for a type that is not known here."""
    for shape, before, after in TENSOR.findall(output):
        kind = TENSOR_TYPES.get((after or before).lower())
        row, *rows = (int(number) for number in shape.split(","))
        yield 0 if kind is None else row_bytes(kind, row) * math.prod(rows)


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
