"""LoRA adapters: their files, whether they can be converted, and whether they fit their model. Only
headers are read.

An adapter is a GGUF, or a folder as PEFT saves it, which llama.cpp's converter makes a GGUF of; the
converter drops what it does not know. llama-server (src/llama-adapter.cpp) ends at the first tensor
that does not fit, after it has loaded the model, and is silent about an adapter without tensors and
about tensors that it leaves out. All of that is refused here.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from pipeline.core.errors import PipelineError
from pipeline.core.paths import Home

from . import checkpoint, contents, gguf, kinds, resolve, safetensors, staging

Shapes = Mapping[str, list[int]]

# Files as PEFT names them.
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BASE_CONFIG = "config.json"  # the model's; some trainers put it beside the adapter
PICKLED = "adapter_model.bin"
PAIR = re.compile(
    r"(base_model\.model\.)?(?P<name>.+?)"
    r"(\.lora_(?P<part>[AB])\.weight|\.lora_embedding_(?P<of_words>[AB]))"
)
A, B = ".lora_a", ".lora_b"  # ends of the same tensors' names in a GGUF
DOWNLOAD = "get it again from where the adapter came from"
RETRAIN = "train it without, or merge it into its model and pass that as model="
# What the converter drops or misreads, by the key that turns it on.
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
REPLACED = ("pissa", "olora", "corda")  # init_lora_weights: they change the model's own weights too
# Sizes in a model's config.json, and where a GGUF has them.
SIZES = {"hidden_size": "embedding_length", "num_hidden_layers": "block_count"}


# The files of an adapter


def gguf_path(path: Path, home: Home) -> resolve.Resolved:
    """An adapter in GGUF that is used in place. Raises PipelineError where it is none."""
    kinds.require_adapter(gguf.read_cached(path, home.run), str(path))
    return resolve.in_place([path], "")


def check(
    names: Collection[str], readable: Callable[[str], contents.Readable], where: str
) -> tuple[list[str], str, str]:
    """The files of an adapter that PEFT saved among `names`, the type of its weights, and how its
    config names its model. `readable` opens a file. Raises PipelineError where the adapter cannot
    be converted."""

    def read(name: str) -> dict[str, Any]:
        return checkpoint.document(readable(name).whole(), f"{where}: {name}")

    files = peft_files(names, where)
    config, head = read(CONFIG), safetensors.head(readable(WEIGHTS))
    require_convertible(config, head.shapes, where)
    # Of use is only one that names its model's architecture.
    if BASE_CONFIG in names and checkpoint.named_architecture(read(BASE_CONFIG)):
        files.append(BASE_CONFIG)
    base_name = str(config.get("base_model_name_or_path") or "")
    return files, safetensors.own_precision(head.dtypes), base_name


def check_folder(path: Path) -> tuple[list[str], str, str]:
    """As `check`, of a folder. Raises PipelineError."""
    names = [file.name for file in path.iterdir() if file.is_file()]
    ggufs = sorted(name for name in names if name.endswith(".gguf"))
    if ggufs and {CONFIG, WEIGHTS}.isdisjoint(names):
        raise PipelineError(f"{path}: is a folder", f"pass the GGUF: lora={path / ggufs[0]}")
    return check(names, lambda name: contents.local(path / name), str(path))


def known_folder(path: Path, home: Home) -> resolve.Resolved | None:
    """As `folder`; None where a file has to be hashed."""
    files = [path / name for name in (CONFIG, WEIGHTS, BASE_CONFIG)]
    is_known = resolve.are_hashed((file for file in files if file.is_file()), home)
    return folder(path, home) if is_known else None


def folder(path: Path, home: Home) -> resolve.Resolved:
    """An adapter that PEFT saved, without its base. A file is hashed again when it has changed.
    Raises PipelineError where it cannot be converted."""
    names, precision, base_name = check_folder(path)
    files = [path / name for name in names]
    return resolve.of_folder(path, files, home, precision=precision, base_name=base_name)


def peft_files(names: Collection[str], where: str) -> list[str]:
    """The files of an adapter among the `names` of a folder or repository. Raises PipelineError
    that names what is there instead."""
    if CONFIG in names and WEIGHTS in names:
        return [CONFIG, WEIGHTS]
    if WEIGHTS in names:
        what, hint = f"has {WEIGHTS}, but no {CONFIG}", DOWNLOAD
    elif PICKLED in names:
        what = f"has its weights only as {PICKLED}: loading that runs code, so it is not used"
        hint = f"save it as {WEIGHTS} where you trust it, or get the adapter as GGUF"
    elif CONFIG in names:
        what, hint = f"has {CONFIG}, but no {WEIGHTS}", DOWNLOAD
    elif any(name.endswith((".safetensors", ".gguf")) for name in names):
        what, hint = "holds no LoRA adapter", "a model is passed as model="
    else:
        what = "holds no LoRA adapter"
        hint = f"an adapter is a GGUF, or {CONFIG} and {WEIGHTS} in one folder"
    raise PipelineError(f"{where}: {what}", hint)


# The config.json that it is converted with


def config_of(model: resolve.Resolved) -> resolve.Resolved | None:
    """What the converter reads of an adapter's base: the files beside the weights of a model, or of
    an adapter that brings its model's config.json. None where there is no config.json."""
    others = (CONFIG, ".safetensors", checkpoint.INDEX, ".gguf")
    files = tuple(file for file in model.files if not file.name.endswith(others))
    has_config = any(file.name == BASE_CONFIG for file in files)
    return replace(model, files=files, base=None) if has_config else None


