"""What the check of a GGUF accepts does no harm to llama.cpp's own loader, which sees the same."""

from __future__ import annotations

import random
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from asan_loader import Loader, build, loader
from figures import Figure
from mutants import mutant, valid, vocabulary
from seeds import dice

from pipeline.core.errors import PipelineError
from pipeline.models import gguf, gguf_format

pytestmark = [
    pytest.mark.build,
    pytest.mark.slow,
    pytest.mark.trust,
    pytest.mark.skipif(
        not (sys.platform.startswith("linux") and shutil.which("g++")), reason="needs g++ on Linux"
    ),
]

SECONDS = 45.0  # for each of the two loaders
REPORT = re.compile(r"ERROR: \w+Sanitizer|runtime error")
OVERFLOW = "-DREAD_TOO_FAR"  # a flaw in the program, which the sanitizer must see


@pytest.fixture
def chance() -> random.Random:
    return dice()


def checked(path: Path) -> str:
    """As the loader would print it; `refused`."""
    try:
        header = gguf.read(path)
    except PipelineError:
        return "refused"
    pairs = int.from_bytes(path.read_bytes()[16:24], "little")
    return f"{header.tensors} {pairs} {header.data} {header.size - header.data}"


def files(chance: random.Random, make: Callable[[random.Random], bytes]) -> Iterator[bytes]:
    """What `make` makes, and mutants of it."""
    while True:
        whole = make(chance)
        yield whole
        for _ in range(9):
            yield mutant(whole, chance)


def compare(
    chance: random.Random, path: Path, load: Loader, seconds: float = SECONDS, most: int = 10**9
) -> tuple[Counter[str], list[bytes]]:
    """How many files there were of each kind, and those about which the two disagree. Those that
    the check refuses are not loaded: they may crash it."""
    counts, differences, end = Counter[str](), list[bytes](), time.monotonic() + seconds
    for data in files(chance, valid):
        path.write_bytes(data)
        ours = checked(path)
        counts["tried"] += 1
        if ours == "refused":
            counts["refused"] += 1
        elif (theirs := load(path)) == ours:
            counts["accepted by both"] += 1
        else:
            counts["crashes" if theirs is None else "differences"] += 1
            differences.append(data)
        if counts["tried"] >= most or time.monotonic() > end:
            return counts, differences
    raise AssertionError("unreachable")


@pytest.fixture(scope="module")
def program(built: Path) -> Path:
    return build("model_loader.cpp")


def test_what_is_accepted_is_loaded_and_means_the_same(
    program: Path, chance: random.Random, tmp_path: Path, figure: Figure
) -> None:
    log = tmp_path / "log"
    with loader(program, log) as load:
        counts, differences = compare(chance, tmp_path / "model ü.gguf", load)
    for name in ("tried", "refused", "accepted by both", "crashes", "differences"):
        figure(f"GGUF files for llama.cpp's loader, {name}", counts[name])
    assert not differences, f"{differences[0].hex()}\n{log.read_text()[-4000:]}"
    assert counts["accepted by both"] > 100 and counts["refused"] > 100, counts


def test_without_a_rule_the_two_disagree(
    program: Path, chance: random.Random, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison can fail."""
    monkeypatch.setattr(gguf_format, "TENSOR_RULES", ())
    monkeypatch.setattr(gguf_format, "require_usable", lambda values: None)
    padded = gguf_format.padded  # which now meets an alignment of 0
    for module in (gguf_format, gguf):
        monkeypatch.setattr(module, "padded", lambda count, step=1: padded(count, step or 1))
    with loader(program, tmp_path / "log") as load:
        counts, _ = compare(chance, tmp_path / "a.gguf", load, most=3000)
    assert counts["differences"] > 0, counts


def test_a_flaw_in_the_loader_is_seen(
    built: Path, chance: random.Random, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sanitizer can fail."""
    log = tmp_path / "log"
    broken = Loader(build("model_loader.cpp", (OVERFLOW,)), log)
    counts, differences = compare(chance, tmp_path / "a.gguf", broken, most=50)
    broken.end()
    assert counts["crashes"] > 0 and differences
    assert "heap-buffer-overflow" in log.read_text()


def test_vocabularies_do_no_harm(
    built: Path, chance: random.Random, tmp_path: Path, figure: Figure
) -> None:
    """llama.cpp may end by an assertion of its own, but reads and writes nothing it may not."""
    log, path, counts = tmp_path / "log", tmp_path / "a.gguf", Counter[str]()
    program = build("vocabulary_loader.cpp")  # which may take longer than all that follows
    end = time.monotonic() + SECONDS
    with loader(program, log) as load:
        for data in files(chance, vocabulary):
            if time.monotonic() > end:
                break
            path.write_bytes(data)
            counts["tried"] += 1
            if checked(path) == "refused":
                counts["refused by the check"] += 1
                continue
            answer = load(path)
            if answer is None:
                assert not REPORT.search(log.read_text()), (
                    f"{data.hex()}\n{log.read_text()[-4000:]}"
                )
                counts["ended by an assertion"] += 1
            else:
                counts["refused by llama.cpp" if answer == "refused" else "loaded"] += 1
    for name, count in counts.items():
        figure(f"vocabularies for llama.cpp, {name}", count)
    assert counts["loaded"] > 50, counts
