"""SIGKILL at a random instant: the next run ends right and repeats no finished step."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from conftest import Doit, often

from pipeline.core.store.receipts import Status, status

pytestmark = [pytest.mark.build, pytest.mark.slow]


def kill_after(doit: Doit, seconds: float, *words: str) -> bool:
    """Start doit and kill it and all it started; whether it was still running then."""
    with doit.start(*words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            process.wait(timeout=seconds)
            return False
        except subprocess.TimeoutExpired:
            children = psutil.Process(process.pid).children(recursive=True)
            process.kill()
            process.wait()
            # As after a power cut: nothing gets to tidy up.
            for child in children:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child.pid, signal.SIGKILL)
            return True


def seconds_of(doit: Doit, *words: str) -> float:
    """How long it takes undisturbed here: kills come within that time."""
    start = time.monotonic()
    doit(*words)
    return time.monotonic() - start


def seeded(name: str) -> random.Random:
    seed = int(os.environ.get("TEST_SEED", time.time_ns() % 1_000_000))
    print(f"{name}: TEST_SEED={seed}")
    return random.Random(seed)


def leftovers(home: Path) -> list[Path]:
    return [path for path in home.rglob(".*") if ".part" in path.name or ".old" in path.name]


@often(3, 12)
def test_source(doit: Doit, times: int) -> None:
    dice = seeded("source")
    folder = doit.home / "bins" / ".source"
    folder.unlink()
    killed = 0
    for _ in range(times):
        killed += kill_after(doit, dice.uniform(0.2, 2.0), "source")
        if folder.exists():  # a kill may come before anything is made
            shutil.rmtree(folder)
        folder.mkdir()
    assert killed >= 1
    doit("source")
    assert doit("source").steps == []
    assert leftovers(doit.home) == []
    assert "llama.cpp-" in doit("verify").out


@often(4, 28)
def test_convert_and_quantize(doit: Doit, tiny: Path, converter: Path, times: int) -> None:
    dice = seeded("convert and quantize")
    model = f"model={tiny}"
    whole = seconds_of(doit, "prepare", model)
    expected = {path.name: path.read_bytes() for path in (doit.home / "models").rglob("*.gguf")}
    killed = 0
    for _ in range(times):
        doit("clean", "convert", "quantize", model)
        killed += kill_after(doit, dice.uniform(0.1, whole), "prepare", model)
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
    assert killed >= times // 4


@pytest.mark.xdist_group("builder")
@often(3, 12)
def test_build(builder: Doit, times: int) -> None:
    """Some objects are removed, so that there is work."""
    dice = seeded("build")
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
    whole, killed = seconds_of(doit, "build_bins"), 0
    for _ in range(times):
        leave_work()
        killed += kill_after(doit, dice.uniform(0.1, whole), "build_bins")
        for program in target.glob("llama-*"):  # old or new, each one runs
            done = subprocess.run([program, "--help"], capture_output=True, check=False)
            assert done.returncode in (0, 1), program
        assert {path.name for path in target.glob("llama-*")} == before
    assert killed >= 1
    again = doit("build_bins")
    assert "source" not in again.steps
    assert doit("build_bins").steps == []
    assert leftovers(built) == []
