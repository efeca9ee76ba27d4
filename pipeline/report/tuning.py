"""The search for the fastest setting, whatever measures it. Nothing here has an effect of its own.

Options are grouped in axes, each with the few values worth trying. From the default on, one axis
after the other is raced: its values are measured in turns, forwards and backwards, and the slower
half is dropped until one is left. A second pass sees what other axes have changed. The winner then
meets the default once more, with fresh figures, until the difference is clear: it replaces the
default only where it is faster beyond the noise.

Only runs of the same round are compared, so a machine that slowly gets warmer favours nobody.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import count

from msgspec import Struct, field

from pipeline.core.errors import PipelineError

from .figures import Estimate

PROMPT, DECODE = "prompt", "decode"  # the phases of a request
BUSY = 0.2  # relative spread of the default above which something else disturbs
ROUNDS = 6  # of a race, at most
BLOCKS = 3, 12  # of the final comparison, at least and at most
SEARCH = 0.6  # the share of the time after which only the comparison is left
CLEAR = 2.0  # standard errors
WORTH = 0.01  # relative gain below which an axis keeps its value
LEAST_NOISE = 0.01  # relative; a few runs that agree by chance prove no less
NOTHING = 0.02  # relative gain below which the default may as well stay
HOPELESS = 0.1  # relative loss of a value that the second pass does not try again
NORMAL_MAD = 1.4826  # a standard deviation, in median absolute deviations

Setting = Mapping[str, str]  # the value of each axis that differs from its default


class Axis(Struct, frozen=True):
    """Options that are changed together. The first of `values` is the default; `phases` are those
    whose speed they change. `is_named`: while its values are compared, a setting names the default
    too, since what measures them has to know."""

    name: str
    values: tuple[str, ...]
    phases: tuple[str, ...] = (PROMPT, DECODE)
    is_named: bool = False


# Tokens a second of one phase with a setting, one figure a repetition. Raises PipelineError.
Measure = Callable[[Setting, str], Sequence[float]]


class SearchResult(Struct, frozen=True, kw_only=True):
    """What a search found. `setting` is empty where nothing is faster than the default."""

    setting: Setting
    ratio: Estimate  # of the speed of `setting` to the default's, over a whole request
    spread: float  # of the default between runs: a relative standard deviation
    left_out: Mapping[str, str] = field(default_factory=dict)  # settings that failed, and why
    untried: tuple[str, ...] = ()  # axes for which no time was left

    @property
    def is_busy(self) -> bool:
        """Whether something else loads the machine, so that nothing of this counts."""
        return self.spread > BUSY


class OutOfTime(Exception):
    """No time is left for another measurement."""


def search(
    axes: Sequence[Axis],
    measure: Measure,
    weights: Mapping[str, float],
    *,
    has_time: Callable[[float], bool],
) -> SearchResult:
    """The fastest setting. `weights` are the shares that the phases have in the time of a request
    with the default, together 1; `has_time(share)` says whether less than this share of the time
    has passed. Raises PipelineError where the default itself cannot be measured."""
    return _Search(axes, measure, weights, has_time).run()


def shown(setting: Setting) -> str:
    """A setting as people read it."""
    return ", ".join(f"{name} {value}" for name, value in setting.items()) or "the default"


class _Search:
    def __init__(
        self,
        axes: Sequence[Axis],
        measure: Measure,
        weights: Mapping[str, float],
        has_time: Callable[[float], bool],
    ) -> None:
        self.axes, self.weights = axes, weights
        self._measure, self._has_time = measure, has_time
        self.left_out: dict[str, str] = {}
        self.deficits: dict[tuple[str, str], float] = {}  # of values, in their last race
        self.defaults = {axis.name: axis.values[0] for axis in axes}
        self.default_runs: dict[str, dict[str, list[float]]] = {}  # by phase and setting
        self.runs: dict[tuple[str, str], list[float]] = {}  # logarithms, by setting and phase

    def run(self) -> SearchResult:
        best: Setting = {}
        untried = {axis.name for axis in self.axes}
        try:
            for phase in self.weights:  # a default that fails ends the search
                self._run({}, phase)
            for axis in self.axes:
                best = self._race(axis, axis.values, best)
                untried.discard(axis.name)
            for axis in self.axes:
                best = self._race(axis, self._hopeful(axis), best)
        except OutOfTime:
            pass
        ratio = Estimate(1.0)
        if best:
            try:
                ratio = self._compare(best)
            except PipelineError as error:
                self.left_out[shown(best)] = error.message
            if ratio.value - CLEAR * ratio.error <= 1:
                best, ratio = {}, Estimate(1.0, ratio.error)
        return SearchResult(
            setting=best,
            ratio=ratio,
            spread=self.spread(),
            left_out=self.left_out,
            untried=tuple(axis.name for axis in self.axes if axis.name in untried),
        )

    def spread(self) -> float:
        """Of the runs of the default, in the phase where it is larger."""
        runs = [values for each in self.default_runs.values() for values in each.values()]
        return max(map(robust_spread, runs), default=0.0)

    # One axis

    def _race(self, axis: Axis, values: Sequence[str], best: Setting) -> Setting:
        """The best setting, with the value of `axis` that wins. Raises OutOfTime."""
        phases = [phase for phase in axis.phases if phase in self.weights]
        own = best.get(axis.name, axis.values[0])
        settings = {value: named(best, axis, value) for value in values}
        running = [own, *(value for value in values if value != own)]
        gains: dict[str, list[float]] = {value: [] for value in running}
        for turn in range(ROUNDS):
            if len(running) < 2 or not phases:
                break
            if not self._has_time(SEARCH):
                raise OutOfTime
            times = self._round(axis, settings, running[:: 1 if turn % 2 == 0 else -1], phases)
            running = [value for value in running if value in times]
            if own not in times:
                break
            for value in running:
                gains[value].append(math.log(times[own] / times[value]))
            if turn % 2:  # each has had its turn early and late
                running = self._fastest(gains, running, own, phases)
        noise = self._noise(phases)
        means = {value: typical(gains[value], noise) for value in running if gains[value]}
        fastest = max(means, key=means.__getitem__, default=own)
        top = means.get(fastest, 0.0)
        for value, each in gains.items():
            if each:
                self.deficits[axis.name, value] = top - max(each)
        return changed(best, axis, fastest) if top > WORTH else best

    def _round(
        self,
        axis: Axis,
        settings: Mapping[str, Setting],
        order: Sequence[str],
        phases: Sequence[str],
    ) -> dict[str, float]:
        """The relative time of a request with each value that can be measured."""
        times: dict[str, float] = {}
        for value in order:
            try:
                times[value] = self._time(settings[value], phases)
            except PipelineError as error:
                self.left_out[f"{axis.name} {value}"] = error.message
        return times

    def _fastest(
        self,
        gains: Mapping[str, list[float]],
        running: Sequence[str],
        own: str,
        phases: Sequence[str],
    ) -> list[str]:
        """The values that stay in the race: none that is clearly slower, or gains next to nothing;
        of the slower half only what is close. Beside them the present one, unless it is clearly
        beaten."""
        noise = self._noise(phases)
        means = {value: typical(gains[value], noise) for value in running}
        ranked = sorted(running, key=lambda value: -means[value])
        error = CLEAR * noise * math.sqrt(2 / len(gains[own]))
        top, half = means[ranked[0]], max(1, len(ranked) // 2)
        kept = [*ranked[:half], *(v for v in ranked[half:] if top - means[v] <= error / 2)]
        # A run that something disturbed is slow: the better ones count.
        behind = {value: top - max(means[value], max(gains[value]) - error) for value in kept}
        kept = [value for value in kept if behind[value] <= error]
        kept = [value for value in kept if value == own or means[value] + error >= NOTHING]
        return kept if own in kept or (len(kept) == 1 and top > error) else [own, *kept]

    def _noise(self, phases: Sequence[str]) -> float:
        """The relative standard deviation of the time of a request, by all runs that were made more
        than once: what one phase adds to it where the others stay the same."""
        variance = 0.0
        for phase in phases:
            deviations: list[float] = []
            for (_, each), logs in self.runs.items():
                if each == phase and len(logs) > 1:
                    mean, widened = statistics.fmean(logs), math.sqrt(len(logs) / (len(logs) - 1))
                    deviations += [widened * abs(log - mean) for log in logs]
            if deviations:
                variance += (self.weights[phase] * NORMAL_MAD * statistics.median(deviations)) ** 2
        return max(LEAST_NOISE, math.sqrt(variance))

    def _hopeful(self, axis: Axis) -> list[str]:
        """The values that were not far behind."""
        known = self.deficits
        return [v for v in axis.values if known.get((axis.name, v), math.inf) < HOPELESS]

    # Runs

    def _time(self, setting: Setting, phases: Sequence[str]) -> float:
        """The time of a request with a setting, that with the default being about 1. Phases that
        are not measured take as long as with the default."""
        time = 1.0
        for phase in phases:
            speed = self._run(setting, phase)
            reference = self.default_runs[phase][shown({})][0]
            time += self.weights[phase] * (reference / speed - 1)
        return time

    def _run(self, setting: Setting, phase: str) -> float:
        """The median speed of one run."""
        speed = statistics.median(self._measure(setting, phase))
        self.runs.setdefault((shown(setting), phase), []).append(math.log(speed))
        if all(self.defaults[name] == value for name, value in setting.items()):
            runs = self.default_runs.setdefault(phase, {})
            runs.setdefault(shown(setting), []).append(speed)
        return speed

    # The best against the default

    def _compare(self, best: Setting) -> Estimate:
        """How many times as fast as the default a setting is, with the standard error."""
        gains: list[float] = []
        least, most = BLOCKS
        named_axes = [axis for axis in self.axes if axis.is_named and axis.name in best]
        default = {axis.name: axis.values[0] for axis in named_axes}
        mean = error = 0.0
        for block in count(1):
            times: dict[bool, list[float]] = {True: [], False: []}
            order = (True, False, False, True) if block % 2 else (False, True, True, False)
            for is_best in order:
                setting = best if is_best else default
                times[is_best].append(self._time(setting, [*self.weights]))
            gains.append(math.log(statistics.fmean(times[False]) / statistics.fmean(times[True])))
            if block < least:
                continue
            noise = self._noise([*self.weights])
            kept = winsorized(gains, noise)
            mean = statistics.fmean(kept)
            error = min(noise, statistics.stdev(kept) * student(block)) / math.sqrt(block)
            is_clear = mean - CLEAR * error > 0 or mean + CLEAR * error < math.log1p(NOTHING)
            if is_clear or block == most or not self._has_time(1.0):
                break
        return Estimate(math.exp(mean), math.exp(mean) * error)


def changed(setting: Setting, axis: Axis, value: str) -> Setting:
    """The setting with another value of an axis; defaults are left out."""
    rest = {name: each for name, each in setting.items() if name != axis.name}
    return rest if value == axis.values[0] else {**rest, axis.name: value}


def named(setting: Setting, axis: Axis, value: str) -> Setting:
    """The same for a comparison of the values of an axis."""
    return {**setting, axis.name: value} if axis.is_named else changed(setting, axis, value)


def robust_spread(values: Sequence[float]) -> float:
    """The relative standard deviation that the median of the deviations stands for."""
    middle = statistics.median(values)
    return NORMAL_MAD * statistics.median(abs(value - middle) for value in values) / middle


def winsorized(values: Sequence[float], deviation: float) -> list[float]:
    """Outliers are moved to where a normal distribution of this standard deviation would end."""
    middle, reach = statistics.median(values), 3 * deviation
    return [min(max(value, middle - reach), middle + reach) for value in values]


def typical(values: Sequence[float], deviation: float) -> float:
    """The mean of values with this standard deviation, without what outliers do to it."""
    return statistics.fmean(winsorized(values, deviation))


def student(size: int) -> float:
    """By how much the standard error of so few values has to be widened (Student's t at 97.5 %,
    over the 1.96 of the normal distribution)."""
    freedom = size - 1
    return 1 + 1.2 / freedom + 2.3 / freedom**2
