"""llama-bench: how fast a model runs here, and whether it runs at all."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from msgspec import Meta, Struct, json

from pipeline.core.errors import PipelineError
from pipeline.core.process import outcome
from pipeline.models import gguf, tools

from .figures import Estimate, Speed

PROMPT, GENERATED, REPETITIONS = 512, 128, 5  # llama-bench's own defaults
COPIES = 2  # of the weights in memory: as read, and repacked for the processor
SECONDS = 600.0
OUT_OF_MEMORY = 9  # the signal with which Linux ends a process when memory runs out


class BenchRow(Struct, frozen=True):
    """What llama-bench prints of one phase: whether tokens were written in it, and the speed of
    each repetition."""

    n_gen: int
    samples_ts: Annotated[tuple[Annotated[float, Meta(gt=0)], ...], Meta(min_length=1)]
    n_threads: int = 0


class Samples(Struct, frozen=True, kw_only=True):
    """Tokens a second, one figure a repetition, with so many `threads`. `decode` is empty for a
    model that only embeds."""

    prompt: Sequence[float]
    decode: Sequence[float]
    threads: int = 0

    @property
    def speed(self) -> Speed:
        """Means with their standard errors."""
        return Speed(
            prompt=estimate(self.prompt), decode=estimate(self.decode) if self.decode else None
        )


def samples(
    program: Path,
    model: Path,
    options: Sequence[str] = (),
    *,
    prompt: int = PROMPT,
    generated: int = GENERATED,
    repetitions: int = REPETITIONS,
    timeout: float = SECONDS,
) -> Samples:
    """Run the llama-bench `program` once with `options`: it reads a prompt of `prompt` tokens, and
    writes `generated` ones unless the model only embeds, each `repetitions` times after a warm-up.
    0 tokens: that is not measured.

    `timeout` is in seconds. Raises PipelineError where it fails, hangs or prints something else.
    """
    generated = 0 if gguf.read(model).is_encoder else generated
    words = [
        *(str(program), "-m", str(model), "-o", "json"),
        *("-p", str(prompt), "-n", str(generated), "-r", str(repetitions)),
        *options,
    ]
    status, out, err = outcome(
        words,
        timeout=timeout,
        env=tools.env(),
        sandbox=tools.sandbox(program, model=model, copies=COPIES),
    )
    if status:
        raise PipelineError(f"{model.name}: {program.name} {_reason(status, out, err, timeout)}")
    try:
        rows = {bool(row.n_gen): row for row in json.decode(out, type=list[BenchRow])}
        return Samples(
            prompt=rows[False].samples_ts if prompt else (),
            decode=rows[True].samples_ts if generated else (),
            threads=rows[not prompt].n_threads,
        )
    except (ValueError, KeyError, RecursionError):
        raise PipelineError(f"{model.name}: {program.name} printed no speeds") from None


def trial(program: Path, model: Path) -> str:
    """Run a token or two; why that fails, empty where it does not."""
    try:
        samples(program, model, prompt=1, generated=1, repetitions=1)
    except PipelineError as error:
        return error.message
    return ""


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of `values` and its standard error; one value has none."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return Estimate(statistics.fmean(values), spread / math.sqrt(len(values)))


def _reason(status: int, out: str, err: str, timeout: float) -> str:
    """Why a run ended with `status`, as the end of a sentence."""
    if status == -1 and "timed out" in err:
        return f"did not finish within {timeout:.0f} s"
    if status < 0:
        memory = ", probably because memory ran out" if -status == OUT_OF_MEMORY else ""
        return f"was killed by signal {-status}{memory}"
    last = (err.strip() or out.strip()).splitlines()[-1:]
    return f"ended with status {status}{f': {last[0].strip()}' if last else ''}"
