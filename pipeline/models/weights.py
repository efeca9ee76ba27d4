"""Which files of a model's folder are its weights: by the files' names and the index alone, for a
folder of the user's own as for a repository."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import PurePosixPath

from pipeline.core.errors import PipelineError
from pipeline.core.text import size

from . import contents
from .reference import JOIN, PIECE, PROJECTOR

INDEX = "model.safetensors.index.json"
SHARD = re.compile(r".+-\d{5}-of-(?P<count>\d{5})\.safetensors")
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
GET = "get the model as safetensors or GGUF"
NEITHER = "has neither GGUF nor safetensors files, but "

DIFFUSION = "model_index.json"
ADAPTER = (
    r"adapter_config\.json|adapter_model\..*",
    "holds an adapter (LoRA), not a model",
    "pass the model that it was trained for, and this as lora=",
)
# What else is about, by the names of files; the first that one matches is the nearest.
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


def choose(sizes: Mapping[str, int], read_index: Callable[[], bytes], where: str) -> list[str]:
    """The weights among the files of a folder, whose sizes in bytes are `sizes`: those that the
    index names, without copies in another layout. The converter reads the same.

    Raises PipelineError that names what else there is.
    """
    names = sizes.keys()
    top = sorted(n for n in names if n.endswith(".safetensors") and "/" not in n)
    if DIFFUSION in names or not (top or INDEX in names):
        raise nothing(sizes, where)
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
            "which of them are one model is not known, or some are missing",
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
            "get the index from where the weights came from",
        )
    return indexed


def weight_map(data: bytes, where: str) -> dict[str, str]:
    """The file of each tensor, by an index. Raises PipelineError."""
    contents.require_no_placeholder(data, where)
    try:
        files = dict(json.loads(data)["weight_map"].items())
        if not files:
            raise ValueError("it names no file")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PipelineError(f"{where}: cannot be read as an index: {error}") from None
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


def nothing(sizes: Mapping[str, int], where: str) -> PipelineError:
    """The error for a folder or a repository without weights that can be used: it names what there
    is. `sizes` are those of its files by name, in bytes."""
    names = sorted(n for n in sizes if not PurePosixPath(n).name.startswith("."))
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
    return PipelineError(f"{where}: {kind[1]}{f' ({name})' if name else ''}", kind[2])
