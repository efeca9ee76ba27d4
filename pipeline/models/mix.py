"""Mixes: quants whose types are chosen tensor by tensor, for a given size. Which types there
are, and how large a mix becomes; `mix_choice` chooses."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path

from msgspec import Struct

from pipeline.core.errors import PipelineError, UsageError
from pipeline.core.process import outcome
from pipeline.core.text import size

from . import gguf, tools
from .gguf import Header
from .gguf_format import padded
from .quants import TENSOR_TYPES, Budget, row_bytes

# Of the types that llama-quantize makes, those that a mix may have, the smallest first. All are
# for every backend; what is left out is ternary, or made for few models.
CANDIDATES = (
    *("iq2_xxs", "iq2_xs", "iq2_s", "q2_k", "iq3_xxs", "iq3_s", "q3_k", "iq4_xs", "iq4_nl"),
    *("q4_0", "q4_k", "q4_1", "q5_0", "q5_k", "q5_1", "q6_k", "q8_0"),
)
NEED_MATRIX = ("iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs")  # llama-quantize refuses them without one
# What llama-quantize calls a file by the type of most tensors; of an unquantized one it would not
# let tensors have types of their own.
FILE_TYPES = {"q3_k": "Q3_K_M", "q4_k": "Q4_K_M", "q5_k": "Q5_K_M", "f16": "Q8_0", "bf16": "Q8_0"}
OUTPUT = "output.weight"
HEADER_ROOM = 1024  # bytes that llama-quantize may add to the metadata: where the matrix is from
# `[   1/ 291] token_embd.weight - [ 4096, 32000, 1, 1], type = bf16, size = … MiB (q4_K)`:
# the type in brackets is there where it changes.
TENSOR = re.compile(
    r"^\[ *\d+/ *\d+\] +(.*?) +- \[([\d, ]+)\], type = +(\w+), size = .*?(?:\((\w+)\))? *$", re.M
)


class MixTensor(Struct, frozen=True, kw_only=True):
    """A tensor that llama-quantize quantizes; `shape` has the length of a row first, `kind` is its
    type before."""

    name: str
    shape: Sequence[int]
    kind: str

    @property
    def elements(self) -> int:
        return prod(self.shape)

    def bytes(self, kind: str) -> int:
        """What it takes in another type, with what it is padded by."""
        row, *rows = self.shape
        return padded(row_bytes(TENSOR_TYPES[kind][0], row) * prod(rows))

    def fits(self, kind: str) -> bool:
        """Whether its rows are made of that type's blocks, so that it can be made."""
        return self.shape[0] % TENSOR_TYPES[kind][1] == 0

    def candidates(self, *, is_weighed: bool) -> list[str]:
        """The types that it may get, its own among them. `is_weighed`: the matrix knows it."""
        own = self.kind if self.kind in ("f16", "bf16") else "f16"
        fit = [kind for kind in CANDIDATES if self.fits(kind)]
        return [*(kind for kind in fit if is_weighed or kind not in NEED_MATRIX), own]


class Weights(Struct, frozen=True, kw_only=True):
    """The tensors of a model that can be quantized, and the bytes and elements of all others.
    `start` is where the tensors begin in the file."""

    tensors: Sequence[MixTensor]
    other_bytes: int
    other_elements: int
    start: int

    @property
    def elements(self) -> int:
        return self.other_elements + sum(tensor.elements for tensor in self.tensors)

    def room(self, budget: Budget) -> int:
        """The bytes that `tensors` may take, for what llama-quantize calls so many bits per weight
        (all tensors, without metadata), or for a file of so many bytes."""
        if budget.bits:
            return int(budget.bits * self.elements / 8) - self.other_bytes
        return budget.bytes - self.start - HEADER_ROOM - self.other_bytes

    def file_bytes(self, room: int) -> int:
        """The most that the whole file has."""
        return self.start + HEADER_ROOM + self.other_bytes + room

    def bits(self, room: int) -> float:
        return (room + self.other_bytes) * 8 / self.elements


