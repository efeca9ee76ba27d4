"""Whether a LoRA adapter in GGUF changes the model that it is given to, by the rules of llama.cpp's
src/llama-adapter.cpp, from the headers of both.

llama-server ends at the first tensor that does not fit, after it has loaded the model, and says
nothing of an adapter without tensors, or of those that it leaves out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from . import gguf

Shapes = Mapping[str, list[int]]
A, B = ".lora_a", ".lora_b"


def problem(adapter: Path, model: Iterable[Path]) -> str:
    """Why the file `adapter` is no adapter for the model, whole or in parts; empty where it is one.
    Raises PipelineError for a file that is no GGUF."""
    own, parts = gguf.read(adapter), [*model]
    if own.values.get("general.type") != "adapter" or own.values.get("adapter.type") != "lora":
        return "is no LoRA adapter in GGUF, by its metadata"
    architecture = gguf.read(parts[0]).architecture
    if own.architecture != architecture:
        return f"is an adapter for {own.architecture}, and the model is {architecture}"
    shapes: dict[str, list[int]] = {}
    for part in parts:
        shapes |= gguf.shapes(part)
    return difference(gguf.shapes(adapter), shapes)


def difference(adapter: Shapes, model: Shapes) -> str:
    """Why an adapter with tensors of these shapes does not fit the model's."""
    if not adapter:
        return "holds no tensors"
    if ignored := [name for name in adapter if not name.endswith((A, B))]:
        return f"changes {ignored[0]}, which llama.cpp leaves as it is"
    for name in dict.fromkeys(tensor.removesuffix(A).removesuffix(B) for tensor in adapter):
        a, b, base = adapter.get(name + A), adapter.get(name + B), model.get(name)
        if a is None or b is None:
            return f"has only one of the two tensors for {name}"
        if base is None:
            return f"changes {name}, which the model has not"
        if min(len(a), len(b), len(base)) < 2:
            return f"changes {name}, which is not of two dimensions"
        is_embedding = name.endswith("token_embd.weight")  # its two are transposed
        made = [b[1], a[1]] if is_embedding else [a[0], b[1]]
        if made != base[:2] or (not is_embedding and a[1] != b[0]):
            return f"makes {name} {made[0]} × {made[1]}, the model's has {base[0]} × {base[1]}"
    return ""
