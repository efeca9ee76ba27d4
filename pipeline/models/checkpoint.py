"""A model in safetensors, in a folder or a repository: which files are its weights, and whether the
official converter can read them. Of the weights only headers are read."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from msgspec import Struct

from pipeline.core.errors import PipelineError, UsageError, did_you_mean
from pipeline.core.text import size

from . import contents, quantized, staging
from .reference import JOIN, PIECE, PROJECTOR
from .safetensors import Head

ENCODERS = ("vision_config", "audio_config")  # the tables that the converter looks for
INDEX = "model.safetensors.index.json"
MAX_DOCUMENT = 32 * 1024 * 1024  # bytes; the largest index has some 10 MB
SHARD = re.compile(r".+-\d{5}-of-(?P<count>\d{5})\.safetensors", re.ASCII)
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
GET = "get the model as safetensors or GGUF"
DOWNLOAD_INDEX = "get the index from where the weights came from"
NEITHER = "has neither GGUF nor safetensors files, but "

DIFFUSION = "model_index.json"
ADAPTER = (
    r"adapter_config\.json|adapter_model\..*",
    "holds an adapter (LoRA), not a model",
    "pass the model that it was trained for, and this as lora=",
)
# Other kinds of model, by the names of their files; the first match is the nearest.
KINDS = (
    (re.escape(DIFFUSION), "holds a diffusion model, for pictures or video, which llama.cpp does "
     "not run", "stable-diffusion.cpp runs it"),
    (PIECE, "has a GGUF only in pieces that are to be joined", JOIN),
    (r"(ggml|ggjt).*\.bin|.*\.ggml(v\d)?(\..*)?|.*\.ggmlv\d\..*", "has only old GGML files",
     contents.OLD),
    ADAPTER,
    (r"openvino_.*", NEITHER + "an OpenVINO model", GET),
)  # fmt: skip
# These lie beside pickled weights, too.
OTHERS = (
    (r".*\.onnx(_data)?", NEITHER + "an ONNX model", GET),
    (r".*\.(tflite|task|litertlm)", NEITHER + "a LiteRT (TensorFlow Lite) model", GET),
    (r".*\.(h5|keras|msgpack|pb)", NEITHER + "a TensorFlow, Keras or Flax model", GET),
    (r".*\.(mlmodel|mlpackage|mlmodelc)(/.*)?", NEITHER + "a Core ML model", GET),
    (r".*\.(pte|engine|plan|nemo|rkllm|rknn|dlc|mnn)", NEITHER + "a model of another program",
     GET),
    (r".*\.llamafile", "holds a llamafile: a program with a model in it",
     "unpack the .gguf in it with `unzip`"),
    (r".*\.(zip|tar|tgz|gz|xz|bz2|zst|7z|rar)", NEITHER + "an archive", contents.UNPACK),
)  # fmt: skip


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
        names = weight_files(visible, lambda: read(INDEX), where)
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
    of_text = named_architecture(config.get("text_config")) or named
    if named not in architectures:  # the converter takes the one of the text first
        require_known(of_text, architectures, config_name)
    staging.require_plausible(config_bytes, sum(sizes[name] for name in names), config_name)
    heads = read_heads(names)
    tensors = [name for head in heads for name in head.shapes]
    if not tensors:
        raise PipelineError(f"{where}: its weights hold no tensor", "get the model's own weights")
    dtypes = sum((head.dtypes for head in heads), Counter[str]())
    quantized.require_readable(config, table(quantized.MODELOPT_FILE), tensors, dtypes, where)
    has_encoder = any(isinstance(config.get(name), dict) for name in ENCODERS)
    encoder = (named_architecture(config.get("vision_config")) or named) if has_encoder else ""
    return Checkpoint(names, of_text, dtypes, encoder)


def architecture(config: Mapping[str, Any], where: str) -> str:
    """The architecture that a config.json names. Raises PipelineError where it names none."""
    if name := named_architecture(config):
        return name
    raise PipelineError(f"{where}: names no architecture", 'add "architectures": ["…"]')


def named_architecture(config: object) -> str:
    """The architecture that a configuration, or a part of one, names; empty for none."""
    named = config.get("architectures") if isinstance(config, dict) else None
    return named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""


def document(data: bytes, where: str) -> dict[str, Any]:
    """Parse a model's JSON file, which must hold an object. Raises PipelineError."""
    contents.require_no_placeholder(data, where)
    contents.require_small(where, len(data), MAX_DOCUMENT)
    try:
        content = json.loads(data)
        if not isinstance(content, dict):
            raise ValueError("it is not an object")
        return content
    except (ValueError, RecursionError) as error:
        raise PipelineError(f"{where}: cannot be read as JSON: {error}") from None


def require_known(name: str, known: frozenset[str], where: str) -> None:
    """Raise UsageError where `name` is none of the architectures that the converter knows; any will
    do where `known` is empty, for these are not known yet."""
    if known and name not in known:
        raise UsageError(
            f"{where}: the architecture {name} is not known to this llama.cpp"
            f"{did_you_mean(name, sorted(known))}",
            "a newer llama.cpp may know it; pipeline/pins.toml says which one is used",
        )


# Which files are the weights


