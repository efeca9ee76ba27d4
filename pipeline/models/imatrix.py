"""The importance matrix, which says which weights matter in use: the user's own, or computed with
llama-imatrix for a text."""

from __future__ import annotations

import codecs
import math
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.core.errors import PipelineError, UsageError
from pipeline.core.paths import Home
from pipeline.core.process import last_lines, run
from pipeline.core.progress import bar
from pipeline.core.sandbox import strength
from pipeline.core.store import artifacts, stat_cache
from pipeline.core.store.publish import require_disk

from . import contents, gguf, tensor_errors, text_length, tools
from .gguf_format import is_gguf

COPIES = 2  # of the weights in memory: repacked for the processor, and buffers
# An encoder reads a chunk at once, and has no words to predict.
ENCODER_OPTIONS = ["--no-ppl", "--batch-size", "512", "--ubatch-size", "512", "--chunks", "32"]
LONGEST_NAME = 256  # bytes, of a tensor; ggml's have 64 at most
LAYER = re.compile(r"\b(enc\.|dec\.)?blk\.\d+\.")
SILENCE = 3600  # seconds; it prints each chunk of 512 tokens, as many as the text has


def is_text(path: Path) -> bool:
    """Whether a file starts as texts do: valid UTF-8 without a zero byte. A matrix does not."""
    with path.open("rb") as file:
        start = file.read(4096)
    try:
        codecs.getincrementaldecoder("utf-8")().decode(start)  # the last letter may be cut in two
    except UnicodeDecodeError:
        return False
    return b"\0" not in start


def require_usable(path: Path) -> None:
    """Raise PipelineError where a file is neither a matrix nor a text to compute one from."""
    contents.require_real(path)
    if not path.stat().st_size:
        raise UsageError(f"imatrix={path}: is empty")
    if is_gguf(path) and gguf.read(path).values.get("general.type") != "imatrix":
        raise UsageError(
            f"imatrix={path}: is a GGUF, and no importance matrix",
            "pass one that llama-imatrix wrote, or a text to compute it from",
        )
    if is_text(path):
        text_length.require_bytes(path, "imatrix")
    elif not is_gguf(path) and not _is_older_matrix(path):
        raise UsageError(
            f"imatrix={path}: is neither an importance matrix nor a text in UTF-8",
            "save the text as UTF-8, or pass a matrix that llama-imatrix wrote",
        )


def require_of(path: Path, model: Path) -> None:
    """Raise UsageError where the matrix at `path` was computed for a model of another shape than
    the GGUF `model`: llama-quantize passes in silence over what a matrix does not know."""
    shapes = dict[str, list[int]]()
    first, *_ = [gguf.read(part, shapes) for part in gguf.shards(model)]
    if why := _misfit(_values(path), shapes, first.heads):
        raise UsageError(
            f"imatrix={path}: was computed for another model: {why}",
            "pass the matrix of this model, or a text to compute it from",
        )


def _misfit(known: Mapping[str, int], shapes: Mapping[str, list[int]], heads: int) -> str:
    """Why a matrix with so many values for each tensor was computed for another model than one of
    these shapes, `heads` of whose layers draft tokens; empty where it fits."""
    named = [name for name in known if LAYER.search(name)]
    if strange := next((name for name in named if name not in shapes), ""):
        return f"it knows {strange}, which the model has not"
    for name in named:
        own = shapes[name][0] * math.prod(shapes[name][2:])
        if known[name] != own:
            return f"it has {known[name]} values for {name}, the model needs {own}"
    found, layers = len(_layers(named)), len(_layers(shapes))
    return f"it knows {found} of the {layers} layers" if found < layers - heads else ""


def _values(path: Path) -> dict[str, int]:
    """How many values a matrix has for each tensor that it knows."""
    if not is_gguf(path):
        return {name: len(values) for name, values in tensor_errors.weights(path).items()}
    shapes = dict[str, list[int]]()
    gguf.read(path, shapes)
    sums = tensor_errors.SUMS
    return {n.removesuffix(sums): math.prod(v) for n, v in shapes.items() if n.endswith(sums)}


def _layers(names: Iterable[str]) -> set[str]:
    """The layers that the names of tensors count."""
    return {match[0] for name in names if (match := LAYER.search(name))}


def _is_older_matrix(path: Path) -> bool:
    """Whether a file begins as llama-imatrix wrote it before GGUF: how many tensors there are, and
    the length of the first one's name, before that."""
    with path.open("rb") as file:
        start = file.read(8 + LONGEST_NAME)
    count, length = struct.unpack("<ii", start[:8]) if len(start) > 8 else (0, 0)
    name = start[8 : 8 + length] if count > 0 and 0 < length <= LONGEST_NAME else b""
    return len(name) == length > 0 and all(0x20 < letter < 0x7F for letter in name)


def make(
    folder: Path,
    *,
    model: Path,
    digest: str,
    text: Path,
    program: Path,
    tool: Mapping[str, Any],
    home: Home,
    options: Sequence[str] = (),
) -> Path:
    """The matrix of the GGUF `model` for `text`, in `folder`: made unless it is current. `digest`
    is the model's; `program` is llama-imatrix, and `tool` the recipe that stands for llama.cpp;
    `options` are more of the program's, for what is not an encoder. Raises PipelineError."""
    end = text_length.without_end(model)
    options = [*end, *(ENCODER_OPTIONS if gguf.read(model).is_encoder else options)]
    sha256 = stat_cache.identity(home.digests, text)
    recipe = {"step": "imatrix", "input": digest, "text": f"sha256:{sha256}", "tool": dict(tool)}
    name = f"imatrix-{sha256[:12]}"
    if options:
        recipe["options"] = list(options)
        name += "-output"
    log = home.logs / f"{folder.name}-{name}.log"
    if not gguf.read(model).vocabulary:
        raise UsageError(
            f"{model.name}: has no tokenizer, so no importance matrix can be computed from a text",
            "pass the matrix of this model: imatrix=PATH",
        )

    def maker(made: Path) -> None:
        total = 0
        with bar(f"computing the importance matrix of {text.name}") as update:

            def watch(line: str) -> None:
                nonlocal total
                if chunks := re.search(r"computing over (\d+) chunks", line):
                    total = int(chunks[1])
                if done := re.findall(r"\[(\d+)\][\d.]+,", line):
                    update(int(done[-1]), total)

            status = run(
                [
                    # a name alone, for it becomes a part of the matrix, and of what it is used for
                    *(str(program), "--model", str(model), "--file", f"./{text.name}"),
                    *("--output", str(made), "--output-format", "gguf"),
                    *options,
                ],
                log=log,
                env=tools.env(),
                cwd=text.parent,
                on_line=watch,
                patience=SILENCE,
                sandbox=tools.sandbox(
                    program, model=model, read=[text], write=[made], copies=COPIES
                ),
            )
        if status or not made.stat().st_size:
            if why := text_length.complaint(last_lines(log, 20)):
                raise text_length.too_short(text, "imatrix", why)
            require_disk(made.parent, last_lines(log))
            raise PipelineError(
                f"the importance matrix could not be computed from {text} (status {status}):\n"
                f"{last_lines(log, 5)}",
                f"the whole log is {log}",
            )
        tools.read_made(made)

    target = folder / f"{name}.gguf"
    artifacts.make(target, recipe, maker, sandbox=strength().name)
    return target
