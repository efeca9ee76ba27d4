"""Choose the types of a mix: those with which the model as a whole loses least at a given size.

    errors         what each tensor loses in each type, from a sample of its rows
    sensitivity    what an error costs the model: tensors of a kind and a part of the layers are
                   made worse, all others left as they are, and the answers compared
    choice         the least of the sum of their products: a knapsack
    confirmation   the choice against the plain type of that size, by the answers; the better stays

What was measured is kept in `run/mix/`: it does not depend on the size, and a run that was cut goes
on from there.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from pipeline.core import log
from pipeline.core.errors import PipelineError
from pipeline.core.paths import require_writable
from pipeline.core.progress import bar
from pipeline.core.store import json_file
from pipeline.core.store.publish import require_space

from . import divergence, gguf, knapsack, mix, tensor_errors
from .divergence import ChunkGroup, Perplexity
from .mix import MixTensor, Weights, dry_run, look, tensors_of
from .quantize import run_program
from .quants import TENSOR_TYPES, Budget

WORSE = ("q3_k", "q4_0")  # what a tensor is made to find out what its errors cost
LEAST_COST = 1e-5  # nats: the answers are kept in 16 bits, and less cannot be measured
# What a mix is compared with, the smallest first.
PLAIN = (
    *("Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "IQ4_XS", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M"),
    *("Q6_K", "Q8_0"),
)
UNMEASURED = "an error counts the same in every tensor"
CHUNKS = 8  # whose answers are compared; fewer where the vocabulary is large
SECONDS = 900  # for what errors cost: the layers are divided as finely as this allows
DIVISIONS = (1 << 30, 8, 4, 2, 1)  # from each layer by itself to all in one
LAYER = re.compile(r"(?:^|\.)blk\.(\d+)\.")


def shown(choice: ChosenTypes) -> str:
    """A choice in a line."""
    counts = Counter(choice.types.values())
    text = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
    text = f"{choice.bits:.2f} bits per weight: {text}"
    if choice.divergence is None:
        return text
    plain = f", that of {choice.plain} {choice.plain_divergence:.5f}" if choice.plain else ""
    return f"{text}; KL divergence {choice.divergence:.5f}{plain}"


class MixWork(Struct, frozen=True, kw_only=True):
    """What a mix is chosen with: the unquantized model and its digest, its matrix, a text to
    measure on (None: it has no words to measure by), llama.cpp's programs (`llama_perplexity` None:
    not here), where results are kept, a folder for large files, and the log."""

    name: str
    model: Path
    digest: str
    matrix: Path
    text: Path | None
    llama_quantize: Path
    llama_perplexity: Path | None
    results: Path
    folder: Path
    log: Path


class ChosenTypes(Struct, frozen=True, kw_only=True):
    """The types of a mix by tensor, and what was measured: the divergence in nats a token, and that
    of the plain type of that size; None where nothing was."""

    types: Mapping[str, str]
    bits: float = 0.0
    divergence: float | None = None
    plain: str = ""
    plain_divergence: float | None = None


def choose(work: MixWork, budget: Budget) -> ChosenTypes:
    """The types of a mix of this size. Raises PipelineError."""
    weights = look(work.llama_quantize, work.model)
    matrix = tensor_errors.weights(work.matrix)
    room = mix.require_possible(budget, weights, matrix.__contains__)
    results = json_file.read(work.results, dict) or {"input": work.digest}

    def keep(**values: object) -> None:
        results.update(values)
        work.results.parent.mkdir(parents=True, exist_ok=True)
        json_file.write(work.results, results)

    if "errors" not in results:
        keep(errors=_errors(work, weights.tensors, matrix))
    errors = results["errors"]
    reference = _reference(work, keep)
    costs = _sensitivities(work, weights.tensors, errors, reference, results, keep)
    items, kinds = [], []
    for tensor in weights.tensors:
        known = errors[tensor.name]
        kinds.append(tensor.candidates(is_weighed=tensor.name in matrix))
        items.append(
            [
                knapsack.Variant(tensor.bytes(k), costs[tensor.name] * known.get(k, 0.0))
                for k in kinds[-1]
            ]
        )
    chosen = knapsack.solve(items, room)
    names = [tensor.name for tensor in weights.tensors]
    types = {name: k[n] for name, k, n in zip(names, kinds, chosen, strict=True)}
    bytes_ = sum(item[n].bytes for item, n in zip(items, chosen, strict=True))
    mixed = ChosenTypes(types=types, bits=weights.bits(bytes_))
    return _confirmed(work, mixed, weights, room, reference) if reference else mixed


def _errors(
    work: MixWork, tensors: Sequence[MixTensor], matrix: tensor_errors.Weights
) -> dict[str, dict[str, float]]:
    """What each tensor loses in each type that it may get."""
    types: dict[str, list[str]] = {}
    for tensor in tensors:
        for kind in tensor.candidates(is_weighed=tensor.name in matrix)[:-1]:
            types.setdefault(kind, []).append(tensor.name)
    sample = work.folder / "sample.gguf"
    tensor_errors.write_sample(gguf.shards(work.model), {tensor.name for tensor in tensors}, sample)
    with bar(f"trying {len(types)} types on {work.name}") as update:
        return tensor_errors.measure(
            work.llama_quantize, sample, types, work.matrix, matrix, work.folder, update
        )


class MixReference(Struct, frozen=True):
    """What the unquantized model answers to some chunks of the text."""

    tool: Perplexity
    group: ChunkGroup

    def divergence(self, model: Path) -> float:
        """That of a quant, in nats a token. Raises PipelineError."""
        return divergence.mean(self.tool, model, self.group)


def _reference(work: MixWork, keep: Callable[..., None]) -> MixReference | None:
    """The answers of the unquantized model; None where they cannot be had in time."""
    if work.llama_perplexity is None or work.text is None:
        log.info(f"{work.name}: what errors cost is not measured: {UNMEASURED}")
        return None
    header = gguf.read(gguf.shards(work.model)[0])
    size = min(divergence.CTX_SIZE, header.context_length or divergence.CTX_SIZE)
    chunks = min(CHUNKS, divergence.group_size(header.vocabulary, size))
    tool = Perplexity(
        program=work.llama_perplexity,
        logs=work.log.parent,
        ctx_size=size,
        seconds=SECONDS / 4,
        shows_progress=False,
    )
    group = ChunkGroup(base=work.folder / "answers", text=work.folder / "text.txt")
    text = divergence.part_of(work.text.read_text("utf-8"), 0, chunks * size)
    start = time.monotonic()
    try:
        divergence.write_base(tool, work.model, group, text, chunks)
    except PipelineError as error:
        require_writable(work.folder)  # a full disk is no reason to choose worse types
        log.info(f"warning: {error.message}\nwhat errors cost is not measured: {UNMEASURED}")
        return None
    keep(seconds=time.monotonic() - start)
    return MixReference(tool, group)


def _sensitivities(
    work: MixWork,
    tensors: Sequence[MixTensor],
    errors: Mapping[str, Mapping[str, float]],
    reference: MixReference | None,
    results: Mapping[str, Any],
    keep: Callable[..., None],
) -> dict[str, float]:
    """What a tensor's error costs the model, by tensor: nats for an error of 1."""
    if reference is None:
        return dict.fromkeys((tensor.name for tensor in tensors), 1.0)
    if "parts" not in results:
        seconds = max(results["seconds"], 0.1) * 1.5  # it is written, too
        fit = (n for n in DIVISIONS if len(groups(tensors, n)) * seconds <= SECONDS)
        keep(parts=next(fit, 1), costs={})
    costs: dict[str, float] = {}
    divided = groups(tensors, results["parts"])
    with bar(f"measuring what {len(divided)} parts of {work.name} cost") as update:
        for number, (group, members) in enumerate(divided.items()):
            worse = {t.name: next(kind for kind in WORSE if t.fits(kind)) for t in members}
            if group not in results["costs"]:
                made = work.folder / "worse.gguf"
                quantize(work, worse, made, members[0].kind)
                cost = reference.divergence(made)
                keep(costs={**results["costs"], group: cost})
            wrong = sum(errors[name][kind] for name, kind in worse.items())
            cost = max(results["costs"][group], LEAST_COST)
            costs |= dict.fromkeys(worse, cost / wrong if wrong else 0.0)
            update(number + 1, len(divided))
    return costs