def weight_files(
    sizes: Mapping[str, int], read_index: Callable[[], bytes], where: str
) -> list[str]:
    """The weights among the files of a folder, whose sizes in bytes are `sizes`: those that the
    index names, without copies in another layout. The converter reads the same. Raises
    PipelineError that names what else there is."""
    names = sizes.keys()
    top = sorted(n for n in names if n.endswith(".safetensors") and "/" not in n)
    if DIFFUSION in names or not (top or INDEX in names):
        raise _no_weights(sizes, where)
    if INDEX in names:
        return _indexed(names, read_index(), where)
    if all(name.startswith("adapter") for name in top):
        raise _other(ADAPTER, top[0], where)
    if "model.safetensors" in top:
        return ["model.safetensors"]
    weights = [name for name in top if name.startswith("model")]
    if not weights:
        raise PipelineError(
            f"{where}: its weights are {', '.join(top[:3])}; llama.cpp's converter reads "
            "model*.safetensors",
            "look for the model in the Transformers layout, or for a GGUF of it",
        )
    split = [SHARD.fullmatch(name) for name in weights]
    counts = {int(part["count"]) for part in split if part}
    if (counts or len(weights) > 1) and (None in split or counts != {len(weights)}):
        raise PipelineError(
            f"{where}: has {', '.join(weights[:3])} and no {INDEX}: "
            "it is not known which of them belong together, or some are missing",
            "get all parts and the index from where the others came from",
        )
    return weights


def _indexed(names: Collection[str], index: bytes, where: str) -> list[str]:
    """The weight files that an index names, all of which are among `names`."""
    indexed = sorted(set(weight_map(index, f"{where}: {INDEX}").values()))
    if missing := [name for name in indexed if name not in names]:
        raise PipelineError(
            f"{where}: {len(missing)} of the {len(indexed)} files that {INDEX} names are "
            f"missing: {', '.join(missing[:3])}",
            "get them from where the others came from, or another revision",
        )
    counts = [int(part["count"]) for name in indexed if (part := SHARD.fullmatch(name))]
    if counts and max(counts) > len(indexed):
        raise PipelineError(
            f"{where}: {INDEX}: names {len(indexed)} of the {max(counts)} parts that the names of "
            "the files count",
            DOWNLOAD_INDEX,
        )
    return indexed


def weight_map(data: bytes, where: str) -> dict[str, str]:
    """The file of each tensor, by an index. Raises PipelineError."""
    files = document(data, where).get("weight_map")
    if not (isinstance(files, dict) and files):
        raise PipelineError(f"{where}: its weight_map names no file", DOWNLOAD_INDEX)
    for name in files.values():
        if not (isinstance(name, str) and name.endswith(".safetensors") and is_plain(name)):
            raise PipelineError(f"{where}: names {name!r}, which is not a file beside it")
    return files


def require_complete(index: bytes, tensors: Collection[str], where: str) -> None:
    """Raise PipelineError where the files hold other tensors than their index says: the converter
    refuses them, too."""
    expected, present = weight_map(index, where), {*tensors}
    missing, extra = expected.keys() - present, present - expected.keys()
    if missing or extra:
        files = sorted({expected[name] for name in missing})
        what = f"lack {len(missing)} of its tensors ({', '.join(files[:3])})" if missing else ""
        what = what or f"hold {len(extra)} tensors more than it says ({min(extra)})"
        raise PipelineError(
            f"{where}: the weights {what}", "get the index and all files from the same revision"
        )


def is_plain(name: str) -> bool:
    """Whether `name` is a plain file name on every system: no folder, no drive."""
    return name not in ("", ".", "..") and not re.search(r"[/\\:\0]", name)


def _no_weights(sizes: Mapping[str, int], where: str) -> PipelineError:
    """The error for a folder or a repository without weights that can be used: it names what there
    is. `sizes` are those of its visible files by name, in bytes."""
    names = sorted(sizes)
    if kind := _first(KINDS, names, where):
        return kind
    if any(PROJECTOR.search(name) for name in names if name.endswith(".gguf")):
        return PipelineError(
            f"{where}: has only projectors (mmproj), no model", "pass the model itself"
        )
    nested = [name for name in names if name.endswith(".safetensors")]
    if nested:
        return PipelineError(
            f"{where}: has weights only in folders ({', '.join(nested[:3])}), which belong to "
            "something other than a language model",
            "pass the folder that holds config.json and the model's weights",
        )
    pickled = [name for name in names if name.lower().endswith(PICKLED)]
    if pickled:
        return PipelineError(
            f"{where}: has only pickled weights ({', '.join(pickled[:3])}), which run code when "
            "they are loaded; they are not used",
            "look for a conversion of the model to safetensors or GGUF",
        )
    if kind := _first(OTHERS, names, where):
        return kind
    if not names:
        return PipelineError(f"{where}: holds no files", GET)
    largest = sorted(names, key=lambda name: sizes[name], reverse=True)
    shown = ", ".join(f"{name} ({size(sizes[name])})" for name in largest[:5])
    shown += f" and {len(largest) - 5} more" if len(largest) > 5 else ""
    return PipelineError(f"{where}: has neither GGUF nor safetensors files; it holds {shown}", GET)


def _first(
    table: Sequence[tuple[str, str, str]], names: Sequence[str], where: str
) -> PipelineError | None:
    for kind in table:
        if name := next((n for n in names if re.fullmatch(kind[0], n.lower())), ""):
            return _other(kind, name, where)
    return None


def _other(kind: tuple[str, str, str], name: str, where: str) -> PipelineError:
    _, what, hint = kind
    return PipelineError(f"{where}: {what} ({name})", hint)
