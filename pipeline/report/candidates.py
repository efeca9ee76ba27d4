"""The quants of one model side by side: what was measured of each, and which are worth taking."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from msgspec import Struct

from .figures import Estimate, Quality, Speed

MOST_DIGITS = 7  # behind the point
NORMAL_95 = 1.96  # standard errors on each side of a mean, where 95 % of a normal distribution lie


class MemoryUse(Struct, frozen=True, kw_only=True):
    """What a quant takes when it is served, in bytes; `fits`: in the memory of this machine."""

    weights: int
    cache: int
    compute: int
    fits: bool

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.compute


class Candidate(Struct, frozen=True, kw_only=True):
    """A quant of a model; None: not measured. `bytes` are those of its file."""

    quant: str
    bytes: int
    quality: Quality | None = None
    speed: Speed | None = None
    memory: MemoryUse | None = None

    @property
    def does_not_fit(self) -> bool:
        return self.memory is not None and not self.memory.fits


class Metric(Struct, frozen=True, kw_only=True):
    """What a quant loses, as one number: 0 is nothing."""

    name: str
    unit: str
    loss: Callable[[Quality], Estimate | None]

    def of(self, candidate: Candidate) -> Estimate | None:
        """The loss as it can be drawn: None where it was not measured, or is not finite."""
        loss = self.loss(candidate.quality) if candidate.quality else None
        return loss if loss and math.isfinite(loss.value) else None


def distance(similarity: Estimate | None) -> Estimate | None:
    """How far a similarity is from 1."""
    return Estimate(1 - similarity.value, similarity.error) if similarity else None


METRICS = (
    Metric(
        name="KL divergence",
        unit="nats per token",
        loss=lambda quality: quality.kld,
    ),
    Metric(
        name="cosine distance",
        unit="1 − cosine similarity",
        loss=lambda quality: distance(quality.cosine),
    ),
    Metric(
        name="rank distance",
        unit="1 − Spearman's ρ",
        loss=lambda quality: distance(quality.rank),
    ),
)


def metric(candidates: Sequence[Candidate]) -> Metric | None:
    """The metric that these candidates were measured by; None where no quality was measured."""
    qualities = [each.quality for each in candidates if each.quality]
    measured = (each for each in METRICS if any(map(each.loss, qualities)))
    return next(measured, None)


def frontier(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates that lose less than every other that is no larger, smallest first. The error
    is left out of account."""
    measured = metric(candidates)
    losses = [(each, loss) for each in candidates if measured and (loss := measured.of(each))]
    best: list[Candidate] = []
    least = float("inf")
    for each, loss in sorted(losses, key=lambda pair: (pair[0].bytes, pair[1].value)):
        if loss.value < least:
            best.append(each)
            least = loss.value
    return best


def interval(estimate: Estimate) -> tuple[float, float]:
    """The mean less and plus 1.96 of its standard errors; the mean alone where these are unknown,
    as they are for a single sample."""
    half = NORMAL_95 * estimate.error if math.isfinite(estimate.error) else 0.0
    return estimate.value - half, estimate.value + half


def with_error(estimate: Estimate | None) -> str:
    """`0.0313 ± 0.0006`: a mean and its standard error, to two digits of the error; empty for
    None."""
    if estimate is None:
        return ""
    value, error = estimate.value, estimate.error
    if not math.isfinite(value):
        return "not finite"
    if not 0 < error < math.inf:
        shown = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
        return f"{shown} ± ?" if error else shown
    digits = max(0, 1 - math.floor(math.log10(error)))
    if digits > MOST_DIGITS:
        return f"{value:.2e} ± {error:.1e}".replace("e-0", "e-")
    return f"{value:,.{digits}f} ± {error:,.{digits}f}"
