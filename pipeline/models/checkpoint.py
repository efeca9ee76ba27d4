"""A model in safetensors, in a folder or a repository: its weights, and whether the official
converter can read them. Of the weights only headers are read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from msgspec import Struct

from pipeline.core.errors import PipelineError, UsageError, did_you_mean

from . import contents, quantized, staging, weights
from .safetensors import Head

ENCODERS = ("vision_config", "audio_config")  # the tables that the converter looks for


class Checkpoint(Struct, frozen=True):
    """The names of the weight files, the architecture as config.json has it, the weights' bytes by
    element type, and the architecture of its encoder of images or sound, if it has one."""

    weights: list[str]
    architecture: str
    dtypes: Counter[str]
    encoder: str


def check(
    where: str,
    sizes: Mapping[str, int],
    read: Callable[[str], bytes],
    read_heads: Callable[[list[str]], Sequence[Head]],
    architectures: frozenset[str] = frozenset(),
) -> Checkpoint:
    """The checkpoint among files of these sizes in bytes, which `read` reads by name. `read_heads`
    reads the headers of all weight files, or of as many as stand for all.

    `architectures` are those that the converter knows; empty means not known yet.
    Raises PipelineError.
    """

    def table(name: str) -> dict[str, Any]:
        return document(read(name), f"{where}: {name}") if name in sizes else {}

    visible = {n: size for n, size in sizes.items() if not PurePosixPath(n).name.startswith(".")}
    try:
        names = weights.choose(visible, lambda: read(weights.INDEX), where)
    except PipelineError:
        # EXL2 and others have weights of other names.
        quantized.require_readable(table("config.json"), {}, (), {}, where)
        raise
    if "config.json" not in sizes:
        raise PipelineError(
            f"{where}: has no config.json, which the converter needs",
            "a model holds config.json, *.safetensors and the tokenizer's files; look for it in "
            "the Transformers layout, or for a GGUF of it",
        )
    config_bytes, config_name = read("config.json"), f"{where}: config.json"
    config = document(config_bytes, config_name)
    named = architecture(config, config_name)
    of_text = _named(config, "text_config") or named
    if named not in architectures:  # the converter takes the one of the text first
        require_known(of_text, architectures, config_name)
    staging.require_plausible(config_bytes, sum(sizes[name] for name in names), config_name)
    heads = read_heads(names)
    tensors = [name for head in heads for name in head.names]
    if not tensors:
        raise PipelineError(f"{where}: its weights hold no tensor", "get the model's own weights")
    dtypes = sum((head.dtypes for head in heads), Counter[str]())
    quantized.require_readable(config, table(quantized.MODELOPT_FILE), tensors, dtypes, where)
    has_encoder = any(isinstance(config.get(name), dict) for name in ENCODERS)
    encoder = (_named(config, "vision_config") or named) if has_encoder else ""
    return Checkpoint(names, of_text, dtypes, encoder)


def architecture(config: Mapping[str, Any], where: str) -> str:
    """The architecture that a config.json names. Raises PipelineError where it names none."""
    named = config.get("architectures")
    if not (isinstance(named, list) and named and isinstance(named[0], str)):
        raise PipelineError(f"{where}: names no architecture", 'add "architectures": ["…"]')
    return named[0]


def _named(config: Mapping[str, Any], part: str) -> str:
    """The architecture that a part of a configuration names; empty for none."""
    table = config.get(part)
    named = table.get("architectures") if isinstance(table, dict) else None
    return named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""


def document(data: bytes, where: str) -> dict[str, Any]:
    """A JSON document of a model, which is a table. Raises PipelineError."""
    contents.require_no_placeholder(data, where)
    try:
        content = json.loads(data)
        if not isinstance(content, dict):
            raise ValueError("it is no object")
        return content
    except (ValueError, RecursionError) as error:
        raise PipelineError(f"{where}: cannot be read as JSON: {error}") from None


def require_known(name: str, known: frozenset[str], where: str) -> None:
    """Raise UsageError where the converter does not know an architecture; none known: not yet."""
    if known and name not in known:
        raise UsageError(
            f"{where}: the architecture {name} is not known to this llama.cpp"
            f"{did_you_mean(name, sorted(known))}",
            "a newer llama.cpp may know it; pipeline/pins.toml says which one is used",
        )