def groups(tensors: Iterable[MixTensor], parts: int) -> dict[str, list[MixTensor]]:
    """Tensors of a kind, and of the same of `parts` parts of the layers."""
    layers = {t.name: int(found[1]) for t in tensors if (found := LAYER.search(t.name))}
    count = max(layers.values(), default=0) + 1
    parts = min(parts, count)
    divided: dict[str, list[MixTensor]] = {}
    for tensor in tensors:
        part_ = layers.get(tensor.name, 0) * parts // count
        key = f"{LAYER.sub('', tensor.name)} {part_}" if tensor.name in layers else tensor.name
        divided.setdefault(key, []).append(tensor)
    return divided


def _confirmed(
    work: MixWork, mixed: ChosenTypes, weights: Weights, room: int, reference: MixReference
) -> ChosenTypes:
    """The mix, or the types of the plain quant of that size where these lose less."""
    made = work.folder / "confirmed.gguf"
    quantize(work, mixed.types, made)
    mixed = replace(mixed, divergence=reference.divergence(made))
    plain, types = plain_types(work, weights, room)
    if not plain:
        return mixed
    quantize(work, types, made)
    other = reference.divergence(made)
    mixed = replace(mixed, plain=plain, plain_divergence=other)
    if mixed.divergence is not None and mixed.divergence <= other:
        return mixed
    bits = weights.bits(bytes_of(weights, types))
    return replace(mixed, types=types, bits=bits, divergence=other)


def plain_types(work: MixWork, weights: Weights, room: int) -> tuple[str, dict[str, str]]:
    """The largest plain quant whose tensors take no more than `room` bytes, and its types; no name
    where there is none."""
    best: tuple[int, str, dict[str, str]] = (0, "", {})
    for quant in PLAIN:
        output = dry_run(work.llama_quantize, work.model, quant, work.matrix)
        made = {tensor.name: kind for tensor, kind in tensors_of(output)}
        types = {t.name: made[t.name] for t in weights.tensors if made.get(t.name) in TENSOR_TYPES}
        if len(types) == len(weights.tensors) and bytes_of(weights, types) <= room:
            best = max(best, (bytes_of(weights, types), quant, types))
    return best[1:]


def bytes_of(weights: Weights, types: Mapping[str, str]) -> int:
    """What the tensors take in these types."""
    return sum(tensor.bytes(types[tensor.name]) for tensor in weights.tensors)


def quantize(work: MixWork, types: Mapping[str, str], made: Path, rest: str = "f16") -> None:
    """Make a GGUF with these types; tensors that have none get the type `rest`. Raises
    PipelineError."""
    listed = work.folder / "types.txt"
    listed.write_text(tensor_errors.type_list(types) + f"weight={rest}\n", "ascii")
    options = ["--tensor-type-file", str(listed), "--imatrix", str(work.matrix)]
    require_space(work.folder, gguf.file_bytes(work.model))
    run_program(
        [str(work.llama_quantize), *options, str(work.model), str(made), "Q8_0"],
        work.name,
        model=work.model,
        made=made,
        read=[listed, work.matrix],
        log=work.log,
        append=True,
    )
