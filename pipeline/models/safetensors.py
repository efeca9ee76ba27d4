"""Read the headers of safetensors files: what they hold, and whether they are complete.

The layout: 8 bytes of length (little endian), that many bytes of JSON, then the data, in which the
tensors lie without gaps. Refused is what the format's own library refuses (`Metadata::validate` of
its tensor.rs), and what other readers would read differently, such as a name that is there twice.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta, Struct, ValidationError, convert

from pipeline.core.errors import PipelineError
from pipeline.core.text import repeated

from . import contents
from .contents import Readable, shown

MAX_HEADER = 100_000_000  # bytes; the limit of the format's own library
MAX_VALUES = 2_000_000  # of JSON, which bounds its memory; 100,000 tensors have 1.4 million

# Bits of an element, by type.
BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **{"F6_E2M3": 6, "F6_E3M2": 6, "F4": 4},
}
# The type in which the converter keeps a source's precision.
OUTTYPES = {"F64": "F32", "F32": "F32", "F16": "F16", "BF16": "BF16"}

AGAIN = "download or copy it again"
Count = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]


class Head(Struct, frozen=True, kw_only=True):
    """The header of one file: its length in bytes, the shapes of the tensors by name, the data's
    bytes by element type, and the elements."""

    length: int
    shapes: Mapping[str, list[int]]
    dtypes: Counter[str]
    elements: int


class Tensor(Struct, frozen=True, forbid_unknown_fields=True):
    dtype: str
    shape: Annotated[list[Count], Meta(max_length=64)]  # as many dimensions as PyTorch has at most
    data_offsets: tuple[Count, Count]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.data_offsets[1] - self.data_offsets[0]


# What holds for every tensor, in this order, and what is wrong with one for which it does not.
TENSOR_RULES: tuple[tuple[Callable[[Tensor], bool], str], ...] = (
    (lambda t: t.dtype in BITS, "has the type {dtype}, which is not known"),
    (lambda t: t.bytes >= 0, "ends before it begins: {t.data_offsets}"),
    (
        lambda t: t.elements * BITS[t.dtype] == t.bytes * 8,
        "has {t.bytes} bytes, which is not what the shape {shape} takes as {dtype}",
    ),
)


def head(file: Readable) -> Head:
    """The header of a file. Raises PipelineError where the file is damaged or incomplete."""
    name = file.name
    count = int.from_bytes(file.get(0, 8), "little") if file.size >= 8 else 0
    if not 2 <= count <= min(MAX_HEADER, file.size - 8):
        start = file.get(0, min(file.size, contents.START))
        kind = None if start[8:9] == b"{" else contents.foreign(start)
        what, hint = kind or ("is not a safetensors file, or is cut short", AGAIN)
        raise contents.ForeignFile(f"{name}: {what}", hint)
    tensors = _tensors(file.get(8, 8 + count), name)
    dtypes: Counter[str] = Counter()
    at = 0
    for key, tensor in sorted(tensors.items(), key=lambda item: item[1].data_offsets):
        for holds, problem in TENSOR_RULES:
            if not holds(tensor):
                text = problem.format(
                    t=tensor, dtype=shown(tensor.dtype), shape=shown(tensor.shape)
                )
                raise PipelineError(f"{name}: its tensor {shown(key)} {text}")
        begin, end = tensor.data_offsets
        if begin != at:
            raise PipelineError(f"{name}: its tensors overlap or leave gaps, at byte {begin}")
        dtypes[tensor.dtype] += end - begin
        at = end
    if file.size != 8 + count + at:
        raise PipelineError(
            f"{name}: has {file.size} bytes, its header needs {8 + count + at}", AGAIN
        )
    return Head(
        length=8 + count,
        shapes={name: tensor.shape for name, tensor in tensors.items()},
        dtypes=dtypes,
        elements=sum(tensor.elements for tensor in tensors.values()),
    )


def _tensors(header: bytes, name: str) -> dict[str, Tensor]:
    """The table of tensors in the JSON of a header. Raises PipelineError."""
    if sum(map(header.count, (b"{", b"[", b",", b":"))) > MAX_VALUES:  # each value needs one
        raise PipelineError(f"{name}: its header holds more values than any model needs")
    try:
        if not header.startswith(b"{"):
            raise ValueError("its header is not an object")
        table = json.loads(header.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise PipelineError(f"{name}: cannot be read as safetensors: {shown(error)}") from None
    try:
        convert(table.pop("__metadata__", {}), dict[str, str])
        return convert(table, dict[str, Tensor])
    except ValidationError as error:
        raise PipelineError(
            f"{name}: its header is not that of a safetensors file: {shown(error)}"
        ) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. Raises ValueError where a key is there twice: readers differ in which one
    they take."""
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError(f"{shown(repeated(key for key, _ in pairs)[0])} is there twice")
    return table


def read(path: Path) -> Head:
    """The header of one file, which must be complete. Raises PipelineError."""
    return head(contents.local(path))


def own_precision(dtypes: Counter[str]) -> str:
    """The unquantized type that keeps the precision of most of the bytes.

    What the converter unpacks (FP8 and the like) becomes BF16.
    """
    largest = dtypes.most_common(1)
    return OUTTYPES.get(largest[0][0], "BF16") if largest else "BF16"
