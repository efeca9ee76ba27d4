"""What servers take of memory, by device."""

from __future__ import annotations

from typing import Any

import pytest
from gateway_tools import instance

from pipeline.bins.hardware import nvidia
from pipeline.bins.hardware.nvidia import Card
from pipeline.commands import estimate, needs
from pipeline.core import capacity
from pipeline.models.memory import UNKNOWN, Device, Memory, added, grown
from pipeline.serve.flags import parse_help
from pipeline.serve.supervisor import status

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


def test_a_formula_lays_all_on_the_card_that_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    guess = Memory((Device(UNKNOWN, 5, 1, 1),), estimate=True)
    monkeypatch.setattr(nvidia, "find", lambda: CARDS)
    assert by_device(guess) == {"gpu0": 7}
    measured = Memory((Device("CUDA1", 3, 0, 0), Device("Host", 2, 0, 0)))
    assert by_device(added(measured, guess)) == {"gpu1": 3, "ram": 2, "gpu0": 7}
    assert by_device(guess, gpu_ids="none") == by_device(guess, cmd=("--gpu-layers", "0"))
    assert by_device(guess, gpu_ids="none") == {"ram": 7}
    monkeypatch.setattr(nvidia, "find", list)
    assert by_device(guess) == {"ram": 7}


def test_vllm_takes_its_share_of_each_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvidia, "find", lambda: CARDS)
    words = ("--tensor-parallel-size", "2", "--gpu-memory-utilization", "0.5")
    server = instance("v", engine="vllm", cmd=words)
    assert needs._of_vllm(server) == {"ram": needs.VLLM_RAM, "gpu0": 5 * GB, "gpu1": 10 * GB}
    alone = needs._of_vllm(instance("v", engine="vllm", gpu_ids="1"))
    assert alone == {"ram": needs.VLLM_RAM, "gpu1": 18 * GB}


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


def test_the_machine_has_what_it_may_use() -> None:
    assert 0 < capacity.memory() <= capacity.total()
    (ram, *_) = status.devices()
    assert (ram.name, ram.total) == ("ram", capacity.total())
