"""Control vectors: whether they fit their model. Only headers are read.

llama-server (common/common.cpp) logs one that does not fit, and serves the model without it, and
without its LoRA adapters. All of that is refused here.
"""

from __future__ import annotations

import re
from pathlib import Path

from . import gguf

DIRECTION = re.compile(r"direction\.0*([1-9]\d{0,5})(?!\d)", re.A)  # the number is a layer's


def misfit(vector: Path, model: Path) -> str:
    """Why the file `vector` is no control vector for the GGUF `model`; empty where it is one.
    Raises PipelineError for a file that is not a GGUF."""
    shapes: dict[str, list[int]] = {}
    gguf.read(vector, shapes)
    own = gguf.read(model)
    if not shapes:
        return "holds no directions"
    width = gguf.whole(own.values, f"{own.architecture}.embedding_length", 0)
    layers = gguf.whole(own.values, f"{own.architecture}.block_count", 0)
    for name, shape in shapes.items():
        direction = DIRECTION.match(name)
        if direction is None:
            return f"is not a control vector: it holds {name}"
        if width and shape != [width]:
            size = " × ".join(map(str, shape))
            return f"has {size} numbers for a layer, and the model has {width}"
        if 0 < layers < int(direction[1]):
            return f"changes layer {direction[1]}, and the model has {layers}"
    return ""
