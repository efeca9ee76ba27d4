"""What a model will take before it is here: llama.cpp's own tools measure it by headers alone.

Where they are not built yet a formula does, and its figures are marked as an estimate.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct

from pipeline.bins.binaries import Binaries
from pipeline.core.errors import PipelineError, UsageError
from pipeline.core.pins import pins
from pipeline.models import formula, gguf, memory, mix, quantize, safetensors, skeleton
from pipeline.models.chain import Chain
from pipeline.models.contents import Readable
from pipeline.models.memory import Fit, Memory
from pipeline.models.resolve import Resolved
from pipeline.serve import flags
from pipeline.serve.config import llama, options
from pipeline.serve.config.options import ResolvedOptions
from pipeline.serve.flags import Flag

from . import headers
from .model import Model

FIT_PARAMS = "llama-fit-params"
# Options that llama-fit-params would know, and that are given to it in another way, or not at all.
NOT_HANDED_ON = {
    *("--model", "--ctx-size", "--mmproj", "--host", "--port", "--alias", "--log-file"),
    *("--spec-draft-model", "--model-draft"),
}
# Of a server that is not planned yet: added for its context, or without effect on what is measured.
MEASURED_OTHERWISE = {
    *("batch-size", "ubatch-size", "threads", "gpu-layers", "n-gpu-layers", "device"),
    *("api-key", "api-key-file"),
}


class MemoryEstimate(Struct, frozen=True, kw_only=True):
    """A GGUF that may not exist yet: its size in bytes (0: llama-quantize refuses to make it), its
    trained context in tokens, and what it takes at a context. `header` is None where there is only
    a formula."""

    bytes: int
    trained: int
    at: Callable[[int], Memory | None]
    header: gguf.Header | None = None


def measure(
    programs: Binaries,
    file: Path,
    words: Sequence[str],
    ctx_size: int,
    *,
    ubatch: int,
    pools: bool,
) -> Memory | None:
    """What a GGUF (whole, or its skeleton) takes when it is served with the options `words`, as
    llama-fit-params measures it; without that program the formula's estimate. `pools`: for
    embeddings or reranking. Raises UsageError where llama.cpp cannot load it."""
    run = programs.home.run
    header = gguf.read_cached(file, run)
    shape, needed = formula.of_header(header, tensor_bytes(file, run)), None
    if program := programs.find(FIT_PARAMS):
        digest = programs.sha256(FIT_PARAMS)
        # Options such as cache_type_k change what is needed; it knows those that do.
        known = known_words(words, flags.read(program, digest, run / "flags"))
        answers = run / "memory.json"
        try:
            needed = memory.measure(program, digest[:12], file, known, ctx_size, answers)
        except UsageError as error:
            error.message += f" (its architecture is {header.architecture!r})"
            raise
    needed = needed or formula.memory(shape, ctx_size, ubatch)
    # The tool counts more compute buffers than the server takes, except for what pools.
    return needed if pools else formula.served(needed, shape, ctx_size, ubatch)


def known_words(words: Sequence[str], known: Mapping[str, Flag]) -> list[str]:
    """The options of a llama-server's command line that llama-fit-params has too."""
    kept: list[str] = []
    takes = False  # the next word belongs to the option before
    for word in words:
        flag = known.get(word.removeprefix("--")) if word.startswith("--") else None
        if flag and word not in NOT_HANDED_ON:
            kept.append(word)
            takes = bool(flag.value)
        elif takes and not flag:
            kept.append(word)
            takes = False
        else:
            takes = False
    return kept


def _measure(model: Model, file: Path, header: gguf.Header, ctx_size: int) -> Memory | None:
    """What a GGUF of `model` takes with the options that it will be served with."""
    resolved = ResolvedOptions(model.spec, {})
    table = {n: v for n, v in options.expanded(resolved).items() if n not in MEASURED_OTHERWISE}
    batch = llama.batch_options(header.pooling, ctx_size, resolved.number("batch-size") or None)
    return measure(
        model.binaries,
        file,
        [*batch, *options.words(table), *model.spec.extra_args],
        ctx_size,
        ubatch=resolved.number("ubatch-size") or formula.UBATCH,
        pools=header.pooling != "none",
    )


def loads(model: Model) -> Callable[[Path], None] | None:
    """A function that raises PipelineError where llama.cpp cannot load a GGUF of the model; None
    where its tool is not here."""
    if (program := model.binaries.find(FIT_PARAMS)) is None:
        return None
    name = model.require_resolved().name
    return lambda made: memory.require_loads(program, made, name)


def tensor_bytes(file: Path, run: Path) -> int:
    """The bytes of all tensors of a GGUF, whole or split."""
    headers = [gguf.read_cached(path, run) for path in gguf.shards(file)]
    return sum(header.size - header.data for header in headers)


