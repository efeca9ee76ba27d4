"""What the runs of a search say together: how much each value of each axis changes the speed.

The logarithm of a speed is taken as a sum: a base, an effect of each value that is not the default,
a small one of each pair of such values, and a drift of the machine. So a run that changes several
axes says something about each of them, and one that changes none about the drift. A Kalman filter
holds the mean and the covariance of all effects, and each run moves them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence

NOISES = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32)  # of a run: relative standard deviations
DRIFT = 0.007  # standard deviation by which the machine's speed changes from run to run
FAR = 2.5  # standard deviations; a run that is further off moves the effects no more than this

HOPELESS = 20.0  # by how much the logarithm of a likelihood may lie behind the best
UNUSUAL = 4.0  # times the usual variance

Key = tuple[str, ...]  # the name of an effect
Row = Mapping[Key, float]  # the effects that a figure depends on, each with its factor
MACHINE: Key = ()  # the drift, which all phases share


class Filter:
    """The effects, where runs have this `noise`. `prior` is the standard deviation that an effect
    has before any run, with a mean of 0."""

    def __init__(self, noise: float, prior: Callable[[Key], float]) -> None:
        self.noise, self.likelihood = noise, 0.0
        self._prior = prior
        self._index: dict[Key, int] = {}
        self._means: list[float] = []
        self._covariances: list[list[float]] = []

    def add(self, row: Row, value: float, within: float = 0.0) -> None:
        """A run: the logarithm of its speed. `within`: the variance that its samples alone give it;
        a run with more of it than usual says less."""
        factors = [(self._place(key), factor) for key, factor in row.items()]
        drift = self._place(MACHINE)
        self._covariances[drift][drift] += DRIFT**2
        gains = [sum(c * each[i] for i, c in factors) for each in self._covariances]
        variance = sum(c * gains[i] for i, c in factors)
        usual = self.noise**2
        variance += within if within > UNUSUAL * usual else usual
        deviation = math.sqrt(variance)
        error = (value - sum(c * self._means[i] for i, c in factors)) / deviation
        inside = max(-FAR, min(FAR, error))
        self.likelihood -= math.log(deviation) + inside * (error - inside / 2)
        for i, gain in enumerate(gains):
            if gain:
                self._means[i] += gain / deviation * inside
                share, own = gain / variance, self._covariances[i]
                self._covariances[i] = [a - share * b for a, b in zip(own, gains, strict=True)]

    def mean(self, row: Row) -> float:
        return sum(
            factor * self._means[self._index[key]]
            for key, factor in row.items()
            if key in self._index
        )

    def deviation(self, row: Row) -> float:
        """The standard deviation of a figure that depends on these effects."""
        known = [(self._index[key], c) for key, c in row.items() if key in self._index]
        new = sum((c * self._prior(key)) ** 2 for key, c in row.items() if key not in self._index)
        variance = sum(a * b * self._covariances[i][j] for i, a in known for j, b in known)
        return math.sqrt(max(0.0, variance + new))

    def _place(self, key: Key) -> int:
        """The index of an effect, which is new with the first run that has it."""
        if key not in self._index:
            self._index[key] = len(self._means)
            for row in self._covariances:
                row.append(0.0)
            self._means.append(0.0)
            self._covariances.append([0.0] * len(self._means))
            self._covariances[-1][-1] = self._prior(key) ** 2
        return self._index[key]


class Effects:
    """The effects with the noise that is most likely, by all runs and by the samples in them."""

    def __init__(self, prior: Callable[[Key], float]) -> None:
        self._filters = [Filter(noise, prior) for noise in NOISES]
        self._within: list[float] = []  # of each run: the variance that its samples alone explain

    def add(self, row: Row, samples: Sequence[float]) -> None:
        """A run: the logarithms of its samples."""
        within = statistics.variance(samples) / len(samples) if len(samples) > 1 else 0.0
        self._within.append(within)
        for each in self._filters:
            each.add(row, statistics.median(samples), within)
        least = max(each.likelihood for each in self._filters) - HOPELESS
        self._filters = [each for each in self._filters if each.likelihood > least]

    @property
    def likeliest(self) -> Filter:
        """The filter whose noise explains the runs best."""
        return max(self._possible(), key=lambda each: each.likelihood)

    @property
    def noise(self) -> float:
        """The relative standard deviation from run to run: the mean of NOISES, by how likely each
        is."""
        best = self.likeliest.likelihood
        shares = {each.noise: math.exp(each.likelihood - best) for each in self._possible()}
        total = sum(shares.values())
        return math.exp(sum(math.log(noise) * share / total for noise, share in shares.items()))

    def _possible(self) -> Sequence[Filter]:
        """Those with no less noise than the samples of a run have alone."""
        least = math.sqrt(statistics.median(self._within)) if self._within else 0.0
        return [each for each in self._filters if each.noise >= least] or self._filters[-1:]
