"""SIGKILL at a random instant of steps that work on the real llama.cpp and converter: the next run
ends right and repeats no finished step. `tests/trust` has every instant of smaller ones."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

import pytest
from conftest import Doit
from kills import Kills, kill_all

from pipeline.core.store.receipts import Status, status

pytestmark = [pytest.mark.build, pytest.mark.slow, pytest.mark.long]


def is_killed(kills: Kills, doit: Doit, *words: str) -> bool:
    """Start doit and kill it and all it started; whether it was still running then."""
    began = time.monotonic()
    with doit.start(*words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            process.wait(timeout=kills.chance.uniform(0.1, kills.seconds))
            kills.seconds = time.monotonic() - began  # the machine has less to do than before
            return False
        except subprocess.TimeoutExpired:
            kill_all(process)
            return True


def seconds_of(doit: Doit, *words: str) -> float:
    """How long it takes undisturbed here: kills come within that time."""
    start = time.monotonic()
    doit(*words)
    return time.monotonic() - start


def leftovers(home: Path) -> list[Path]:
    return [path for path in home.rglob(".*") if ".part" in path.name or ".old" in path.name]


@pytest.mark.parametrize("times", [12])
def test_source(doit: Doit, times: int) -> None:
    folder = doit.home / "bins" / ".source"
    folder.unlink()
    killed = 0
    kills = Kills(times, 2.0, lambda: killed >= 1)
    for _ in kills:
        killed += is_killed(kills, doit, "source")
        if folder.exists():  # a kill may come before anything is made
            shutil.rmtree(folder)
        folder.mkdir()
    doit("source")
    assert doit("source").steps == []
    assert leftovers(doit.home) == []
    assert "llama.cpp-" in doit("verify").out


@pytest.mark.parametrize("times", [28])
def test_convert_and_quantize(doit: Doit, tiny: Path, converter: Path, times: int) -> None:
    model = f"model={tiny}"
    kills = Kills(times, seconds_of(doit, "prepare", model), lambda: killed >= times // 4)
    expected = {path.name: path.read_bytes() for path in (doit.home / "models").rglob("*.gguf")}
    killed = 0
    for _ in kills:
        doit("clean", "convert", "quantize", model)
        killed += is_killed(kills, doit, "prepare", model)
        # Finished is what has its receipt: the rename alone is not the end of a step.
        found = list((doit.home / "models").rglob("model.bf16.gguf"))
        had_intermediate = any(status(path) is Status.CURRENT for path in found)
        again = doit("prepare", model)
        if had_intermediate:
            assert "convert" not in again.steps, "a finished step was repeated"
        found = {p.name: p.read_bytes() for p in (doit.home / "models").rglob("*.gguf")}
        assert found == expected
        assert leftovers(doit.home / "models") == []
        assert doit("prepare", model).steps == []


@pytest.mark.xdist_group("builder")
@pytest.mark.parametrize("times", [12])
def test_build(builder: Doit, times: int) -> None:
    """Some objects are removed, so that there is work."""
    doit, built = builder, builder.home / "bins"
    (target,) = built.glob("*-cpu")
    folder = built / ".build" / target.name
    before = {path.name for path in target.glob("llama-*")}

    def leave_work() -> None:
        doit("forget", "build_bins")
        # Where the kill before came early they are gone already, and still to be made.
        for pattern in ("*gguf-split*.o", "ggml-alloc.c.o"):
            for path in sorted(folder.rglob(pattern)):
                path.unlink()

    leave_work()
    killed = 0
    kills = Kills(times, seconds_of(doit, "build_bins"), lambda: killed >= 1)
    for _ in kills:
        leave_work()
        killed += is_killed(kills, doit, "build_bins")
        for program in target.glob("llama-*"):  # old or new, each one runs
            done = subprocess.run([program, "--help"], capture_output=True, check=False)
            assert done.returncode in (0, 1), program
        assert {path.name for path in target.glob("llama-*")} == before
    again = doit("build_bins")
    assert "source" not in again.steps
    assert doit("build_bins").steps == []
    assert leftovers(built) == []
