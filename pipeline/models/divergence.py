"""How far a quant's answers are from those of the unquantized model: the Kullback-Leibler
divergence of the next token's probabilities, as llama-perplexity measures it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct

from pipeline.core.errors import PipelineError
from pipeline.core.process import last_lines, run

from . import gguf, tools

CONTEXT = 512  # tokens of a chunk, of whose second half the answers are compared
COPIES = 2  # of the weights in memory: repacked for the processor, and buffers
ANSWER_BYTES = 2  # for each word of the vocabulary and each token that is compared
# The last line of these may be missing: on a busy machine llama.cpp's log loses what was not yet
# printed when the program ends (common/log.cpp).
TRIES = 3
NUMBER = r"([-+.\w]+)"
MEAN = re.compile(rf"^Mean +KLD: +{NUMBER}")
CHUNK = re.compile(rf"^ *\d+ +\S+ ± +\S+ +\S+ ± +\S+ +{NUMBER} ±")


class ReferenceRun(Struct, frozen=True, kw_only=True):
    """What the unquantized `model` answers to a text: `answers` is the file that llama-perplexity
    writes and reads, `seconds` how long a run may take."""

    program: Path
    model: Path
    answers: Path
    log: Path
    seconds: float


def answer_bytes(vocabulary: int, chunks: int) -> int:
    """How large the file of the answers becomes."""
    return ANSWER_BYTES * (vocabulary + 4) * CONTEXT // 2 * chunks


def answer(reference: ReferenceRun, text: Path, chunks: int) -> None:
    """Write what the unquantized model answers to so many chunks of a text. Raises PipelineError,
    also where it takes too long."""
    answers = reference.answers
    words = ["-f", str(text), "--chunks", str(chunks), "--kl-divergence-base", str(answers)]
    _run(reference, reference.model, words, read=[text], write=[answers])
    if not answers.stat().st_size:
        raise PipelineError(
            f"{text}: is too short to measure on", f"it must have {2 * CONTEXT} tokens at least"
        )


def measure(reference: ReferenceRun, model: Path) -> float:
    """The mean divergence of a quant, in nats a token. Raises PipelineError."""
    words = ["--kl-divergence-base", str(reference.answers), "--kl-divergence"]
    found: re.Match[str] | None = None
    for _ in range(TRIES):
        lines = _run(reference, model, words, read=[reference.answers])
        if found := next(filter(None, map(MEAN.match, lines)), None):
            break
        # It is the mean so far.
        found = next(filter(None, map(CHUNK.match, reversed(lines))), None)
    if found is None or not math.isfinite(float(found[1])):
        raise PipelineError(
            f"{model.name}: llama-perplexity measured no divergence",
            f"the whole log is {reference.log}",
        )
    return max(0.0, float(found[1]))


def _run(
    reference: ReferenceRun,
    model: Path,
    words: Sequence[str],
    *,
    read: Sequence[Path],
    write: Sequence[Path] = (),
) -> list[str]:
    """Run llama-perplexity: its output."""
    program, files, lines = reference.program, gguf.shards(model), list[str]()
    context = min(CONTEXT, gguf.read(files[0]).context_length or CONTEXT)
    status = run(
        [str(program), "-m", str(model), "-c", str(context), *words],
        log=reference.log,
        append=True,
        env=tools.env(),
        on_line=lines.append,
        timeout=reference.seconds,
        sandbox=tools.sandbox(
            program,
            read=[*files, *read],
            write=write,
            weights=sum(path.stat().st_size for path in files),
            copies=COPIES,
        ),
    )
    if status:
        raise PipelineError(
            f"{model.name}: llama-perplexity ended with status {status}:\n"
            f"{last_lines(reference.log, 5)}",
            f"the whole log is {reference.log}",
        )
    return lines
