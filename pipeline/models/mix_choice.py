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

import hashlib
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct, to_builtins
from msgspec.structs import replace

from pipeline.core import log
from pipeline.core.errors import PipelineError
from pipeline.core.paths import Home, require_writable
from pipeline.core.process import last_lines, run
from pipeline.core.progress import bar
from pipeline.core.sandbox import strength
from pipeline.core.store import artifacts, json_file, stat_cache
from pipeline.core.store.publish import remove, require_space

from . import divergence, gguf, knapsack, tensor_errors, texts, tools
from .divergence import ChunkGroup, Perplexity
from .mix import TENSOR, MixTensor, Weights, dry_run, look, require_possible, weighed
from .quantize import Quantization, is_text, make_imatrix, types_in
from .quants import TENSOR_TYPES, Budget

MATRIX_OPTIONS = ["--process-output", "--chunks", "128"]  # of 512 tokens
# An encoder reads a chunk at once, and has no words to predict; llama-imatrix refuses one that ends
# texts with a token of its own.
ENCODER_OPTIONS = ["--override-kv", "tokenizer.ggml.add_eos_token=bool:false", "--no-ppl"]
ENCODER_OPTIONS += ["--batch-size", "512", "--ubatch-size", "512", "--chunks", "32"]
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
COPIES = 4  # of the weights in memory, of llama-quantize


class MixPrograms(Struct, frozen=True, kw_only=True):
    """llama.cpp's programs, and llama-quantize's recipe. None: not here, or not needed."""

    quantize: Path
    imatrix: Path | None
    perplexity: Path | None
    tool: Mapping[str, Any]


def prepare(
    quantization: Quantization,
    home: Home,
    programs: MixPrograms,
    tree: Path,
    *,
    force: bool = False,
) -> Path:
    """Choose the types of a mix, and record them beside it. Returns the matrix that it is made
    with. `tree` is llama.cpp's source, whose text is used where the user has given none.

    Raises PipelineError.
    """
    budget, digest = quantization.budget, quantization.input_identity(home, hashing=True)
    if budget is None or digest is None:
        raise PipelineError(
            f"{quantization.input}: has no matching receipt", "run the same command again"
        )
    if quantization.types is None:  # before a matrix is computed
        header = gguf.read(quantization.input)
        require_possible(budget, look(programs.quantize, quantization.input), weighed(header))
    matrix, text = _matrix_and_text(quantization, home, programs, tree, digest)
    recipe = quantization.mix_recipe(home, programs.tool, digest)
    known = stat_cache.identity(home.run / "sha256.json", matrix)
    key = json.dumps([{**recipe, "type": ""}, known], sort_keys=True)
    results = home.run / "mix" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    if force:
        remove(results)

    def maker(made: Path) -> None:
        if quantization.types is not None:
            choice = ChosenTypes(types=quantization.types)
        else:
            folder = made.with_name(f"{made.name}.work")
            remove(folder)
            folder.mkdir()
            work = MixWork(
                name=quantization.resolved.name,
                model=quantization.input,
                matrix=matrix,
                text=text,
                llama_quantize=programs.quantize,
                llama_perplexity=programs.perplexity,
                results=results,
                folder=folder,
                log=home.logs / f"mix-{quantization.resolved.slug}-{budget.text.lower()}.log",
            )
            try:
                choice = choose(work, budget)
            finally:
                remove(folder)
            log.info(f"{work.name}: {shown(choice)}")
        made.write_text(json.dumps(to_builtins(choice), indent=1) + "\n", "utf-8")

    pinned = quantization.types
    is_other = pinned is not None and json_file.read(quantization.mix, types_in) != pinned
    artifacts.make(
        quantization.mix,
        recipe,
        maker,
        source=quantization.resolved.source,
        force=force or is_other,
        sandbox=strength().name,
    )
    return matrix


def _matrix_and_text(
    quantization: Quantization, home: Home, programs: MixPrograms, tree: Path, digest: str
) -> tuple[Path, Path | None]:
    """The importance matrix, and the text to measure on: the user's, else what llama.cpp's source
    brings. There is no text for an encoder, which has no words to measure by."""
    given, encodes = quantization.imatrix, gguf.read(quantization.input).is_encoder
    if given and not is_text(given):
        return given, None if encodes else _text_if_here(tree, home)
    try:
        text = given or texts.save(tree, "calibration", home)
    except PipelineError as error:
        error.hint = "pass imatrix=PATH, a matrix or a text"
        raise
    options = ENCODER_OPTIONS if encodes else MATRIX_OPTIONS
    matrix = _matrix(quantization, home, programs, text, digest, options)
    return matrix, None if encodes else text


def _text_if_here(tree: Path, home: Home) -> Path | None:
    try:
        return texts.save(tree, "calibration", home)
    except PipelineError as error:
        log.info(f"warning: {error.message}\nwhat errors cost the model is not measured")
        return None


def _matrix(
    quantization: Quantization,
    home: Home,
    programs: MixPrograms,
    text: Path,
    digest: str,
    options: Sequence[str],
) -> Path:
    """The importance matrix of the model for a text, with what its last tensor is fed with."""
    if programs.imatrix is None:
        raise PipelineError(
            "llama-imatrix is not here, to compute an importance matrix with",
            "pass imatrix=PATH, a matrix that was computed elsewhere",
        )
    identity = stat_cache.identity(home.run / "sha256.json", text)
    target = quantization.target.with_name(f"imatrix-{identity[:12]}-output.gguf")
    make_imatrix(
        target,
        model=quantization.input,
        text=text,
        inputs={
            "input": digest,
            "text": f"sha256:{identity}",
            "tool": dict(programs.tool),
            "options": list(options),
        },
        program=programs.imatrix,
        home=home,
        options=options,
    )
    return target


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
    """What a mix is chosen with: the unquantized model, its matrix, a text to measure on (None: it
    has no words to measure by), llama.cpp's programs (`llama_perplexity` None: not here), where
    results are kept, a folder for large files, and the log."""

    name: str
    model: Path
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
    room = require_possible(budget, weights, matrix.__contains__)
    results = json_file.read(work.results, dict) or {}

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
        made = {line[1]: (line[4] or line[3]).lower() for line in TENSOR.finditer(output)}
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
    inputs = gguf.shards(work.model)
    bytes_ = sum(path.stat().st_size for path in inputs)
    require_space(work.folder, bytes_)
    status = run(
        [str(work.llama_quantize), *options, str(work.model), str(made), "Q8_0"],
        log=work.log,
        append=True,
        env=tools.env(),
        timeout=tools.seconds("quantize", bytes_),
        sandbox=tools.sandbox(
            work.llama_quantize,
            read=[*inputs, listed, work.matrix],
            write=[made],
            weights=bytes_,
            copies=COPIES,
        ),
    )
    if status:
        require_writable(work.folder)
        raise PipelineError(
            f"quantizing {work.name} failed (status {status}):\n{last_lines(work.log, 5)}",
            f"the whole log is {work.log}",
        )
