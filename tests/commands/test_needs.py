"""What servers take of memory, by device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gateway_tools import instance

from pipeline.bins.hardware import nvidia
from pipeline.bins.hardware.nvidia import Card
from pipeline.commands import estimate, needs
from pipeline.core import capacity
from pipeline.core.paths import Home
from pipeline.models.memory import UNKNOWN, Device, Memory, added, grown
from pipeline.serve.flags import parse_help
from pipeline.serve.supervisor.memory import devices

GB = 10**9
CARDS = [Card(name="a", total=10 * GB, free=1), Card(name="b", total=20 * GB, free=1)]


def by_device(needed: Memory, **server: Any) -> dict[str, int]:
    found: dict[str, int] = {}
    for name, count in needs._by_device(needed, instance("chat", **server)):
        found[name] = found.get(name, 0) + count
    return found


def test_devices_are_named_by_their_slots() -> None:
    rows = (Device("CUDA0", 10, 2, 1), Device("CUDA1", 5, 2, 1), Device("Host", 3, 0, 1))
    needed = Memory(rows)
    assert by_device(needed) == {"gpu0": 13, "gpu1": 8, "ram": 4}
    assert by_device(needed, gpu_ids="3,1") == {"gpu3": 13, "gpu1": 8, "ram": 4}
    unified = Memory((Device("MTL0", 10, 0, 0), Device("CPU", 1, 0, 0)))
    assert by_device(unified) == {"ram": 11}


def test_a_card_without_memory_of_its_own_takes_main_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nvidia, "listed", lambda: [Card(name="NVIDIA GB10")])
    needed = Memory((Device("CUDA0", 10, 2, 1), Device("Host", 3, 0, 1)))
    assert by_device(needed) == by_device(needed, gpu_ids="0") == {"ram": 17}
    assert [device.name for device in devices()] == ["ram"]
    monkeypatch.setattr(capacity, "total", lambda: 100 * GB)
    words = ("--gpu-memory-utilization", "0.5")
    server = instance("v", engine="vllm", cmd=words)
    assert needs._of_vllm(server) == {"ram": needs.VLLM_RAM + 50 * GB}
    both = [Card(name="NVIDIA GB10"), Card(name="NVIDIA A2", total=10 * GB, free=10 * GB)]
    monkeypatch.setattr(nvidia, "listed", lambda: both)
    second = instance("v", engine="vllm", cmd=words, gpu_ids="1")
    assert needs._of_vllm(second) == {"ram": needs.VLLM_RAM, "gpu1": 5 * GB}


def test_a_formula_lays_all_on_the_card_that_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    guess = Memory((Device(UNKNOWN, 5, 1, 1),), estimate=True)
    monkeypatch.setattr(nvidia, "listed", lambda: CARDS)
    assert by_device(guess) == {"gpu0": 7}
    measured = Memory((Device("CUDA1", 3, 0, 0), Device("Host", 2, 0, 0)))
    assert by_device(added(measured, guess)) == {"gpu1": 3, "ram": 2, "gpu0": 7}
    assert by_device(guess, gpu_ids="none") == by_device(guess, cmd=("--gpu-layers", "0"))
    assert by_device(guess, gpu_ids="none") == {"ram": 7}
    monkeypatch.setattr(nvidia, "listed", list)
    assert by_device(guess) == {"ram": 7}


def test_vllm_takes_its_share_of_each_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvidia, "listed", lambda: CARDS)
    words = ("--tensor-parallel-size", "2", "--gpu-memory-utilization", "0.5")
    server = instance("v", engine="vllm", cmd=words)
    assert needs._of_vllm(server) == {"ram": needs.VLLM_RAM, "gpu0": 5 * GB, "gpu1": 10 * GB}
    by_layers = instance("v", engine="vllm", cmd=("--pipeline-parallel-size", "2"))
    assert needs._of_vllm(by_layers).keys() == {"ram", "gpu0", "gpu1"}
    device = instance("v", engine="vllm", cmd=("--device-memory-utilization", "0.2"))
    assert needs._of_vllm(device)["gpu0"] == 2 * GB, "its other name"
    alone = needs._of_vllm(instance("v", engine="vllm", gpu_ids="1"))
    assert alone == {"ram": needs.VLLM_RAM, "gpu1": 18 * GB}


@pytest.mark.parametrize(
    ("words", "count"),
    [
        ("-tp 2", 2),
        ("-tp=2 -pp 2", 4),
        ("-pcp 2", 2),
        ("-dp 2 -tp=2", 4),
        ("--tensor_parallel_size=2", 2),
        ("--tensor 2", 2),  # argparse takes what no other option begins with
        ("--pipeline-parallel=3", 3),
        ("-t 2", 2),
        ("--data-parallel 2", 1),  # of several: vLLM refuses it
        ("-tp 2 -tp 3", 3),  # the last one counts
        ("-dp 4 -dpl 2", 2),  # the others are on other machines
        ("-dp 4 -dpn 1", 1),
        ("-dcp 2 -ep", 1),  # on the same GPUs
        ("-tp two", 1),
    ],
)
def test_the_cards_of_vllm_are_counted_by_any_name(
    monkeypatch: pytest.MonkeyPatch, words: str, count: int
) -> None:
    monkeypatch.setattr(nvidia, "listed", lambda: CARDS * 4)
    cmd = ("-m", "vllm.entrypoints.openai.api_server", "--model", "m", *words.split())
    assert len(needs._of_vllm(instance("v", engine="vllm", cmd=cmd))) == 1 + count


@pytest.mark.parametrize(
    "words", ["--gpu-memory-util=0.5", "--gpu_memory_utilization 0.5", "--device-mem 0.5"]
)
def test_the_share_of_vllm_is_read_by_any_name(monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    monkeypatch.setattr(nvidia, "listed", lambda: CARDS)
    server = instance("v", engine="vllm", cmd=tuple(words.split()))
    assert needs._of_vllm(server) == {"ram": needs.VLLM_RAM, "gpu0": 5 * GB}


def test_only_options_that_change_memory_are_handed_on() -> None:
    known = parse_help(
        "-m, --model FNAME  path\n-c, --ctx-size N  context\n-ngl, --gpu-layers N  layers\n"
        "-fa, --flash-attn [on|off|auto]  attention\n--swa-full  cache\n--host HOST  host\n"
    )
    cmd = "--model m --ctx-size 4 --gpu-layers 9 --swa-full --jinja --metrics --flash-attn on"
    words = estimate.known_words([*cmd.split(), "--host", "::1", "--other", "x"], known)
    assert words == ["--gpu-layers", "9", "--swa-full", "--flash-attn", "on"]


def test_a_projector_goes_where_most_weights_are() -> None:
    needed = Memory((Device("CUDA0", 10, 2, 1), Device("Host", 3, 0, 1)))
    more = grown(needed, 4)
    assert [row.weights for row in more.devices] == [14, 3] and more.total == needed.total + 4


def write(path: Path, tensor: int) -> None:
    """A GGUF with one tensor of so many numbers."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_block_count(1)
    writer.add_embedding_length(8)
    writer.add_head_count(1)
    writer.add_tensor("output_norm.weight", np.zeros(tensor, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_what_is_served_beside_a_model_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvidia, "listed", list)
    for name, tensor in (("model", 1000), ("draft", 500), ("style", 250), ("mmproj", 125)):
        write(tmp_path / f"{name}.gguf", tensor)
    style, mmproj = ((tmp_path / f"{name}.gguf").stat().st_size for name in ("style", "mmproj"))

    def total(*words: str) -> int:
        cmd = ("--model", "model.gguf", "--ctx-size", "32", *words)
        folder, program = str(tmp_path), str(tmp_path / "llama-server")
        server = instance("chat", engine="llama.cpp", cmd=cmd, folder=folder, executable=program)
        needed = needs._of_file(Home(tmp_path), server, tmp_path / "model.gguf")
        assert needed
        return needed.total

    alone = total()
    assert total("--mmproj", "mmproj.gguf") == alone + mmproj
    assert total("--lora", "style.gguf") == alone + style
    assert total("--lora-scaled", "style.gguf:0.5", "--mmproj", "mmproj.gguf") == (
        alone + style + mmproj
    )
    assert total("--model-draft", "draft.gguf") > alone + 500 * 4


def test_the_machine_has_what_it_may_use() -> None:
    assert 0 < capacity.memory() <= capacity.total()
    (ram, *_) = devices()
    assert (ram.name, ram.total) == ("ram", capacity.total())
