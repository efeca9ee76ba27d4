"""Readers of model files under atheris, a fuzzer that is guided by their coverage: no exception but
the pipeline's own, in bounded memory and time."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from figures import Figure
from model_flaws import GGUF, SAFETENSORS, entry
from mutants import valid
from seeds import new_seed

SCRIPT = Path(__file__).with_name("fuzz_headers.py")
OPTIONS = ("-rss_limit_mb=1024", "-malloc_limit_mb=512", "-timeout=20", "-print_final_stats=1")
MAX_LENGTH = 4096
SECONDS = {"gguf": 45, "safetensors": 25, "index": 10, "start": 10}
# Instrumented, a vocabulary of millions takes long: that it is bounded is seen elsewhere.
SMALL = "gguf_format.MAX_TEXTS=10000"
A_FEW = 300  # runs, always
# A type of values that struct does not know: the fuzzer must come upon it.
UNKNOWN = {n: "B" for n in range(256) if n not in (8, 9)} | {13: "no format"}


def seeds(target: str, chance: random.Random) -> list[bytes]:
    """What the fuzzer begins with."""
    if target == "safetensors":
        flaws = [flaw.parts[0][1][8:] for flaw in SAFETENSORS.values()]
        good = {"__metadata__": {"format": "pt"}, "t": entry(), "u": entry([2, 2], [4, 12], "F16")}
        return [*(data for data in flaws if len(data) < MAX_LENGTH), json.dumps(good).encode()]
    if target == "index":
        return [json.dumps({"metadata": {}, "weight_map": {"t": "a.safetensors"}}).encode()]
    flaws = [flaw.parts[0][1] for flaw in GGUF.values()]
    if target == "start":
        pages = [
            b"<!-- a --> <!-- b --><!doctype html>",
            b"<html>",
            b"PK\3\4" + bytes(30) + b".npy",
        ]
        return [*pages, *(data[:40] for data in flaws)]
    small = [data for data in flaws if len(data) < MAX_LENGTH]
    return [*small, *(valid(chance) for _ in range(50))]


def fuzz(
    target: str, folder: Path, *options: str, replaced: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    seed = new_seed()
    corpus = folder / "corpus"
    corpus.mkdir()
    for n, data in enumerate(seeds(target, random.Random(seed))):
        (corpus / f"seed {n}").write_bytes(data)
    own = (f"-seed={seed}", f"-max_len={MAX_LENGTH}", f"-artifact_prefix={folder}/", str(corpus))
    return subprocess.run(
        [sys.executable, str(SCRIPT), target, SMALL, *replaced, "--", *OPTIONS, *options, *own],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        timeout=300,
    )


def runs(done: subprocess.CompletedProcess[str]) -> int:
    executed = re.search(r"number_of_executed_units: (\d+)", done.stderr)
    assert done.returncode == 0 and executed, done.stdout[-2000:] + done.stderr[-4000:]
    return int(executed[1])


@pytest.mark.trust
@pytest.mark.parametrize("target", SECONDS)
def test_no_bytes_end_in_another_exception(target: str, tmp_path: Path, figure: Figure) -> None:
    pytest.importorskip("atheris")
    done = fuzz(target, tmp_path, f"-max_total_time={SECONDS[target]}")
    figure(f"inputs of the fuzzer for {target}", runs(done))
    covered = re.findall(r"cov: (\d+)", done.stderr)
    figure(f"branches that it came upon in {target}", int(covered[-1]))


@pytest.mark.slow
@pytest.mark.parametrize("target", SECONDS)
def test_a_few_bytes_end_in_no_other_exception(target: str, tmp_path: Path) -> None:
    pytest.importorskip("atheris")
    assert runs(fuzz(target, tmp_path, f"-runs={A_FEW}")) >= A_FEW


@pytest.mark.slow
def test_a_flaw_in_the_reader_is_come_upon(tmp_path: Path) -> None:
    """The fuzzer can fail."""
    pytest.importorskip("atheris")
    words = (f"gguf_format.SCALARS={UNKNOWN}",)
    done = fuzz("gguf", tmp_path, "-max_total_time=120", replaced=words)
    assert done.returncode != 0
    assert "bad char in struct format" in done.stdout
    assert list(tmp_path.glob("crash-*"))
