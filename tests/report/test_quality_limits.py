"""How many pieces of a text are measured, and what is said of a quant that is refused."""

from __future__ import annotations

import math
import random

import pytest

from pipeline.core.errors import PipelineError
from pipeline.models.divergence import Piece
from pipeline.report.figures import Estimate
from pipeline.report.quality import (
    Limit,
    Sample,
    report_wants,
    require,
    shown,
    verdict_wants,
)
from pipeline.report.quality_statistics import Verdict

LIMIT = Limit("max_kld", 0.05, "kld")


def sample(count: int, mean: float, spread: float = 0.01, *, is_all: bool = False) -> Sample:
    rng = random.Random(1)
    values = [rng.gauss(0, spread) for _ in range(count)]
    shift = mean - (sum(values) / count if count else 0)
    pieces = tuple(Piece({"kld": value + shift}, {"kld": 0.0}) for value in values)
    return Sample(pieces=pieces, is_all=is_all)


def test_a_report_takes_as_many_as_were_asked_for_or_there_are() -> None:
    wants = report_wants(32)
    assert [wants(sample(count, 0.1)) for count in (0, 8, 24, 32)] == [32, 24, 0, 0]
    assert wants(sample(8, 0.1, is_all=True)) == 0, "the text has no more"


def test_an_undecided_sample_doubles_to_a_bound() -> None:
    wants, counts, count = verdict_wants(LIMIT, 32), [], 0
    while more := wants(sample(count, 0.05)):
        count += more
        counts.append(count)
    assert counts == [16, 32, 64, 128]
    assert wants(sample(16, 0.01)) == wants(sample(16, 0.09)) == 0, "decided"
    assert wants(sample(16, 0.05, is_all=True)) == 0


def test_a_refusal_says_what_was_measured_and_the_next_step(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(PipelineError, match=r"m as Q2_K: kld 0\.09\d* ± 0\.00\d+, allowed") as bad:
        require(LIMIT, sample(16, 0.09), "m as Q2_K", "use a larger quant")
    assert "at most 0.05 (max_kld)" in bad.value.message and bad.value.hint == "use a larger quant"
    with pytest.raises(PipelineError, match="undecided after 128 pieces") as edge:
        require(LIMIT, sample(128, 0.05), "m as Q4_0", "use a larger quant")
    assert "more chunks=" in edge.value.hint and "use a larger quant" in edge.value.hint
    with pytest.raises(PipelineError, match="undecided after 1 piece of the text"):
        require(LIMIT, sample(1, 0.05), "m as Q4_0", "use a larger quant")
    with pytest.raises(PipelineError, match="undecided after 128 pieces") as short:
        require(LIMIT, sample(128, 0.05, is_all=True), "m as Q4_0", "use a larger quant")
    assert "longer text=PATH" in short.value.hint and "chunks=" not in short.value.hint
    require(LIMIT, sample(16, 0.01), "m as Q8_0", "use a larger quant")
    assert "m as Q8_0: kld 0.01" in capsys.readouterr().err


def test_nonsense_fails_at_once() -> None:
    broken = Sample(pieces=(Piece({"kld": math.inf}, {"kld": math.inf}),))
    assert LIMIT.verdict(broken) is Verdict.FAILED
    assert verdict_wants(LIMIT, 32)(broken) == 0
    with pytest.raises(PipelineError, match="kld not a number, allowed is at most"):
        require(LIMIT, broken, "m as Q8_0", "use a larger quant")


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        *((0.12345, 0.0031, "0.123 ± 0.003"), (0.99963, 0.000018, "0.99963 ± 0.00002")),
        *((3.19, 0.06, "3.19 ± 0.06"), (1.0, 0.0, "1.0000 ± 0.0000")),
        (0.99991, math.inf, "0.9999 ± ?"),
    ],
)
def test_a_figure_has_as_many_digits_as_its_error(value: float, error: float, text: str) -> None:
    assert shown(Estimate(value, error)) == text
