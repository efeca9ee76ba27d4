"""Read the headers of safetensors files: what they hold, and whether they are whole.

The layout: 8 bytes of length (little endian), that many bytes of JSON, then the data.
"""

from __future__ import annotations

import json
import operator
from collections import Counter
from pathlib import Path

from pipeline.core.errors import PipelineError

MAX_HEADER = 100_000_000  # bytes; the limit of the format's own library

# The type in which the converter keeps a source's precision.
OUTTYPES = {"F64": "F32", "F32": "F32", "F16": "F16", "BF16": "BF16"}


def dtypes(path: Path) -> Counter[str]:
    """Bytes by element type of one file, which must be whole. Raises PipelineError."""
    try:
        length = path.stat().st_size
        with path.open("rb") as file:
            head = int.from_bytes(file.read(8), "little")
            if not 2 <= head <= min(MAX_HEADER, length - 8):
                raise PipelineError(f"{path}: is no safetensors file, or is cut short")
            header = json.loads(file.read(head))
    except (OSError, ValueError, RecursionError) as error:
        raise PipelineError(f"{path}: cannot be read as safetensors: {error}") from None
    found: Counter[str] = Counter()
    end = 0
    try:
        for name, tensor in header.items():
            if name != "__metadata__":
                start, stop = map(operator.index, tensor["data_offsets"])
                if not 0 <= start <= stop:
                    raise ValueError(name)
                found[str(tensor["dtype"])] += stop - start
                end = max(end, stop)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise PipelineError(f"{path}: its header is not that of a safetensors file") from None
    if length != 8 + head + end:
        raise PipelineError(
            f"{path}: has {length} bytes, its header needs {8 + head + end}",
            "download or copy it again",
        )
    return found


def own_precision(found: Counter[str]) -> str:
    """The unquantized type that keeps the precision of most of the bytes.

    What the converter unpacks (FP8 and the like) becomes BF16.
    """
    most = found.most_common(1)
    return OUTTYPES.get(most[0][0], "BF16") if most else "BF16"