# Whether the converter makes a GGUF that does the same


def require_convertible(config: Mapping[str, Any], shapes: Shapes, where: str) -> None:
    """Raise PipelineError where the converter would make nothing of an adapter, or something else.
    `shapes` are those of its tensors."""
    for key, why, hint in _obstacles(config):
        shown = json.dumps(config.get(key))[:60]
        raise PipelineError(f"{where}: {CONFIG}: {key} = {shown}: {why}", hint)
    if not shapes:
        raise PipelineError(f"{where}: {WEIGHTS} holds no tensors", DOWNLOAD)
    for name, a, b in pairs(shapes, where):
        if min(len(a), len(b)) < 2 or a[-2] != b[-1]:
            raise PipelineError(
                f"{where}: {name}: its two tensors have the shapes {a} and {b}, which cannot be "
                "multiplied",
                DOWNLOAD,
            )


def _obstacles(config: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """The keys whose values the converter cannot handle, each with the reason and a hint."""
    if config.get("peft_type") != "LORA":
        yield "peft_type", "only LORA can be converted", "use a LoRA adapter"
    for key, why in UNSUPPORTED.items():
        if config.get(key):
            yield key, f"the adapter {why}, which llama.cpp cannot do", RETRAIN
    if str(config.get("init_lora_weights")).lower().startswith(REPLACED):
        yield "init_lora_weights", "the adapter fits a model with changed weights alone", RETRAIN
    for key in ("r", "lora_alpha"):
        value = config.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
            yield key, "must be a number above 0", DOWNLOAD
    if config.get("use_rslora") and config.get("rank_pattern"):
        yield "rank_pattern", "llama.cpp has one scale for all ranks of an rsLoRA", RETRAIN


def pairs(shapes: Shapes, where: str) -> Iterator[tuple[str, list[int], list[int]]]:
    """Each tensor of the model that is changed, with the shapes of A, rank × in, and B, out × rank.
    Raises PipelineError for a tensor outside such a pair."""
    known: dict[str, dict[str, list[int]]] = {}
    for name, shape in shapes.items():
        match = PAIR.fullmatch(name)
        if match is None:
            raise PipelineError(f"{where}: holds {name}, which is not part of a LoRA", RETRAIN)
        part = match["part"] or match["of_words"]
        known.setdefault(f"{match['name']}.weight", {})[part] = shape
    for name, parts in known.items():
        if len(parts) < 2:
            raise PipelineError(f"{where}: has only one of the two tensors for {name}", DOWNLOAD)
        yield name, parts["A"], parts["B"]


def scale_by_root(config: Path) -> None:
    """llama.cpp scales by alpha / rank, an rsLoRA is scaled by alpha / √rank: its staged config
    gets the alpha that makes both the same."""
    values = json.loads(config.read_bytes())
    if values.get("use_rslora"):
        values["lora_alpha"] *= math.sqrt(values["r"])
        staging.replace_json(config, values)


# Whether it fits its model


def peft_misfit(adapter: Shapes, model: Shapes) -> str:
    """Why an adapter does not fit a model in safetensors; empty where it does. What comes before
    the number of a layer may differ: versions of transformers name a model with an encoder in their
    own ways."""
    changed, names = [*pairs(adapter, "the adapter")], {_in_layer(name) for name in model}
    if not any(_in_layer(name) in names for name, _, _ in changed):
        return f"changes {changed[0][0]}, which the model has not"
    for name, a, b in changed:
        made, own = [b[-2], a[-1]], model.get(name)
        if own and len(own) == 2 and own not in (made, made[::-1]):  # an embedding is transposed
            return f"makes {name} {made[0]} × {made[1]}, the model's has {own[0]} × {own[1]}"
    return ""


def _in_layer(name: str) -> str:
    """A tensor's name from the number of its layer on."""
    return re.sub(r"^.*?(?=\b\d+\.)", "", name)


def base_misfit(config: Mapping[str, Any], model: gguf.Header) -> str:
    """Why `config`, the config.json of the model that an adapter was trained for, is not that of
    a GGUF; empty where it may be."""
    table = config.get("text_config")
    table = table if isinstance(table, dict) else config
    for key, name in SIZES.items():
        theirs, own = table.get(key), gguf.whole(model.values, f"{model.architecture}.{name}", 0)
        # a GGUF counts a head that drafts among its layers
        if isinstance(theirs, int) and own and theirs not in (own, own - model.heads):
            return f"was trained for a model with {key} {theirs}, the model has {own}"
    return ""


def file_misfit(adapter: Path, model: Iterable[Path]) -> str:
    """Why the file `adapter` is not an adapter for the model, whole or in parts; empty where it is
    one. Raises PipelineError for a file that is not a GGUF."""
    own_shapes, shapes = dict[str, list[int]](), dict[str, list[int]]()
    own = gguf.read(adapter, own_shapes)
    if not kinds.is_adapter(own):
        return kinds.NO_ADAPTER
    first, *_ = [gguf.read(part, shapes) for part in model]
    if own.architecture != first.architecture:
        return f"is an adapter for {own.architecture}, and the model is {first.architecture}"
    return gguf_misfit(own_shapes, shapes)


def gguf_misfit(adapter: Shapes, model: Shapes) -> str:
    """Why a GGUF adapter with tensors of these shapes does not fit the model's; empty where it
    does."""
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
