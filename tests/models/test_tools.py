from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from pipeline.models import converter, tools


@pytest.mark.parametrize(
    ("folder", "gpus"), [("linux-x64-cpu", False), ("linux-x64-cuda", True), ("bin", True)]
)
def test_only_programs_for_a_card_reach_one(tmp_path: Path, folder: str, gpus: bool) -> None:
    sandbox = tools.sandbox(tmp_path / folder / "llama-quantize", read=[])
    assert sandbox.gpus is gpus
    assert sandbox.memory == (tools.GPU_MEMORY if gpus else tools.HEADER_MEMORY)
    assert sandbox.ports == ()


def test_memory_follows_from_the_weights(tmp_path: Path) -> None:
    program = tmp_path / "x-cpu" / "llama-quantize"
    sandbox = tools.sandbox(program, read=[], weights=1000, copies=3, memory=5)
    assert sandbox.memory == 3005
    assert sandbox.file_bytes == tools.GIB + 8000


def test_what_is_written_is_there_before(tmp_path: Path) -> None:
    made = tmp_path / "made.gguf"
    assert tools.sandbox(tmp_path / "x-cpu" / "p", read=[], write=[made]).write == [made]
    assert made.read_bytes() == b""
    os.utime(tmp_path, (0, 0))
    tools.sandbox(tmp_path / "x-cpu" / "p", read=[], write=[made, tmp_path])
    assert tmp_path.stat().st_mtime == 0, "what is there is left alone"


@pytest.mark.parametrize("step", ["header", "convert", "quantize"])
def test_larger_models_get_more_time(step: str) -> None:
    assert 60 <= tools.seconds(step, 0) < tools.seconds(step, 10**12) < 10**8


def test_the_converter_reaches_no_card_and_its_own_input_alone(tmp_path: Path) -> None:
    staged, scratch, weights = tmp_path / "staged", tmp_path / "scratch", tmp_path / "w"
    scratch.mkdir()
    weights.write_bytes(bytes(100))
    python, script = Path(sys.executable), tmp_path / "tree" / "convert.py"
    sandbox = converter.sandbox(python, script, staged, [weights], tmp_path / "made", scratch)
    assert not sandbox.gpus and sandbox.ports == ()
    assert sandbox.memory == tools.HEADER_MEMORY + 100 * converter.COPIES
    assert list(sandbox.read) == [script.parent, converter.DRIVER, staged, weights]
    assert list(sandbox.write) == [tmp_path / "made", scratch]
    assert list(sandbox.programs) == [python]
