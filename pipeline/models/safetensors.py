"""Read the headers of safetensors files: what they hold, and whether they are complete.

The layout: 8 bytes of length (little endian), that many bytes of JSON, then the data.
"""

from __future__ import annotations

import json
import math
import operator
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from msgspec import Struct

from pipeline.core.errors import PipelineError

from . import contents

MAX_HEADER = 100_000_000  # bytes; the limit of the format's own library

# The type in which the converter keeps a source's precision.
OUTTYPES = {"F64": "F32", "F32": "F32", "F16": "F16", "BF16": "BF16"}


class Head(Struct, frozen=True, kw_only=True):
    """The header of one file: its own bytes, the names of the tensors, the data's bytes by element
    type, and the elements."""

    raw: bytes
    names: tuple[str, ...]
    dtypes: Counter[str]
    elements: int


def head(name: str, length: int, read: Callable[[int, int], bytes]) -> Head:
    """The header of the file `name` of `length` bytes, which `read(start, stop)` reads.

    Raises PipelineError where the file is damaged or incomplete.
    """
    start = read(0, 8) if length >= 8 else b""
    count = int.from_bytes(start, "little")
    if len(start) != 8 or not 2 <= count <= min(MAX_HEADER, length - 8):
        raise _unusable(name, read(0, min(length, contents.START)))
    raw = start + read(8, 8 + count)
    if len(raw) != 8 + count:
        raise PipelineError(f"{name}: its header could not be read to its end")
    try:
        header = json.loads(raw[8:])
    except (ValueError, RecursionError) as error:
        raise PipelineError(f"{name}: cannot be read as safetensors: {error}") from None
    dtypes: Counter[str] = Counter()
    elements, spans = 0, []
    try:
        for key, tensor in header.items():
            if key != "__metadata__":
                begin, end = map(operator.index, tensor["data_offsets"])
                if not 0 <= begin <= end:
                    raise ValueError(key)
                dtypes[str(tensor["dtype"])] += end - begin
                elements += math.prod(max(0, operator.index(n)) for n in tensor["shape"])
                spans.append((begin, end))
    except (AttributeError, KeyError, TypeError, ValueError):
        raise PipelineError(f"{name}: its header is not that of a safetensors file") from None
    at = 0
    for begin, end in sorted(spans):  # the format knows neither gaps nor overlaps
        if begin != at:
            raise PipelineError(f"{name}: its tensors overlap or leave gaps, at byte {begin}")
        at = end
    if length != 8 + count + at:
        raise PipelineError(
            f"{name}: has {length} bytes, its header needs {8 + count + at}",
            "download or copy it again",
        )
    names = tuple(key for key in header if key != "__metadata__")
    return Head(raw=raw, names=names, dtypes=dtypes, elements=elements)


def _unusable(name: str, start: bytes) -> PipelineError:
    """The error for what is no safetensors file: it names what it is, where that is known."""
    what, hint = contents.foreign(start) or (
        "is not a safetensors file, or is cut short",
        "download or copy it again",
    )
    return contents.ForeignFile(f"{name}: {what}", hint)


def read(path: Path) -> Head:
    """The header of one file, which must be complete. Raises PipelineError."""
    try:
        length = path.stat().st_size
        with path.open("rb") as file:

            def get(start: int, stop: int) -> bytes:
                file.seek(start)
                return file.read(stop - start)

            return head(str(path), length, get)
    except OSError as error:
        raise PipelineError(f"{path}: cannot be read as safetensors: {error}") from None


def own_precision(dtypes: Counter[str]) -> str:
    """The unquantized type that keeps the precision of most of the bytes.

    What the converter unpacks (FP8 and the like) becomes BF16.
    """
    largest = dtypes.most_common(1)
    return OUTTYPES.get(largest[0][0], "BF16") if largest else "BF16"
