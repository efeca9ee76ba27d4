"""The tables of a registry of profiles: their keys, and what the values may be."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from pipeline.core.variables import NO, YES

from .tables import OPEN, OptionsTable, Text, gpu_ids

Count = Annotated[int, Field(ge=1)]


def _switch(value: Any) -> Any:
    """A word that means true or false, such as yes."""
    if isinstance(value, str) and value.lower() in YES | NO:
        return value.lower() in YES
    return value


Switch = Annotated[bool, BeforeValidator(_switch)]


def _joined(value: Any) -> Any:
    """A list of cards as CUDA reads it; an empty one hides all cards."""
    if isinstance(value, list):
        return ",".join(map(str, value)) or "none"
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


Cards = Annotated[
    str,
    BeforeValidator(_joined),
    AfterValidator(gpu_ids),
    WithJsonSchema(
        {"type": ["string", "integer", "array"], "items": {"type": ["string", "integer"]}}
    ),
]


class Open(BaseModel):
    """A table whose unknown keys are reported, and left out."""

    model_config = OPEN


class Tuning(Open):
    """What engines may be told, in words of no engine."""

    num_gpus: Annotated[int, Field(ge=0)] | None = None
    """How many cards it needs."""
    tensor_parallel_size: Count | None = None
    """Over how many cards each layer is spread: vLLM's."""
    max_model_len: Count | None = None
    """The longest text and answer together, in tokens."""
    max_batch_tokens: Count | None = None
    """Tokens that are computed at once."""
    max_concurrent_requests: Count | None = None
    """Requests that are answered at once."""
    gpu_memory_fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    """The part of a card's memory that it may use: vLLM's."""


class ProfileGpu(Tuning):
    """The cards of a profile."""

    device_ids: Cards | None = None
    """The cards it sees, in this order: [0, 1] or "0,1"; [] or "none" hides all."""


class LlamaCpp(OptionsTable):
    """Where the file is; every other key is an option of llama-server, `_` for `-`."""

    model_root: Text | None = None
    """The folder of hf_filename."""
    hf_repo_id: Text | None = None
    """A repository on Hugging Face: the file is downloaded where it is missing."""
    hf_filename: Text | None = None
    """The file, in model_root and in the repository."""
    gguf_path: Text | None = None
    """The file, said explicitly."""


class Vllm(OptionsTable):
    """Options of vLLM, `_` for `-`."""

    model: Text | None = None
    """A folder, or a name on Hugging Face; else model_id."""


class Profile(Tuning):
    """One server."""

    display_name: Text | None = None
    """What people call it."""
    task_type: Text | None = None
    """What it is for."""
    model_id: Text | None = None
    """The name that clients ask for."""
    supports_tools: Switch = False
    """Whether the model calls tools."""
    supports_embeddings: Switch = False
    """Turns the embedding endpoint on."""
    supports_vision: Switch = False
    """Whether the model sees pictures."""
    backend: Literal["llamacpp", "vllm"] = "llamacpp"
    """The program that serves."""
    gpu: ProfileGpu = Field(default_factory=ProfileGpu)
    llamacpp: LlamaCpp = Field(default_factory=LlamaCpp)
    vllm: Vllm = Field(default_factory=Vllm)


class Registry(Open):
    """A registry of profiles."""

    model_config = ConfigDict(title="Profiles of llama-server and vLLM")

    profiles: dict[str, Profile]
    """By name."""
