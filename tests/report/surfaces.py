"""Simulated machines: how fast each setting is on them, with what noise; and how long it takes."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from itertools import product

from pipeline.report.tuning import changed
from pipeline.report.tuning_axes import DECODE, LARGE, PROMPT, SMALL, Axis, Setting
from pipeline.report.tuning_bench import REQUEST as TOKENS
from pipeline.report.tuning_bench import repeated, tokens_of

REPETITIONS = 5  # of llama-bench by default
LOAD = 2.0  # seconds until a program has loaded the model


class Machine:
    """One of many, by its seed: the best number of threads, the gain of large batches with many
    threads, flash attention that helps or harms, options without any effect; noise of 1 to 10 % a
    sample, some of it shared by a run, a drift of up to 10 % and outliers."""

    def __init__(self, seed: int, *, cores: int = 16, noise: float | None = None) -> None:
        self.random = random.Random(seed)
        draw = self.random.uniform
        self.noise = draw(0.01, 0.1) if noise is None else noise
        self.drift, self.period = draw(0, 0.1), draw(200, 4000)
        self.outliers = draw(0, 0.03)
        self.seconds = 0.0
        counts = sorted({max(1, round(cores * part)) for part in (0.25, 0.5, 0.75, 0.875, 1)})
        usual = self.random.choice(counts)
        threads = (str(usual), *(str(each) for each in counts if each != usual))
        self.axes = (
            Axis("threads", threads, (DECODE,), effect=LARGE),
            Axis("threads-batch", threads, (PROMPT,), effect=LARGE),
            Axis("flash-attn", ("auto", "off")),
            Axis("ubatch-size", ("512", "256", "128"), (PROMPT,), True),
            Axis("load-mode", ("auto", "none", "mlock", "dio"), (DECODE,), effect=SMALL),
        )
        self._peak = {phase: self.random.choice(counts) for phase in TOKENS}
        self._fall = {phase: draw(0.1, 1.0) for phase in TOKENS}
        self._base = {PROMPT: draw(80, 300), DECODE: draw(10, 40)}
        self._off = {phase: draw(0.75, 1.15) for phase in TOKENS}
        self._none = draw(0.97, 1.06)
        self._ubatch = {"512": 1.0, **{each: draw(0.85, 1.12) for each in ("256", "128")}}
        self._together = draw(-0.1, 0.1)  # of threads and ubatch

    def speed(self, setting: Setting, phase: str) -> float:
        """Tokens a second, without any noise."""
        values = {axis.name: setting.get(axis.name, axis.values[0]) for axis in self.axes}
        threads = int(values["threads" if phase == DECODE else "threads-batch"])
        peak = self._peak[phase]
        ratio = threads / peak
        curve = ratio**0.8 if ratio < 1 else 1 / (1 + self._fall[phase] * (ratio - 1))
        speed = self._base[phase] * curve
        speed *= self._off[phase] if values["flash-attn"] == "off" else 1.0
        speed *= self._none if values["load-mode"] == "none" else 1.0
        if phase == PROMPT:
            doublings = math.log2(int(values["ubatch-size"]) / 512)
            speed *= self._ubatch[values["ubatch-size"]]
            speed *= 1 + self._together * doublings * (ratio - 1)
        return speed

    def time(self, setting: Setting) -> float:
        """Seconds of a whole request, without any noise."""
        return sum(count / self.speed(setting, phase) for phase, count in TOKENS.items())

    def weights(self) -> dict[str, float]:
        whole = self.time({})
        return {phase: TOKENS[phase] / self.speed({}, phase) / whole for phase in TOKENS}

    def measure(self, setting: Setting, phase: str) -> Sequence[float]:
        """As llama-bench would; the time passes."""
        run = math.exp(self.random.gauss(0, self.noise / 2))
        samples = []
        usual = self.speed({}, phase)
        tokens = tokens_of(setting, phase, usual, TOKENS[PROMPT])
        self.seconds += LOAD + (tokens / self.speed(setting, phase)) * (phase == PROMPT)
        for _ in range(repeated(phase, tokens, usual)):
            drift = 1 + self.drift * math.sin(self.seconds / self.period * 2 * math.pi)
            sample = self.speed(setting, phase) * drift * run
            sample *= math.exp(self.random.gauss(0, self.noise))
            if self.random.random() < self.outliers:
                sample *= self.random.uniform(0.4, 0.8)
            samples.append(sample)
            self.seconds += tokens / sample
        return samples

    def grid(self) -> Iterator[Setting]:
        """Every setting that one call of llama-bench could try: it has one number of threads."""
        axes = [axis for axis in self.axes if axis.name != "threads-batch"]
        for values in product(*(axis.values for axis in axes)):
            setting: Setting = {}
            for axis, value in zip(axes, values, strict=True):
                setting = changed(setting, axis, value)
            threads = setting.get("threads")
            yield {**setting, "threads-batch": threads} if threads else setting

    def exhaustive(self) -> tuple[float, float]:
        """The seconds of a request with the best setting of the whole grid, where each phase may
        have its own number of threads; and those that measuring the grid takes."""
        seconds = 0.0
        shared: dict[tuple[str, str], dict[str, float]] = {}
        for setting in self.grid():
            key = (setting.get("flash-attn", ""), setting.get("load-mode", ""))
            seconds += LOAD
            times = shared.setdefault(key, {})
            for phase, count in TOKENS.items():
                once = count / self.speed(setting, phase)
                times[phase] = min(times.get(phase, math.inf), once)
                seconds += (REPETITIONS + (phase == PROMPT)) * once
        return min(sum(times.values()) for times in shared.values()), seconds
