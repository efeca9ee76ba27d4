"""Read the headers of safetensors files: what they hold, and whether they are complete.

The layout: 8 bytes of length (little endian), that many bytes of JSON, then the data.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from msgspec import Struct, ValidationError, convert

from pipeline.core.errors import PipelineError

from . import contents
from .contents import Readable

MAX_HEADER = 100_000_000  # bytes; the limit of the format's own library

# The type in which the converter keeps a source's precision.
OUTTYPES = {"F64": "F32", "F32": "F32", "F16": "F16", "BF16": "BF16"}


class Head(Struct, frozen=True, kw_only=True):
    """The header of one file: its own bytes, the shapes of the tensors by name, the data's bytes by
    element type, and the elements."""

    raw: bytes
    shapes: Mapping[str, list[int]]
    dtypes: Counter[str]
    elements: int


class Tensor(Struct, frozen=True):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


def head(file: Readable) -> Head:
    """The header of a file. Raises PipelineError where the file is damaged or incomplete."""
    name = file.name
    count = int.from_bytes(file.get(0, 8), "little") if file.size >= 8 else 0
    if not 2 <= count <= min(MAX_HEADER, file.size - 8):
        what, hint = contents.foreign(file.get(0, min(file.size, contents.START))) or (
            "is not a safetensors file, or is cut short",
            "download or copy it again",
        )
        raise contents.ForeignFile(f"{name}: {what}", hint)
    header_bytes = file.get(8, 8 + count)
    try:
        header = json.loads(header_bytes)
    except (ValueError, RecursionError) as error:
        raise PipelineError(f"{name}: cannot be read as safetensors: {error}") from None
    try:
        header.pop("__metadata__", None)
        tensors = convert(header, dict[str, Tensor])
    except (AttributeError, TypeError, ValidationError):
        raise PipelineError(f"{name}: its header is not that of a safetensors file") from None
    dtypes: Counter[str] = Counter()
    at = 0
    for tensor in sorted(tensors.values(), key=lambda tensor: tensor.data_offsets):
        begin, end = tensor.data_offsets
        if not at == begin <= end:  # the format knows neither gaps nor overlaps
            raise PipelineError(f"{name}: its tensors overlap or leave gaps, at byte {begin}")
        dtypes[tensor.dtype] += end - begin
        at = end
    if file.size != 8 + count + at:
        raise PipelineError(
            f"{name}: has {file.size} bytes, its header needs {8 + count + at}",
            "download or copy it again",
        )
    return Head(
        raw=count.to_bytes(8, "little") + header_bytes,
        shapes={name: tensor.shape for name, tensor in tensors.items()},
        dtypes=dtypes,
        elements=sum(math.prod(max(0, n) for n in t.shape) for t in tensors.values()),
    )


def read(path: Path) -> Head:
    """The header of one file, which must be complete. Raises PipelineError."""
    try:
        return head(contents.local(path, str(path)))
    except OSError as error:
        raise PipelineError(f"{path}: cannot be read as safetensors: {error}") from None


def own_precision(dtypes: Counter[str]) -> str:
    """The unquantized type that keeps the precision of most of the bytes.

    What the converter unpacks (FP8 and the like) becomes BF16.
    """
    largest = dtypes.most_common(1)
    return OUTTYPES.get(largest[0][0], "BF16") if largest else "BF16"
