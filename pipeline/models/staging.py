"""The converter's input: the weights, and the files beside them without foreign code.

Links to the files that were chosen, so that nothing else in the model's folder is seen. JSON files
that name code are copied without it, and a config.json that counts more than the weights can hold
is refused.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.core.errors import PipelineError
from pipeline.core.store.publish import remove
from pipeline.core.text import size as shown_size

from . import contents, foreign_code

TOKENIZER_FOLDER = "tokenizer/"  # where some models have what is beside the weights elsewhere
SCRATCH = ".scratch"  # a name that no model's folder has

# The converter makes lists of these lengths, or loops over them.
COUNTS = (
    *("vocab_size", "n_vocab", "padded_vocab_size", "pad_vocab_size_multiple", "draft_vocab_size"),
    *("num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_nextn_predict_layers"),
    *("mtp_num_hidden_layers", "num_hash_layers", "num_decoder_layers", "num_layers_per_stack"),
    *("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    *("num_attention_heads", "n_head", "n_heads"),
)
MOST = 10_000  # layers, experts or heads; the pinned llama.cpp loads 512 layers and 1,024 experts
MOST_WORDS = 4_000_000  # the largest vocabularies have some 260,000
# Every layer and every word has at least a vector of weights, of at least one bit each. Twice that.
COUNTS_FOR_A_BYTE = 16
NO_BOUND = 1 << 62  # for weights that stay away: MOST and MOST_WORDS remain


@contextmanager
def workspace(made: Path, name: str) -> Iterator[tuple[Path, Path]]:
    """Beside `made`: a folder for the converter's input, and an empty one. The first has the
    model's `name`: the converter takes metadata from it."""
    top = made.with_name(f"{made.name}.in")
    remove(top)  # left by a run that was killed
    try:
        (top / SCRATCH).mkdir(parents=True)
        yield top / name, top / SCRATCH
    finally:
        remove(top)


def stage(files: Mapping[str, Path], into: Path, weights: int | None = None) -> None:
    """Put the converter's input into the folder `into`. `weights` are the bytes of the model's
    weights, by default those among the files. Raises PipelineError."""
    if weights is None:
        weights = weight_bytes({name: file.stat().st_size for name, file in files.items()})
    for name, file in files.items():
        target = into / place(name, files)
        target.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith((".json", ".jinja")):
            data = contents.local(file, name).whole()
            allowed = beside(name, data, weights)
            if allowed != data:
                target.write_bytes(allowed)
                continue
        _link(file, target)
    prefer_template_file(into)


def place(name: str, names: Collection[str]) -> str:
    """Where the converter reads the file `name` among `names`: a tokenizer beside the weights."""
    beside_weights = name.removeprefix(TOKENIZER_FOLDER)
    return name if beside_weights in names else beside_weights


def prefer_template_file(folder: Path) -> None:
    """Of two chat templates the one in a file of its own counts, as for transformers: the converter
    would take that of tokenizer_config.json, which newer versions of a model leave behind."""
    template, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if not (template.is_file() and config.is_file() and template.read_bytes().strip()):
        return
    with contextlib.suppress(ValueError, RecursionError):  # the converter says it
        values = json.loads(config.read_bytes())
        if isinstance(values, dict) and values.pop("chat_template", None) is not None:
            replace_json(config, values)


def stage_config(files: Mapping[str, Path], into: Path) -> None:
    """Put the config files of a model whose weights are not read into the folder `into`, without
    how these are quantized. Raises PipelineError."""
    stage(files, into, NO_BOUND)
    config = into / "config.json"
    values = json.loads(config.read_bytes())
    if values.pop("quantization_config", None) is not None:
        replace_json(config, values)


def replace_json(file: Path, values: Mapping[str, Any]) -> None:
    """Write other values in the place of a staged file, which may be a link to the user's."""
    file.unlink()
    file.write_text(json.dumps(values), encoding="utf-8")


def beside(name: str, data: bytes, weights: int) -> bytes:
    """A file as the converter may read it, beside so many bytes of weights. Raises
    PipelineError."""
    if not name.endswith((".json", ".jinja")):
        return data
    data = foreign_code.utf8(name, data)
    if name.endswith(".jinja"):
        return data
    if name == "config.json":
        require_plausible(data, weights, name)
    return foreign_code.without(name, data)


def weight_bytes(sizes: Mapping[str, int]) -> int:
    """The bytes of the weights among these files."""
    return sum(size for name, size in sizes.items() if name.endswith(".safetensors"))


def require_plausible(config: bytes, weights: int, where: str) -> None:
    """Raise PipelineError where a config.json counts more layers, words or experts than so many
    bytes of weights can hold: the converter would loop over them all."""
    try:
        counts = list(_counts(json.loads(config)))
    except (ValueError, RecursionError) as error:
        raise PipelineError(f"{where}: cannot be read as JSON: {error}") from None
    most = COUNTS_FOR_A_BYTE * weights
    for name, count, width in counts:
        if count * width > most:
            raise PipelineError(
                f"{where}: {name} is {count}, and the weights have {shown_size(weights)}: at a "
                f"width of {width} they cannot hold more than {most // width}",
                "the file is wrong, or weights are missing",
            )
        limit = MOST_WORDS if "vocab" in name else MOST
        if count > limit:
            raise PipelineError(
                f"{where}: {name} is {count}; no model has more than {limit}", "the file is wrong"
            )


def _counts(value: Any) -> Iterator[tuple[str, int, int]]:
    """Each count with its name and the width of the vectors that it counts, at any depth."""
    if isinstance(value, list):
        for inner in value:
            yield from _counts(inner)
    if not isinstance(value, dict):
        return
    width = max(1, _whole(value.get("hidden_size")))
    for name, inner in value.items():
        if name in COUNTS:
            yield name, _whole(inner), width
        yield from _counts(inner)


def _whole(value: Any) -> int:
    """A count as an int; the converter takes 1e9 for one, too."""
    if isinstance(value, float):
        return int(value) if math.isfinite(value) else 0
    return value if isinstance(value, int) else 0


def _link(file: Path, target: Path) -> None:
    try:
        target.symlink_to(file.resolve())
    except OSError:  # Windows, without the right to create links
        try:
            os.link(file, target)
        except OSError:
            shutil.copyfile(file, target)