def look(program: Path, model: Path) -> Weights:
    """What llama-quantize can quantize of a GGUF, which may be a skeleton. Raises PipelineError."""
    output = dry_run(program, model, "Q8_0", options=["--tensor-type", "weight=q8_0"])
    tensors, bytes_, elements = list[MixTensor](), 0, 0
    for each, kind in tensors_of(output):
        if kind == "q8_0" and each.kind != kind:
            tensors.append(each)
        elif kind in TENSOR_TYPES:
            bytes_ += each.bytes(kind)
            elements += each.elements
    if not tensors:
        raise PipelineError(f"{model.name}: llama-quantize finds no tensor in it to quantize")
    headers = [gguf.read(path) for path in gguf.shards(model)]
    return Weights(
        tensors=tensors,
        other_bytes=bytes_,
        other_elements=elements,
        start=padded(sum(header.data for header in headers)),
    )


def tensors_of(output: str) -> Iterator[tuple[MixTensor, str]]:
    """The tensors in the output of a dry run, each with the type that it gets, in lower case."""
    for name, dimensions, before, after in TENSOR.findall(output):
        shape = [int(number) for number in dimensions.split(",")]
        while len(shape) > 2 and shape[-1] == 1:  # it prints four
            shape.pop()
        yield MixTensor(name=name, shape=shape, kind=before.lower()), (after or before).lower()


def dry_run(
    program: Path,
    model: Path,
    quant: str,
    matrix: Path | None = None,
    options: Sequence[str] = (),
    types: Path | None = None,
) -> str:
    """What llama-quantize prints of each tensor of `model`, whole or a skeleton; empty where it
    refuses. `types` is a list of types by tensor."""
    options = [*options, *(["--imatrix", str(matrix)] if matrix else [])]
    options += ["--tensor-type-file", str(types)] if types else []
    status, out, err = outcome(
        [program, *options, "--dry-run", model, quant],
        timeout=120,
        env=tools.env(),
        sandbox=tools.sandbox(program, model=model, read=[*filter(None, (matrix, types))]),
    )
    return "" if status else out + err


def limits(weights: Weights, weighed: Callable[[str], bool]) -> tuple[int, int]:
    """The bytes of the smallest and of the largest mix's tensors. `weighed` says of a tensor
    whether the matrix knows it."""
    sizes = [
        [tensor.bytes(kind) for kind in tensor.candidates(is_weighed=weighed(tensor.name))]
        for tensor in weights.tensors
    ]
    return sum(map(min, sizes)), sum(map(max, sizes))


def weighed(header: Header) -> Callable[[str], bool]:
    """Whether the matrix that is computed for a model will know a tensor."""
    return lambda name: ".blk." in f".{name}" or (name == OUTPUT and not header.is_encoder)


def require_possible(budget: Budget, weights: Weights, weighed: Callable[[str], bool]) -> int:
    """The bytes that the tensors of a mix may take; a file has never more than the largest mix.
    Raises UsageError where none is so small, or has so many bits."""
    least, most = limits(weights, weighed)
    room = weights.room(budget)
    if least <= room and (room <= most or budget.bytes):
        return min(room, most)
    low, high = (
        f"{bits:.2f}bpw ({size(weights.file_bytes(bytes_))})"
        for bits, bytes_ in zip(bit_limits(weights, weighed), (least, most), strict=True)
    )
    raise UsageError(
        f"quant={budget.text}: a mix of this model has from {low} to {high}",
        "pass a size between them, or another model",
    )


def bit_limits(weights: Weights, weighed: Callable[[str], bool]) -> tuple[float, float]:
    """The bits per weight of the smallest mix, rounded up, and of the largest, rounded down."""
    least, most = (weights.bits(bytes_) for bytes_ in limits(weights, weighed))
    return math.ceil(least * 100) / 100, math.floor(most * 100) / 100


def file_type(types: Mapping[str, str]) -> str:
    """What llama-quantize calls a file with these types: by the type that most of its tensors have;
    empty without any."""
    kind = max(Counter(types.values()).items(), key=lambda each: each[1], default=("", 0))[0]
    return FILE_TYPES.get(kind, kind.upper())
