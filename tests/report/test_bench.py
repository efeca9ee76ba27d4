"""llama-bench: its figures, and what becomes of a run that fails."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from report import bench_stand_in as stand_in

from pipeline.core.errors import PipelineError
from pipeline.report import bench
from pipeline.report.figures import Estimate

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the stand-in is a shell script")

DECODE = "[9.9, 10, 10.1]"
GARBAGE = {
    "nothing": "true",
    "half": 'echo \'[ {"n_prompt": 512, "n_gen": 0\'',
    "no list": "echo 7",
    "no rows": "echo '[]'",
    "another row": "echo '[{\"n_gen\": 0}]'",
    "no samples": stand_in.SAME.replace(DECODE, "[]"),
    "a text": stand_in.SAME.replace(DECODE, '[ "9" ]'),
    "no speed": stand_in.SAME.replace(DECODE, "[ 0 ]"),
    "not a number": stand_in.SAME.replace(DECODE, "[ NaN ]"),
    "without writing": stand_in.SAME.replace('"n_gen": 128', '"n_gen": 0'),
}


def test_means_come_with_their_errors(tmp_path: Path) -> None:
    folder = tmp_path / "mein bench ü-cpu"
    program = stand_in.write(folder, {})
    made = bench.samples(program, stand_in.model(tmp_path / "a b ü.gguf"))
    assert made.speed.prompt == Estimate(pytest.approx(100), pytest.approx(1 / 3**0.5))
    assert made.speed.decode == Estimate(pytest.approx(10), pytest.approx(0.1 / 3**0.5))


def test_an_embedding_model_writes_nothing(tmp_path: Path) -> None:
    program = stand_in.write(tmp_path / "x-cpu", {"-n 0": stand_in.SAME}, "exit 1")
    made = bench.samples(program, stand_in.model(tmp_path / "m.gguf", "bert"))
    assert made.speed.prompt.value == pytest.approx(100) and made.speed.decode is None


def test_one_sample_has_no_error() -> None:
    assert bench.estimate([5.0]) == Estimate(5.0, 0.0)


@pytest.mark.parametrize("script", GARBAGE.values(), ids=GARBAGE)
def test_what_is_no_figure_is_refused(tmp_path: Path, script: str) -> None:
    program = stand_in.write(tmp_path / "x-cpu", {}, script)
    with pytest.raises(PipelineError, match=r"^m\.gguf: llama-bench printed no speeds$"):
        bench.samples(program, stand_in.model(tmp_path / "m.gguf"))


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo some log >&2; echo no such device >&2; exit 3", "ended with status 3: no such devi"),
        ("kill -SEGV $$", "was killed by signal 11$"),
        ("kill -KILL $$", "was killed by signal 9, probably because memory ran out"),
        ("exec sleep 60", "did not finish within 1 s"),
    ],
)
def test_a_run_that_fails_names_its_reason(tmp_path: Path, script: str, reason: str) -> None:
    program = stand_in.write(tmp_path / "x-cpu", {}, script)
    with pytest.raises(PipelineError, match=reason):
        bench.samples(program, stand_in.model(tmp_path / "m.gguf"), timeout=1)


@pytest.mark.build
def test_the_real_one_measures_both_phases(built: Path, gguf: Path) -> None:
    program = next(built.glob("*-cpu/llama-bench"))
    measured = bench.samples(program, gguf, ["-t", "1"], prompt=16, generated=4, repetitions=2)
    assert len(measured.prompt) == len(measured.decode) == 2
    assert min(measured.prompt + measured.decode) > 0
    assert measured.threads == 1
