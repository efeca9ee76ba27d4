"""What a GGUF holds by its metadata: a model that can be served alone, or something else."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.core.errors import PipelineError

from .gguf import Header, whole

ADAPTER = "is a LoRA adapter, not a model", "pass its model, and this as lora=PATH"
PROJECTOR = "is a projector (mmproj), not a model", "pass its model, and this as mmproj=PATH"
DRAFT = (
    "is a draft for speculative decoding, not a model",
    "pass its model, and server.spec_draft_model=PATH server.spec_type=… (draft-mtp and others)",
)
PICTURES = (
    "is a diffusion model, for pictures or video, which llama.cpp does not run",
    "stable-diffusion.cpp runs it",
)
# By `general.type`, then by architecture: GGUF files that are no model to be served alone, and what
# to do with them.
KINDS = {
    "adapter": ADAPTER,
    "imatrix": ("is an importance matrix, not a model", "pass the model, and imatrix=PATH"),
    "controlvector": (
        "is a control vector, not a model",
        "pass its model, and server.control_vector=PATH",
    ),
    "wavtokenizer-dec": ("is a vocoder, for speech, not a model", "pass a language model"),
    **dict.fromkeys(("mmproj", "clip-vision", "clip"), PROJECTOR),
    **dict.fromkeys(("eagle3", "dflash", "gemma4-assistant"), DRAFT),
    # What stable-diffusion.cpp and ComfyUI write.
    **dict.fromkeys(("flux", "flux2", "sd1", "sd2", "sdxl", "sd3", "aura", "hidream"), PICTURES),
    **dict.fromkeys(("wan", "hyvid", "ltxv", "ltx", "cosmos", "lumina2", "qwen_image"), PICTURES),
    **dict.fromkeys(("pig", "chroma", "z_image", "kandinsky5"), PICTURES),
}
NO_ADAPTER = "is not a LoRA adapter in GGUF, by its metadata"


def is_projector(header: Header) -> bool:
    """Whether a GGUF is a projector."""
    kind = header.values.get("general.type")
    return header.architecture == "clip" or kind in ("mmproj", "clip-vision")


def is_adapter(header: Header) -> bool:
    """Whether a GGUF is a LoRA adapter."""
    is_lora = header.values.get("adapter.type") == "lora"
    return header.values.get("general.type") == "adapter" and is_lora


def require_adapter(header: Header, where: str) -> None:
    """Raise PipelineError where a GGUF is no LoRA adapter."""
    if is_adapter(header):
        return
    if header.values.get("general.type") in (None, "model"):
        raise PipelineError(f"{where}: is a model, not a LoRA adapter", "pass it as model=")
    raise PipelineError(f"{where}: {NO_ADAPTER}", "pass a LoRA adapter")


def require_model(headers: Sequence[Header], where: str) -> None:
    """Raise PipelineError where a GGUF, whole or split, is not a model. `headers` are those of all
    its parts, or the first alone where the others were not read."""
    first = headers[0]
    kind = KINDS.get(str(first.values.get("general.type"))) or KINDS.get(first.architecture)
    if kind is None and "adapter.type" in first.values:
        kind = ADAPTER
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
    if first.heads and None not in blocks and not any(0 in (known or ()) for known in blocks):
        return DRAFT
    return None
