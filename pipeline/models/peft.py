"""LoRA adapters as PEFT saves them: whether llama.cpp's converter makes a GGUF of one that does the
same, from its config and the header of its weights."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.core.errors import PipelineError

from .gguf import Header, whole

Shapes = Mapping[str, list[int]]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BASE_CONFIG = "config.json"  # the model's; some trainers put it beside the adapter
PICKLED = "adapter_model.bin"
PAIR = re.compile(
    r"(base_model\.model\.)?(?P<name>.+?)"
    r"(\.lora_(?P<part>[AB])\.weight|\.lora_embedding_(?P<of_words>[AB]))"
)
AGAIN = "get it again from where the adapter came from"
PLAIN = "train it without, or merge it into its model and pass that as model="
# What the converter drops or takes for something else, by the key that turns it on.
UNSUPPORTED = {
    "use_dora": "is a DoRA",
    "use_qalora": "is a QALoRA",
    "lora_bias": "has biases",
    "modules_to_save": "replaces whole modules",
    "trainable_token_indices": "replaces tokens",
    "layer_replication": "repeats layers",
    "alpha_pattern": "has another alpha for some modules",
    "fan_in_fan_out": "holds transposed weights",
}
REPLACED = ("pissa", "olora", "corda")  # init_lora_weights: the model's own weights are others, too
# Where the numbers of a model's config.json stand in a GGUF.
SIZES = {"hidden_size": "embedding_length", "num_hidden_layers": "block_count"}


def files(names: Collection[str], where: str) -> list[str]:
    """The files of an adapter among the `names` of a folder or repository. Raises PipelineError
    that names what is there instead."""
    if CONFIG in names and WEIGHTS in names:
        return [CONFIG, WEIGHTS]
    if WEIGHTS in names:
        what, hint = f"has {WEIGHTS}, but no {CONFIG}", AGAIN
    elif PICKLED in names:
        what = f"has its weights only as {PICKLED}: loading that runs code, so it is not used"
        hint = f"save it as {WEIGHTS} where you trust it, or get the adapter as GGUF"
    elif CONFIG in names:
        what, hint = f"has {CONFIG}, but no {WEIGHTS}", AGAIN
    elif any(name.endswith((".safetensors", ".gguf")) for name in names):
        what, hint = "holds no LoRA adapter", "a model is passed as model="
    else:
        what = "holds no LoRA adapter"
        hint = f"an adapter is a GGUF, or {CONFIG} and {WEIGHTS} in one folder"
    raise PipelineError(f"{where}: {what}", hint)


def require_convertible(config: Mapping[str, Any], shapes: Shapes, where: str) -> None:
    """Raise PipelineError where the converter would make nothing of an adapter, or something else.
    `shapes` are those of its tensors."""
    for key, why, hint in _hindrances(config):
        shown = json.dumps(config.get(key))[:60]
        raise PipelineError(f"{where}: {CONFIG}: {key} = {shown}: {why}", hint)
    if not shapes:
        raise PipelineError(f"{where}: {WEIGHTS} holds no tensors", AGAIN)
    for name, a, b in pairs(shapes, where):
        if min(len(a), len(b)) < 2 or a[-2] != b[-1]:
            raise PipelineError(
                f"{where}: {name}: its two tensors have the shapes {a} and {b}, which cannot be "
                "multiplied",
                AGAIN,
            )


def _hindrances(config: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """The keys that the converter cannot do with what they say, each with the reason and a hint."""
    if config.get("peft_type") != "LORA":
        yield "peft_type", "only LORA can be converted", "use a LoRA adapter"
    for key, why in UNSUPPORTED.items():
        if config.get(key):
            yield key, f"the adapter {why}, which llama.cpp cannot do", PLAIN
    if str(config.get("init_lora_weights")).lower().startswith(REPLACED):
        yield "init_lora_weights", "the adapter fits a model with changed weights alone", PLAIN
    for key in ("r", "lora_alpha"):
        value = config.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
            yield key, "must be a number above 0", AGAIN
    if config.get("use_rslora") and config.get("rank_pattern"):
        yield "rank_pattern", "llama.cpp has one scale for all ranks of an rsLoRA", PLAIN


def pairs(shapes: Shapes, where: str) -> Iterator[tuple[str, list[int], list[int]]]:
    """Each tensor of the model that is changed, with the shapes of A, rank × in, and B, out × rank.
    Raises PipelineError for what is no such pair."""
    known: dict[str, dict[str, list[int]]] = {}
    for name, shape in shapes.items():
        match = PAIR.fullmatch(name)
        if match is None:
            raise PipelineError(f"{where}: holds {name}, which is no part of a LoRA", PLAIN)
        part = match["part"] or match["of_words"]
        known.setdefault(f"{match['name']}.weight", {})[part] = shape
    for name, parts in known.items():
        if len(parts) < 2:
            raise PipelineError(f"{where}: has only one of the two tensors for {name}", AGAIN)
        yield name, parts["A"], parts["B"]


def difference(adapter: Shapes, model: Shapes) -> str:
    """Why an adapter does not fit a model in safetensors. What comes before the number of a layer
    may differ: versions of transformers name a model with an encoder in their own ways."""
    changed, names = [*pairs(adapter, "the adapter")], {_in_layer(name) for name in model}
    if not any(_in_layer(name) in names for name, _, _ in changed):
        return f"changes {changed[0][0]}, which the model has not"
    for name, a, b in changed:
        made, own = [b[-2], a[-1]], model.get(name)
        if own and len(own) == 2 and own not in (made, made[::-1]):  # of words it is turned
            return f"makes {name} {made[0]} × {made[1]}, the model's has {own[0]} × {own[1]}"
    return ""


def _in_layer(name: str) -> str:
    """A tensor's name from the number of its layer on."""
    return re.sub(r"^.*?(?=\b\d+\.)", "", name)


def other_base(config: Mapping[str, Any], model: Header) -> str:
    """Why `config`, the config.json of the model that an adapter was trained for, is not that of
    a GGUF."""
    table = config.get("text_config")
    table = table if isinstance(table, dict) else config
    for key, name in SIZES.items():
        theirs, own = table.get(key), whole(model.values, f"{model.architecture}.{name}", 0)
        # a GGUF counts a head that drafts among its layers
        if isinstance(theirs, int) and own and theirs not in (own, own - model.heads):
            return f"was trained for a model with {key} {theirs}, the model has {own}"
    return ""


def use_ranks(config: Path) -> None:
    """llama.cpp divides alpha by the rank; an rsLoRA is divided by its root, so that its staged
    config gets the alpha which makes both the same."""
    values = json.loads(config.read_bytes())
    if values.get("use_rslora"):
        values["lora_alpha"] *= math.sqrt(values["r"])
        config.unlink()  # it may be a link
        config.write_text(json.dumps(values), encoding="utf-8")
