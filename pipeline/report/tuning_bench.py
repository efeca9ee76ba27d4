"""The search for the fastest setting with llama-bench."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from msgspec import Struct

from pipeline.core import log

from . import bench, tuning, tuning_axes
from .tuned import Runs
from .tuning import SearchResult
from .tuning_axes import DECODE, PROMPT, Axis, Setting

BATCHES = {tuning_axes.BATCH, tuning_axes.UBATCH}
REQUEST = {PROMPT: 512, DECODE: 128}  # tokens of the request whose time counts
FIRST = {PROMPT: 64, DECODE: 8}  # of the first run, which shows how fast the model is
LONG_PROMPT = 2048  # tokens read at once where cards take larger batches
SECONDS = {PROMPT: 1.5, DECODE: 0.75}  # that a repetition takes, roughly
LEAST = {PROMPT: 128, DECODE: 16}  # tokens of a repetition
REPETITIONS = {PROMPT: 2, DECODE: 3}
SLOW = 6.0  # seconds of a repetition, above which it is not repeated
PATIENCE = 10.0  # times as long as the default may a run take
LEAST_PATIENCE = 60.0  # seconds


class FirstRun(Struct, frozen=True):
    """What the first run of the default shows: its number of threads, and tokens a second."""

    threads: int
    prompt: float
    decode: float  # 0 for a model that only embeds

    @property
    def weights(self) -> dict[str, float]:
        """The shares of the phases in the time of a request."""
        times = {PROMPT: REQUEST[PROMPT] / self.prompt}
        if self.decode:
            times[DECODE] = REQUEST[DECODE] / self.decode
        return {phase: each / sum(times.values()) for phase, each in times.items()}


def tokens_of(setting: Setting, phase: str, speed: float, longest: int) -> int:
    """The tokens of a repetition, at so many a second: as many as take a moment. Sizes of batches
    are compared with the `longest` prompt."""
    if phase == PROMPT and BATCHES & setting.keys():
        return longest
    most = longest if phase == PROMPT else REQUEST[DECODE]
    return min(most, max(LEAST[phase], round(speed * SECONDS[phase])))


def repeated(phase: str, tokens: int, speed: float) -> int:
    """How often a run repeats so many tokens, at so many a second."""
    return 1 if tokens / speed > SLOW else REPETITIONS[phase]


class Bench:
    """llama-bench with one model: what it measures is kept in `runs`.

    `given` are the user's options of llama-server. With `cards` the layers that fit lie on them
    beside a context of `ctx_size` tokens, of which the model was `trained` for so many.
    """

    def __init__(
        self,
        program: Path,
        model: Path,
        runs: Runs,
        *,
        given: Mapping[str, str],
        cards: int = 0,
        ctx_size: int = 0,
        trained: int = 0,
    ) -> None:
        self.program, self.model, self.runs, self.given = program, model, runs, given
        self.cards, self.ctx_size = cards, ctx_size
        longest = LONG_PROMPT if cards else REQUEST[PROMPT]
        self._prompt = min(longest, trained or longest)
        self._slowest = 0.0  # seconds of a run of the default
        self.first = self._first()

    def _first(self) -> FirstRun:
        """From a short run. Raises PipelineError where the default does not run."""
        kept = self.runs.take({}, "first")
        if kept is None:
            words = tuning_axes.bench_words(
                {}, DECODE, self.given, cards=self.cards, ctx_size=self.ctx_size
            )
            samples = bench.samples(
                self.program,
                self.model,
                words,
                prompt=min(FIRST[PROMPT], self._prompt),
                generated=FIRST[DECODE],
                repetitions=1,
            )
            kept = (float(samples.threads), samples.prompt[0], *samples.decode[:1], 0.0)[:3]
            self.runs.add({}, "first", kept)
        return FirstRun(int(kept[0]), kept[1], kept[2])

    def measure(self, setting: Setting, phase: str) -> Sequence[float]:
        """A run of llama-bench: tokens a second of each repetition. Raises PipelineError."""
        samples = self.runs.take(setting, phase)
        if samples is None:
            samples = self._run(setting, phase)
            self.runs.add(setting, phase, samples)
        return samples

    def _run(self, setting: Setting, phase: str) -> Sequence[float]:
        speed = self.first.prompt if phase == PROMPT else self.first.decode
        size = tokens_of(setting, phase, speed, self._prompt)
        repetitions = repeated(phase, size, speed)
        expected = max(self._slowest, (repetitions + 1) * size / speed)
        began = time.monotonic()
        samples = bench.samples(
            self.program,
            self.model,
            tuning_axes.bench_words(
                setting, phase, self.given, cards=self.cards, ctx_size=self.ctx_size
            ),
            prompt=size if phase == PROMPT else 0,
            generated=size if phase == DECODE else 0,
            repetitions=repetitions,
            timeout=max(LEAST_PATIENCE, PATIENCE * expected),
        )
        if not setting:
            self._slowest = max(self._slowest, time.monotonic() - began)
        measured = samples.prompt if phase == PROMPT else samples.decode
        log.info(f"{phase} {statistics.median(measured):8.1f} tokens/s  {tuning.shown(setting)}")
        return measured


def search(bench: Bench, axes: Sequence[Axis], has_time: Callable[[float], bool]) -> SearchResult:
    """The fastest setting of `axes`, a request being as long as REQUEST says. Raises
    PipelineError."""
    return tuning.search(axes, bench.measure, bench.first.weights, has_time=has_time)
