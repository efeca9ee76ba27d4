from __future__ import annotations

import pytest

from pipeline.core import log
from pipeline.core.errors import PipelineError, UsageError, did_you_mean
from pipeline.core.text import plural, size


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (1_234_567, "1.2 MB"),
        (999_999, "1.0 MB"),
        (4_920_734_272, "4.9 GB"),
        (2.5e12, "2.5 TB"),
        (12_345e12, "12345.0 TB"),
        (-5_000_000, "-5.0 MB"),
    ],
)
def test_size(count: float, text: str) -> None:
    assert size(count) == text


def test_plural() -> None:
    assert [plural(n, "file") for n in (0, 1, 2)] == ["0 files", "1 file", "2 files"]


def test_say_is_not_a_result(capsys: pytest.CaptureFixture[str]) -> None:
    log.info("größe")
    assert capsys.readouterr() == ("", "größe\n")


def test_errors_read_with_their_next_step() -> None:
    assert str(PipelineError("it is so", "do this")) == "it is so\n  hint: do this"
    assert str(UsageError("it is so")) == "it is so"
    assert issubclass(UsageError, PipelineError)


def test_did_you_mean() -> None:
    assert did_you_mean("ctx_sise", ("ctx_size", "port")) == "; did you mean ctx_size?"
    letters = "swapped letters come before a word that only looks alike"
    assert did_you_mean("prot", ("prompt", "port")) == "; did you mean port?", letters
    assert did_you_mean("zzz", ["ctx_size", "port"]) == ""
