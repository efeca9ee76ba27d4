"""The search for the fastest setting, whatever measures it. Nothing here has an effect of its own.

Options are grouped in axes, each with the few values worth trying. First each value is measured
alone, which shows what fails and what is hopeless. Then the values that may still win are measured
in changing combinations, so that one run says something about several axes; what all runs say
together is in `tuning_effects`. An axis is closed once no value of it can gain anything worth
having. At last the best setting and the default alternate until the difference is clear: it
replaces the default only where it is faster beyond the noise.
"""

from __future__ import annotations

import math
import random
import statistics
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from itertools import count

from msgspec import Struct, field

from pipeline.core.errors import PipelineError

from .figures import Estimate
from .tuning_axes import Axis, Setting
from .tuning_effects import MACHINE, Effects, Key, Row

BUSY = 0.2  # relative spread from run to run above which something else disturbs
SEARCH = 0.7  # the share of the time after which only the comparison is left
TURNS = 200  # of the search, at most
PAIRS = 2, 24  # of runs of the best and the default, at least and at most
CLEAR = 2.0  # standard deviations
NOTHING = 0.02  # relative gain below which the default may as well stay
WORTH = 0.005  # relative gain below which an axis keeps its default
SWITCH = 0.01  # relative gain that interrupts a comparison for another setting
OPEN = 0.002  # relative gain to be expected of more runs, below which a value is closed
ENOUGH = 0.008  # the same of all axes together, below which the search ends
LONE = 0.1  # standard deviation of a gain, at least, while a single run speaks for it
BASE, NAMED, PAIR, DRIFT = 0.3, 0.1, 0.06, 0.02  # prior standard deviations: see `_Search._prior`

# Tokens a second of one phase with a setting, one figure a repetition. Raises PipelineError.
Measure = Callable[[Setting, str], Sequence[float]]


class SearchResult(Struct, frozen=True, kw_only=True):
    """What a search found. `setting` is empty where nothing is faster than the default."""

    setting: Setting
    ratio: Estimate  # of the speed of `setting` to the default's, over a whole request
    spread: float  # of the same setting between runs: a relative standard deviation
    speeds: Mapping[str, float] = field(default_factory=dict)  # tokens a second with it, by phase
    default_speeds: Mapping[str, float] = field(default_factory=dict)
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


def changed(setting: Setting, axis: Axis, value: str) -> Setting:
    """The setting with another value of an axis; defaults are left out."""
    rest = {name: each for name, each in setting.items() if name != axis.name}
    return rest if value == axis.values[0] else {**rest, axis.name: value}


