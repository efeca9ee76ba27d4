"""Error bars hold what they promise, also where neighbours are alike, and verdicts do."""

from __future__ import annotations

import math
import random
from statistics import fmean, pstdev

import pytest

from pipeline.report.figures import Estimate
from pipeline.report.quality_statistics import (
    LEAST_BLOCKS,
    Verdict,
    cosine,
    estimate,
    spearman,
    standard_error,
    verdict,
)


def test_the_error_of_single_values_is_that_of_a_bootstrap() -> None:
    rng = random.Random(1)
    values = [rng.expovariate(1) for _ in range(7)]  # too few for blocks of two
    means = [fmean(rng.choices(values, k=7)) for _ in range(20_000)]
    # A bootstrap divides by n, an unbiased estimate by n - 1.
    assert standard_error(values) == pytest.approx(pstdev(means) * math.sqrt(7 / 6), rel=0.03)


def alike(rng: random.Random, count: int) -> list[float]:
    """Values of mean 0 of which each resembles the one before."""
    values = [rng.gauss(0, 1)]
    while len(values) < count:
        values.append(0.4 * values[-1] + rng.gauss(0, 0.917))
    return values


def test_the_error_counts_that_neighbours_are_alike() -> None:
    rng = random.Random(2)
    samples = [alike(rng, 64) for _ in range(400)]
    real = pstdev(map(fmean, samples))
    naive = fmean(pstdev(sample) / 8 for sample in samples)
    ours = fmean(map(standard_error, samples))
    assert naive < 0.75 * real, "as though they were independent"
    assert 0.8 * real < ours < 1.3 * real
    assert sum(abs(fmean(s)) < 3 * standard_error(s) for s in samples) > 0.96 * len(samples)


def test_the_larger_error_counts_and_nonsense_is_infinite() -> None:
    assert estimate([1.0, 2.0, 3.0]).error == pytest.approx(1 / math.sqrt(3))
    assert estimate([1.0, 2.0, 3.0], printed=2.0) == Estimate(2.0, 2.0)
    assert estimate([1.0]).error == math.inf
    assert estimate([0.1, math.inf]).value == math.inf
    assert estimate([0.1, math.nan]).value == math.inf


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *((0.05, Verdict.PASSED), (0.08, Verdict.UNDECIDED), (0.12, Verdict.UNDECIDED)),
        *((0.15, Verdict.FAILED), (math.inf, Verdict.FAILED)),
    ],
)
def test_a_verdict_keeps_three_errors_from_the_limit(value: float, expected: Verdict) -> None:
    figure = Estimate(value, 0.01)
    assert verdict(figure, 0.1, 16, is_upper=True) is expected
    if math.isfinite(value):
        assert verdict(Estimate(1 - value, 0.01), 0.9, 16, is_upper=False) is expected
        few = verdict(figure, 0.1, LEAST_BLOCKS - 1, is_upper=True)
        assert few is Verdict.UNDECIDED, "too few to know their spread"


def test_rank_correlation_and_cosine() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 30, 45]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 2, 2, 3], [1, 2, 2, 3]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [2, 1, 4, 3]) == pytest.approx(0.6)  # 1 - 6·4 / (4·15)
    assert spearman([1, 1, 1], [1, 2, 3]) == 0
    assert cosine([1.0, 0.0], [1.0, 1.0]) == pytest.approx(math.sqrt(0.5))
    assert math.isnan(cosine([0.0, 0.0], [1.0, 1.0]))