def outlook(model: Model, chain: Chain) -> MemoryEstimate:
    """What the GGUF at the end of `chain` will take. Raises PipelineError."""
    if model.is_made(chain):
        return of_made(model, chain.final)
    if chain.quant:
        return unquantized(model, chain)(chain.quant)
    resolved, files = chain.resolved, headers.of_weights(chain.resolved)
    try:
        return of_gguf(model, headers.readables(model, resolved, files), key=files[0].identity)
    except PipelineError:  # not here, and not to be had piece by piece
        if resolved.source["type"] == "package":
            return _by_formula(model, resolved)(resolved.precision)
        if not model.request.offline:
            raise
        return MemoryEstimate(bytes=sum(f.size for f in files), trained=0, at=lambda ctx_size: None)


def of_made(model: Model, file: Path) -> MemoryEstimate:
    """Of a GGUF that is here."""
    header = gguf.read_cached(file, model.home.run)
    return MemoryEstimate(
        bytes=gguf.file_bytes(file),
        trained=header.context_length,
        at=lambda ctx_size: _measure(model, file, header, ctx_size),
        header=header,
    )


def of_gguf(model: Model, files: Sequence[Readable], key: str) -> MemoryEstimate:
    """Of a GGUF, from its headers. `key` tells its content apart from others."""
    made = skeleton.gguf_skeleton(files, headers.folder(model.home.run, key))
    size = sum(file.size for file in files)
    if made is None:  # no holes on this disk
        header = gguf.parse(files[0])
        shape = formula.of_header(header, size - header.data)
        return MemoryEstimate(
            bytes=size,
            trained=header.context_length,
            at=lambda ctx_size: formula.memory(shape, ctx_size),
            header=header,
        )
    return of_made(model, made)


def unquantized(model: Model, chain: Chain) -> Callable[[str], MemoryEstimate]:
    """For what is made here: a function from a quant to what it will take."""
    source = headers.unquantized(model, chain)
    if source is None or not model.binaries.has("llama-quantize"):
        return _by_formula(model, chain.resolved)
    header, before = gguf.read(source), tensor_bytes(source, model.home.run)
    program = model.binaries.program("llama-quantize")
    matrix = chain.quantization.imatrix if chain.quantization else None

    def of(quant: str) -> MemoryEstimate:
        size = quantize.quant_sizes(program, source, [quant], matrix).get(quant, 0)

        def at(ctx_size: int) -> Memory | None:
            needed = _measure(model, source, header, ctx_size)
            return memory.resized(needed, before, size - header.data) if needed and size else None

        return MemoryEstimate(bytes=size, trained=header.context_length, at=at, header=header)

    return of


def mix_limits(model: Model, chain: Chain) -> tuple[float, float]:
    """The bits per weight of the smallest and the largest mix. Raises PipelineError."""
    source = headers.unquantized(model, chain)
    if source is None or not model.binaries.has("llama-quantize"):
        raise PipelineError(
            "quant=fit: the headers of this model cannot be read yet",
            "name a size, such as quant=4.8bpw",
        )
    weights = mix.look(model.binaries.program("llama-quantize"), source)
    matrix = chain.quantization.imatrix if chain.quantization else None
    return mix.bit_limits(weights, quantize.weighed(matrix, source))


def _by_formula(model: Model, resolved: Resolved) -> Callable[[str], MemoryEstimate]:
    """From config.json and the weights' headers, as far as they can be read."""
    reference = model.require_reference()
    pinned = pins().demos.get(reference.text) if reference.kind == "demo" else None
    config: Mapping[str, Any] = pinned.config if pinned else {}
    elements = int(resolved.bytes * 8 / formula.BITS.get(resolved.precision, (16, 16))[0])
    if resolved.kind == "safetensors":
        try:
            files = {f.name: f for f in headers.readables(model, resolved, resolved.files)}
            content = json.loads(files["config.json"].get(0, files["config.json"].size))
            config = content if isinstance(content, dict) else config
            weights = [file for name, file in files.items() if name.endswith(".safetensors")]
            elements = sum(safetensors.head(f).elements for f in weights)
        except (PipelineError, KeyError, ValueError, RecursionError):
            pass  # the sizes alone have to do

    def of(quant: str) -> MemoryEstimate:
        shape = formula.of_config(config, elements, quant)
        trained = config.get("max_position_embeddings")
        return MemoryEstimate(
            bytes=shape.weights,
            trained=trained if isinstance(trained, int) and trained > 0 else 0,
            at=lambda ctx_size: formula.memory(shape, ctx_size),
        )

    return of


def least(model: Model, ahead: MemoryEstimate, room: int) -> Fit:
    """How a model fits into `room` bytes of memory at the context that it must fit with: the
    requested one, else the smallest that it would be reduced to."""
    smallest = min(ahead.trained or memory.SMALLEST_CONTEXT, memory.SMALLEST_CONTEXT)
    ctx_size = model.request.ctx_size or smallest
    return Fit(ctx_size, ahead.at(ctx_size), room, ahead.trained)
