"""What a GGUF is that is no model to be served alone, by its metadata."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.core.errors import PipelineError

from .gguf import Header, whole

# By `general.type`, then by architecture: GGUF files that are no model to be served alone.
PROJECTOR = "is a projector (mmproj), not a model", "pass its model, and this as mmproj=PATH"
KINDS = {
    "adapter": ("is a LoRA adapter, not a model", "pass its model, and server.lora=PATH"),
    "imatrix": ("is an importance matrix, not a model", "pass the model, and imatrix=PATH"),
    **dict.fromkeys(("mmproj", "clip-vision", "clip"), PROJECTOR),
    "controlvector": (
        "is a control vector, not a model",
        "pass its model, and server.control_vector=PATH",
    ),
    "wavtokenizer-dec": ("is a vocoder, for speech, not a model", "pass a language model"),
}
DRAFTS = ("eagle3", "dflash", "gemma4-assistant")
DRAFT = (
    "is a draft for speculative decoding, not a model",
    ("pass its model, and server.model_draft=PATH"),
)
# What stable-diffusion.cpp and ComfyUI write.
PICTURES = (
    *("flux", "flux2", "sd1", "sd2", "sdxl", "sd3", "aura", "hidream", "wan", "hyvid", "ltxv"),
    *("ltx", "cosmos", "lumina2", "qwen_image", "pig", "chroma", "z_image", "kandinsky5"),
)
KINDS |= dict.fromkeys(DRAFTS, DRAFT)
KINDS |= dict.fromkeys(
    PICTURES,
    ("is a diffusion model, for pictures or video, which llama.cpp does not run",
     "stable-diffusion.cpp runs it"),
)  # fmt: skip


def require_model(headers: Sequence[Header], where: str) -> None:
    """Raise PipelineError where a GGUF, whole or split, is no model. `headers` are its parts', or
    the first one's of which no more is known."""
    first = headers[0]
    kind = KINDS.get(str(first.values.get("general.type"))) or KINDS.get(first.architecture)
    if kind is None and "adapter.type" in first.values:
        kind = KINDS["adapter"]
    if kind is None and first.shards <= len(headers):
        kind = _part(headers)
    if kind:
        raise PipelineError(f"{where}: {kind[0]}", kind[1])


def _part(headers: Sequence[Header]) -> tuple[str, str] | None:
    """What is wrong with a GGUF that holds a part of a model; None where it holds a whole one."""
    first, tensors = headers[0], sum(header.tensors for header in headers)
    if not tensors:
        return "holds a vocabulary and no weights", "get the model itself"
    expected = whole(first.values, "split.tensors.count", tensors)
    if expected != tensors:
        return (
            f"has {tensors} tensors in its parts, by its header {expected}",
            "put the parts of one model together, with their original names",
        )
    blocks = [header.blocks for header in headers]
    has_head = whole(first.values, f"{first.architecture}.nextn_predict_layers", 0)
    if has_head and None not in blocks and not any(0 in (known or ()) for known in blocks):
        return DRAFT
    return None
