"""The file with the types of a mix, beside the GGUF: chosen for its size, or as a lock file pins
them. And the importance matrix that a mix is chosen and made with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct, to_builtins

from pipeline.core import log
from pipeline.core.errors import PipelineError
from pipeline.core.paths import Home
from pipeline.core.sandbox import strength
from pipeline.core.store import artifacts, json_file, stat_cache
from pipeline.core.store.publish import remove

from . import gguf, imatrix, texts
from .mix_choice import ChosenTypes, MixWork, choose, shown
from .quantize import Quantization, require_possible, types_in

MATRIX_OPTIONS = ["--process-output", "--chunks", "128"]  # of 512 tokens


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
    digest, budget = quantization.require_input(home), quantization.budget
    if budget is None:
        raise ValueError(f"{quantization.quant} is not a mix")
    given, types = quantization.imatrix, quantization.types
    if types is None:  # before a matrix is computed
        require_possible(quantization, quantization.input, programs.quantize)
    elif given and not imatrix.is_text(given):
        record(quantization, home, programs.tool, digest, force=force)
        return given
    matrix, text = _matrix_and_text(quantization, home, programs, tree, digest)
    if types is not None:
        record(quantization, home, programs.tool, digest, force=force)
        return matrix
    recipe = quantization.mix_recipe(home, programs.tool, digest)
    known = stat_cache.identity(home.digests, matrix)
    key = json.dumps([{**recipe, "type": ""}, known], sort_keys=True)
    results = home.run / "mix" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    if force:
        remove(results)

    def choice(made: Path) -> ChosenTypes:
        folder = work_folder(made)
        remove(folder)
        folder.mkdir()
        work = MixWork(
            name=quantization.resolved.name,
            model=quantization.input,
            digest=digest,
            matrix=matrix,
            text=text,
            llama_quantize=programs.quantize,
            llama_perplexity=programs.perplexity,
            results=results,
            folder=folder,
            log=home.logs / f"mix-{quantization.resolved.slug}-{budget.text.lower()}.log",
        )
        try:
            chosen = choose(work, budget)
        finally:
            remove(folder)
        log.info(f"{work.name}: {shown(chosen)}")
        return chosen

    _make(quantization, home, programs.tool, digest, choice, force=force)
    return matrix


def record(
    quantization: Quantization,
    home: Home,
    tool: Mapping[str, Any],
    digest: str,
    *,
    force: bool = False,
) -> None:
    """Record the types of a mix that a lock file pins, beside it. `digest` is that of the input.
    Raises PipelineError."""
    pinned = quantization.types or {}
    is_other = json_file.read(quantization.mix, types_in) != pinned
    chosen = ChosenTypes(types=pinned)
    _make(quantization, home, tool, digest, lambda _: chosen, force=force or is_other)


def _make(
    quantization: Quantization,
    home: Home,
    tool: Mapping[str, Any],
    digest: str,
    choice: Callable[[Path], ChosenTypes],
    *,
    force: bool,
) -> None:
    """Make the file with the types of a mix; `choice` is given the path that it is made at."""

    def maker(made: Path) -> None:
        chosen = to_builtins(choice(made))
        made.write_text(json.dumps(chosen, indent=1) + "\n", "utf-8")

    artifacts.make(
        quantization.mix,
        quantization.mix_recipe(home, tool, digest),
        maker,
        source=quantization.resolved.source,
        force=force,
        sandbox=strength().name,
    )


def work_folder(made: Path) -> Path:
    """The folder for large files while the types are chosen that are written to `made`."""
    return made.with_name(f"{made.name}.work")


def results_of(home: Home) -> Iterator[tuple[Path, str]]:
    """What is kept of choosing mixes, each with the digest of the model that it is of."""
    for path in sorted((home.run / "mix").glob("*.json")):
        yield path, json_file.read(path, lambda data: str(data["input"])) or ""


def _matrix_and_text(
    quantization: Quantization, home: Home, programs: MixPrograms, tree: Path, digest: str
) -> tuple[Path, Path | None]:
    """The importance matrix, and the text to measure on: the user's, else what llama.cpp's source
    brings. There is no text for an encoder, which has no words to measure by."""
    given, encodes = quantization.imatrix, gguf.read(quantization.input).is_encoder
    if given and not imatrix.is_text(given):
        return given, None if encodes else _text_if_here(tree, home)
    try:
        text = given or texts.save(tree, "calibration", home)
    except PipelineError as error:
        error.hint = "pass imatrix=PATH, a matrix or a text"
        raise
    if programs.imatrix is None:
        raise PipelineError(
            "llama-imatrix is not here, to compute an importance matrix with",
            "pass imatrix=PATH, a matrix that was computed elsewhere",
        )
    matrix = imatrix.make(
        quantization.target.parent,
        model=quantization.input,
        digest=digest,
        text=text,
        program=programs.imatrix,
        tool=programs.tool,
        home=home,
        options=MATRIX_OPTIONS,
    )
    return matrix, None if encodes else text


def _text_if_here(tree: Path, home: Home) -> Path | None:
    try:
        return texts.save(tree, "calibration", home)
    except PipelineError as error:
        log.info(f"warning: {error.message}\nwhat errors cost the model is not measured")
        return None
