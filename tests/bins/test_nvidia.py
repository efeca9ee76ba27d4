"""NVIDIA's cards as nvidia-smi tells them; programs stand in for it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from pipeline.bins.hardware import nvidia
from pipeline.bins.hardware.nvidia import MIB, Card

posix = pytest.mark.skipif(os.name == "nt", reason="shell scripts stand in")
H100 = Card(name="NVIDIA H100 80GB HBM3", total=81559 * MIB, free=81079 * MIB)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("NVIDIA H100 80GB HBM3, 81559, 81079\n", [H100]),
        ("NVIDIA H100 80GB HBM3, 81559, 81079\r\n", [H100]),
        ("NVIDIA H100 80GB HBM3,81559,81079", [H100]),
        ("NVIDIA H100 80GB HBM3, 81559, 81079\n" * 8, [H100] * 8),
        (
            "NVIDIA GeForce RTX 4090, 24564, 0\nTesla T4, 15360, 15095\n",
            [
                Card(name="NVIDIA GeForce RTX 4090", total=24564 * MIB, free=0),
                Card(name="Tesla T4", total=15360 * MIB, free=15095 * MIB),
            ],
        ),
        (
            "Quadro, 2, 1024, 16384, 16000\n",
            [Card(name="Quadro, 2, 1024", total=16384 * MIB, free=16000 * MIB)],
        ),
        ("NVIDIA GB10, [N/A], [N/A]\n", [Card(name="NVIDIA GB10")]),
        (
            "NVIDIA X, 1024, [Not Supported]\nTesla T4, 15360, 15095\n",
            [
                Card(name="NVIDIA X"),
                Card(name="Tesla T4", total=15360 * MIB, free=15095 * MIB),
            ],
        ),
        ("NVIDIA X, [GPU is lost], [GPU is lost]\n", []),
        ("No devices were found\n", []),
        ("Unable to determine the device handle for GPU0000:01:00.0: Unknown Error\n", []),
        ("Unable to determine the device handle for GPU 0, 1, 2: Error\n", []),
        ("Failed to initialize NVML: Driver/library version mismatch, see dmesg\n", []),
        ("name, memory.total [MiB], memory.free [MiB]\n", []),
        ("NVIDIA X, 81559 MiB, 81079 MiB\n", []),
        ("NVIDIA X, -1, 5\nNVIDIA X, 1.5, 5\nNVIDIA X, , 5\n", []),
        (", 5, 5\n5, 5\n5\n,,\n\n", []),
        ("", []),
    ],
)
def test_the_lines_of_nvidia_smi(text: str, found: list[Card]) -> None:
    assert nvidia.parse(text) == found


def test_a_card_that_is_split_up_counts_once() -> None:
    """The query lists cards; the MIG instances of one are not lines of their own."""
    text = "NVIDIA A100-SXM4-40GB, 40960, 40507\nNVIDIA A100-SXM4-40GB, 40960, [N/A]\n"
    assert [gpu.free for gpu in nvidia.parse(text) if gpu.total] == [40507 * MIB]


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH that holds nothing but what a test puts into this folder."""
    folder = tmp_path / "programs ü"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def stand_in(folder: Path, script: str) -> None:
    path = folder / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o755)


@posix
def test_what_it_is_asked_and_what_is_found(programs: Path) -> None:
    stand_in(
        programs,
        f'echo "$@" > "{programs}/asked"\n'
        "echo 'a warning on the other channel, 5, 5' >&2\n"
        "echo 'NVIDIA H100 80GB HBM3, 81559, 81079'",
    )
    assert nvidia.find() == [H100]
    asked = (programs / "asked").read_text(encoding="utf-8").split()
    assert "--query-gpu=name,memory.total,memory.free" in asked
    assert "--format=csv,noheader,nounits" in asked


@posix
@pytest.mark.parametrize("figures", ["[N/A], [N/A]", "[Not Supported], [Not Supported]"])
def test_a_card_that_shares_the_memory_of_the_machine_is_counted(
    programs: Path, figures: str
) -> None:
    stand_in(programs, f"echo 'NVIDIA GB10, {figures}'")
    assert nvidia.count() == 1
    assert nvidia.find() == []
    assert [card.name for card in nvidia.listed()] == ["NVIDIA GB10"]
    assert nvidia.shared() == {"gpu0"}


@posix
def test_how_many_cards_is_not_known_without_an_answer(
    programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert nvidia.count() is None
    stand_in(programs, "echo 'No devices were found'; exit 6")
    assert nvidia.count() == 0
    monkeypatch.setattr(nvidia, "SECONDS", 0.2)
    stand_in(programs, "exec /bin/sleep 20")
    assert nvidia.count() is None


def test_none_without_the_program(programs: Path) -> None:
    assert not list(programs.iterdir())
    assert nvidia.find() == []


@posix
@pytest.mark.parametrize(
    "script",
    [
        "echo 'NVIDIA H100 80GB HBM3, 81559, 81079'; exit 9",
        "echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18",
        "echo 'No devices were found'",
        "echo 'NVIDIA X, 5, 5' >&2",
        "kill -KILL $$",
        "exit 0",
    ],
)
def test_none_where_it_fails(programs: Path, script: str) -> None:
    stand_in(programs, script)
    assert nvidia.find() == []


@posix
def test_none_where_it_cannot_be_started(programs: Path) -> None:
    stand_in(programs, "")
    (programs / "nvidia-smi").write_text("#!/no/such/program\n", encoding="utf-8")
    assert nvidia.find() == []


@posix
def test_a_name_that_is_no_text(programs: Path) -> None:
    stand_in(programs, r"printf 'NVIDIA \377, 5, 4\n'")
    (found,) = nvidia.find()
    assert (found.total, found.free) == (5 * MIB, 4 * MIB)


@posix
@pytest.mark.slow
def test_none_where_it_hangs(programs: Path) -> None:
    """Even after it has printed something, and though its child holds the channel open."""
    stand_in(programs, "echo 'NVIDIA X, 5, 5'\n/bin/sleep 120")
    start = time.monotonic()
    assert nvidia.find() == []
    assert 5 < time.monotonic() - start < 90


@posix
def test_the_ids_of_cards_and_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = """GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-5f2a-11)
  MIG 1g.5gb      Device  0: (UUID: MIG-9c-22)
GPU 1: Tesla T4 (UUID: GPU-77)
"""
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n[ \"$1\" = -L ] && cat <<'END'\n{listed}END\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert nvidia.ids() == ["GPU-5f2a-11", "MIG-9c-22", "GPU-77"]
    program.write_text("#!/bin/sh\nexit 9\n")
    assert nvidia.ids() == []