class _Search:
    def __init__(
        self,
        axes: Sequence[Axis],
        measure: Measure,
        weights: Mapping[str, float],
        has_time: Callable[[float], bool],
    ) -> None:
        self.weights = weights
        self.axes = {axis.name: axis for axis in axes if self._phases(axis)}
        self.values = {name: [axis.values[0]] for name, axis in self.axes.items()}  # that run
        self.left_out: dict[str, str] = {}
        self.best: Setting = {}
        self._measure, self._has_time = measure, has_time
        self._random = random.Random(0)  # noqa: S311 - to repeat a search
        self._effects = Effects(self._prior)
        self._first: dict[str, float] = {}  # logarithms of the default's first speeds
        self._runs: dict[tuple[str, str], list[float]] = {}  # medians, by phase and setting
        self._failed: set[tuple[str, str]] = set()
        self._counts: Counter[Key] = Counter()  # of runs, by phase and value
        self._compared: list[Setting] = []  # each time that one was compared with the default

    def run(self) -> SearchResult:
        untried = dict.fromkeys(self.axes)
        try:
            self._measure_default()
            for axis in self.axes.values():
                self._screen(axis)
                del untried[axis.name]
            self._measure_default()
        except OutOfTime:
            self.values |= {name: self.values[name][:1] for name in untried}
        for turn in count():
            if not self._step(turn):
                break
        self.best, gain = self._proven()
        return SearchResult(
            setting=self.best,
            ratio=Estimate(math.exp(gain.value), math.exp(gain.value) * gain.error),
            spread=self._effects.noise,
            speeds={phase: self._speed(self.best, phase) for phase in self.weights},
            default_speeds={phase: self._speed({}, phase) for phase in self.weights},
            left_out=self.left_out,
            untried=tuple(untried),
        )

    def _proven(self) -> tuple[Setting, Estimate]:
        """The fastest setting that is clearly faster than the default, and its gain."""
        proven: Setting = {}
        best = Estimate(0.0, self._gain(self.best, {}).error)
        for setting in self._compared:
            gain = self._gain(setting, {})
            is_proven = self._pairs(setting) >= PAIRS[0] and is_clear(gain)
            if is_proven and gain.value > best.value and not self._has_failed(setting):
                proven, best = setting, gain
        return proven, best

    def _speed(self, setting: Setting, phase: str) -> float:
        """The median of all runs of a setting that was compared, in tokens a second."""
        return statistics.median(self._runs[phase, shown(self._part(setting, phase))])

    # What is measured next

    def _measure_default(self) -> None:
        for phase in self.weights:
            self._run({}, phase)

    def _screen(self, axis: Axis) -> None:
        """Each value of an axis alone. Raises OutOfTime."""
        for value in axis.values[not axis.is_named :]:
            for phase in self._phases(axis):
                if not self._has_time(SEARCH):
                    raise OutOfTime
                try:
                    self._run(changed({}, axis, value), phase, [axis])
                except PipelineError as error:
                    self.left_out[f"{axis.name} {value}"] = error.message
                    break
            else:
                if value != axis.values[0]:
                    self.values[axis.name].append(value)

    def _step(self, turn: int) -> bool:
        """Make the next runs; False where there is nothing left to do."""
        self.best = self._leader()
        pairs, gain = self._pairs(self.best), self._gain(self.best, {})
        is_known = is_clear(gain) or gain.value + CLEAR * gain.error < NOTHING
        is_settled = not self.best or (pairs >= PAIRS[0] and is_known)
        rivals = self._rivals() if turn < TURNS else {}
        if rivals and self._has_time(1.0 if is_settled else SEARCH):
            self._explore(rivals, turn)
        elif is_settled or pairs >= PAIRS[1] or not self._has_time(1.0):
            return False
        else:
            self._compare(pairs)
        return True

    def _leader(self) -> Setting:
        """The fastest setting; once the search is over, the one whose comparison has begun, unless
        it is clearly behind."""
        best = self._fastest()
        if self._has_time(SEARCH) or not self._compared:
            return best
        last = self._compared[-1]
        is_behind = self._has_failed(last) or self._gain(best, last).value > SWITCH
        return best if is_behind else last

    def _explore(self, rivals: Mapping[str, list[tuple[str, Estimate]]], turn: int) -> None:
        """A run of a setting whose values may all be the best. What is likelier to be comes more
        often; every other time a value takes part that more runs promise most of."""
        setting = self.best
        promising = max(rivals, key=lambda name: sum(expected(gain) for _, gain in rivals[name]))
        for name, values in rivals.items():
            drawn = {value: self._random.gauss(gain.value, gain.error) for value, gain in values}
            value = max(drawn, key=drawn.__getitem__)
            if drawn[value] > 0 or (turn % 2 == 0 and name == promising):
                setting = changed(setting, self.axes[name], value)
        axes = [self.axes[name] for name in rivals]
        self._try(setting, {phase for axis in axes for phase in axis.phases}, axes)

    def _compare(self, pairs: int) -> None:
        """A run of the best setting and one of the default, in turns."""
        best = self.best
        self._compared.append(best)
        phases = [phase for phase in self.weights if self._part(best, phase)]
        named = [self.axes[name] for name in best]
        for setting in (best, {}) if pairs % 2 else ({}, best):
            self._try(setting, phases, named)

    def _pairs(self, setting: Setting) -> int:
        """How often a setting was compared with the default."""
        return self._compared.count(setting)

    # Runs

    def _try(self, setting: Setting, phases: Container[str], named: Sequence[Axis]) -> None:
        """A run of a setting in these phases, which is left out where it fails. Raises
        PipelineError where the default fails."""
        for phase in self.weights:
            part = self._part(setting, phase)
            if not self._has_time(1.0):
                return
            if phase in phases and (phase, shown(part)) not in self._failed:
                try:
                    self._run(setting, phase, named)
                except PipelineError as error:
                    if not part:
                        raise
                    self._failed.add((phase, shown(part)))
                    self.left_out[shown(part)] = error.message

    def _run(self, setting: Setting, phase: str, named: Sequence[Axis] = ()) -> None:
        """A run of what a setting changes in a phase. Raises PipelineError."""
        part = self._part(setting, phase)
        row = {**self._row(part, phase), (phase,): 1.0, MACHINE: 1.0}
        for axis in named:
            if axis.is_named and phase in axis.phases:
                part = {**part, axis.name: part.get(axis.name, axis.values[0])}
                row[phase, axis.name] = 1.0
        samples = self._measure(part, phase)
        self._counts.update((phase, *item) for item in part.items())
        logs = [math.log(each) for each in samples]
        first = self._first.setdefault(phase, statistics.median(logs))
        self._effects.add(row, [each - first for each in logs])
        self._runs.setdefault((phase, shown(part)), []).append(statistics.median(samples))

    # What is known

    def _phases(self, axis: Axis) -> list[str]:
        return [phase for phase in self.weights if phase in axis.phases]

    def _part(self, setting: Setting, phase: str) -> Setting:
        """What a setting changes in a phase, in the order of the axes."""
        return {
            name: setting[name]
            for name, axis in self.axes.items()
            if name in setting and phase in axis.phases
        }

    def _row(self, part: Setting, phase: str) -> Row:
        """The effects of what is changed in a phase."""
        values = [*part.items()]
        row: dict[Key, float] = {(phase, *value): 1.0 for value in values}
        for at, value in enumerate(values):
            row |= {(phase, *value, *other): 1.0 for other in values[at + 1 :]}
        return row

    def _prior(self, key: Key) -> float:
        """The standard deviation of an effect that nothing was measured of: of the machine, of a
        phase, of naming an axis in a phase, of a value, of a pair of them."""
        if len(key) == 3:
            return self.axes[key[1]].effect
        return {0: DRIFT, 1: BASE, 2: NAMED}.get(len(key), PAIR)

    def _time(self, setting: Setting) -> dict[str, float]:
        """The time of a request in each phase, that with the default being 1 in all."""
        known = self._effects.likeliest
        return {
            phase: weight * math.exp(-known.mean(self._row(self._part(setting, phase), phase)))
            for phase, weight in self.weights.items()
        }

    def _gain(self, setting: Setting, other: Setting) -> Estimate:
        """The logarithm of the speed with one setting over that with another."""
        times = self._time(setting), self._time(other)
        whole = [sum(each.values()) for each in times]
        row: dict[Key, float] = {}
        for phase in self.weights:
            share = sum(each[phase] / total for each, total in zip(times, whole, strict=True)) / 2
            for sign, each in ((share, setting), (-share, other)):
                for key in self._row(self._part(each, phase), phase):
                    row[key] = row.get(key, 0.0) + sign
        row = {key: factor for key, factor in row.items() if factor}
        return Estimate(math.log(whole[1] / whole[0]), self._effects.likeliest.deviation(row))

    def _fastest(self) -> Setting:
        """The setting that is fastest by all runs. A value that gains next to nothing is not worth
        a change."""
        best, least = self.best, math.inf
        if self._has_failed(best):
            best = {}
        while True:
            start = least
            for axis in self.axes.values():
                for value in self.values[axis.name]:
                    setting = changed(best, axis, value)
                    cost = math.log(sum(self._time(setting).values())) + WORTH * len(setting)
                    if cost < least - 1e-9 and not self._has_failed(setting):
                        best, least = setting, cost
            if least >= start:
                return {name: best[name] for name in self.axes if name in best}

    def _has_failed(self, setting: Setting) -> bool:
        parts = ((phase, shown(self._part(setting, phase))) for phase in self.weights)
        return not self._failed.isdisjoint(parts)

    def _rivals(self) -> dict[str, list[tuple[str, Estimate]]]:
        """The values of each axis that more runs may prove better than the best one's, with what
        they gain."""
        rivals: dict[str, list[tuple[str, Estimate]]] = {}
        for name, axis in self.axes.items():
            own = self.best.get(name, axis.values[0])
            for value in self.values[name]:
                setting = changed(self.best, axis, value)
                if value != own and not self._has_failed(setting):
                    gain = self._gain(setting, self.best)
                    if any(self._counts[phase, name, value] < 2 for phase in self._phases(axis)):
                        gain = Estimate(gain.value, max(gain.error, LONE))
                    if expected(gain) > OPEN:
                        rivals.setdefault(name, []).append((value, gain))
        left = sum(max(expected(gain) for _, gain in values) for values in rivals.values())
        return rivals if left > ENOUGH else {}


def is_clear(gain: Estimate) -> bool:
    """Whether a gain is one beyond the noise."""
    return gain.value - CLEAR * gain.error > 0


def expected(gain: Estimate) -> float:
    """What is to be gained by knowing for sure whether a change is one for the better."""
    if not gain.error:
        return max(0.0, gain.value)
    z = gain.value / gain.error
    density = math.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    return gain.error * density + gain.value * (1 + math.erf(z / math.sqrt(2))) / 2
