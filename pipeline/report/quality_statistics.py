"""Error bars of quality figures, and whether a figure keeps to a limit.

llama-perplexity prints an error with each figure, as though tokens were independent. They are not:
a passage that a quant finds hard has many hard tokens. So the error is taken from whole chunks, and
from runs of chunks, as a block bootstrap would; the largest of all these counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import Enum
from statistics import StatisticsError, correlation, fmean, stdev

from .figures import Estimate

RUNS = (1, 2, 4, 8)  # chunks in a block
LEAST_BLOCKS = 8  # from which a spread can be estimated
SIGMAS = 3.0  # standard errors that a verdict keeps from the limit


class Verdict(Enum):
    """How a figure compares with its limit."""

    PASSED = "passed"
    FAILED = "failed"
    UNDECIDED = "undecided"


def standard_error(values: Sequence[float]) -> float:
    """The standard error of the mean of values in the order of the text.

    It is that of a block bootstrap, which needs no drawing for a mean: the spread of the means of
    blocks of 1, 2, 4 and 8 values, the largest of them. Infinite for a single value.
    """
    if len(values) < 2:
        return math.inf
    errors = [stdev(values) / math.sqrt(len(values))]
    for run in RUNS[1:]:
        blocks = [fmean(values[n : n + run]) for n in range(0, len(values) - run + 1, run)]
        if len(blocks) >= LEAST_BLOCKS:
            errors.append(stdev(blocks) / math.sqrt(len(blocks)))
    return max(errors)


def estimate(values: Sequence[float], printed: float = 0.0) -> Estimate:
    """The mean of the values and its error; `printed` is the error by the program's own count.
    Infinite where a value is not finite: the model computes nonsense."""
    if not all(map(math.isfinite, values)):
        return Estimate(math.inf, math.inf)
    return Estimate(fmean(values), max(standard_error(values), printed))


def verdict(figure: Estimate, limit: float, count: int, *, is_upper: bool) -> Verdict:
    """Whether a figure of `count` pieces of text keeps to an upper or lower limit."""
    if math.isinf(figure.value):
        return Verdict.FAILED
    if count < LEAST_BLOCKS:
        return Verdict.UNDECIDED
    room = limit - figure.value if is_upper else figure.value - limit
    if room >= SIGMAS * figure.error:
        return Verdict.PASSED
    return Verdict.FAILED if room < -SIGMAS * figure.error else Verdict.UNDECIDED


def ranks(values: Sequence[float]) -> list[float]:
    """The rank of each value, from 1; equal values share their mean rank."""
    order = sorted(range(len(values)), key=values.__getitem__)
    result = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end + 1 < len(order) and values[order[end + 1]] == values[order[start]]:
            end += 1
        for place in order[start : end + 1]:
            result[place] = (start + end) / 2 + 1
        start = end + 1
    return result


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's rank correlation of two rows of scores; 0 where one row is all the same."""
    try:
        return correlation(ranks(one), ranks(other))
    except StatisticsError:
        return 0.0


def cosine(one: Sequence[float], other: Sequence[float]) -> float:
    """The cosine similarity of two vectors; not a number where one is zero or not finite."""
    size = math.sqrt(_dot(one, one) * _dot(other, other))
    return _dot(one, other) / size if size else math.nan


def _dot(one: Sequence[float], other: Sequence[float]) -> float:
    return math.fsum(x * y for x, y in zip(one, other, strict=True))
