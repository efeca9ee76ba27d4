"""Which context fits: a pure function of what a context takes and of the room there is."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.models import memory
from pipeline.models.gguf import Header
from pipeline.models.memory import (
    MARGIN,
    MIB,
    UNKNOWN,
    Device,
    Memory,
    added,
    fit,
    parse,
    resized,
)

WEIGHTS = 1000 * MIB
A_TOKEN = 128 * 1024  # bytes


def header(trained: int) -> Header:
    values = {"general.architecture": "llama", "llama.context_length": trained}
    return Header(tensors=1, size=1, data=1, values=values if trained else {})


def measured(asked: list[int] | None = None) -> Callable[[int], Memory]:
    def measure(ctx_size: int) -> Memory:
        if asked is not None:
            asked.append(ctx_size)
        return Memory((Device("CPU", WEIGHTS, ctx_size * A_TOKEN, 10 * MIB),))

    return measure


def sizes(memory: Memory) -> tuple[int, int, int]:
    return memory.weights, memory.context, memory.compute


def room_for(tokens: int) -> int:
    return measured()(tokens).total + MARGIN


def test_the_table_of_llama_fit_params_is_summed_up() -> None:
    text = "some log line 1 2\nCUDA0 4096 512 300\nCUDA1 4000 500 200\nHost 100 0 24\n"
    memory = parse(text)
    assert memory
    assert sizes(memory) == (8196 * MIB, 1012 * MIB, 524 * MIB)
    assert [device.name for device in memory.devices] == ["CUDA0", "CUDA1", "Host"]
    assert memory.devices[1] == Device("CUDA1", 4000 * MIB, 500 * MIB, 200 * MIB)
    host = parse("Host 1 2 3 \n")
    assert host and sizes(host) == (MIB, 2 * MIB, 3 * MIB)
    assert parse("CPU 1 2 3").total == 6 * MIB  # type: ignore[union-attr]


@pytest.mark.parametrize("text", ["", "error: 1 2", "Host 1 2\n", "Host a b c\n", "1 2 3 4 5\n"])
def test_no_table_is_nothing_known(text: str) -> None:
    assert parse(text) is None


def test_another_quant_changes_the_weights_alone() -> None:
    memory = parse("CUDA0 4000 512 300\nHost 100 0 24\n")
    assert memory
    smaller = resized(memory, before=16, after=4)
    assert sizes(smaller) == (1025 * MIB, 512 * MIB, 324 * MIB)
    assert [device.weights for device in smaller.devices] == [1000 * MIB, 25 * MIB]
    guess = Memory((Device(UNKNOWN, 100, 7, 7),), estimate=True)
    assert resized(guess, 2, 1) == Memory((Device(UNKNOWN, 50, 7, 7),), estimate=True)


def test_two_models_on_the_same_devices() -> None:
    first = parse("CUDA0 4000 512 300\nHost 100 0 24\n")
    second = Memory((Device("CUDA0", MIB, MIB, MIB), Device(UNKNOWN, 5, 6, 7)), estimate=True)
    assert first
    both = added(first, second)
    assert both.estimate and both.total == first.total + second.total
    assert both.devices == (
        Device("CUDA0", 4001 * MIB, 513 * MIB, 301 * MIB),
        Device("Host", 100 * MIB, 0, 24 * MIB),
        Device(UNKNOWN, 5, 6, 7),
    )


@pytest.mark.parametrize("trained", [512, 4096, 8192, 131072])
def test_the_trained_context_where_it_fits(trained: int) -> None:
    best = fit(trained, None, room_for(trained), measured())
    assert (best.ctx_size, best.trained, best.fits) == (trained, trained, True)


@pytest.mark.parametrize("trained", [8192, 40960, 131072, 1 << 20])
@pytest.mark.parametrize("share", [0.1, 0.34, 0.5, 0.77, 0.99])
def test_reduced_to_the_largest_that_fits(trained: int, share: float) -> None:
    room = room_for(max(4096, int(trained * share)))
    asked: list[int] = []
    best = fit(trained, None, room, measured(asked))
    assert best.fits
    assert best.ctx_size % 256 == 0
    assert measured()(best.ctx_size).total + MARGIN <= room
    assert measured()(best.ctx_size + 256).total + MARGIN > room
    assert len(asked) < 20  # each question runs a program


@pytest.mark.parametrize("trained", [4500, 5000, 10_000])
def test_the_largest_below_an_uneven_trained_context(trained: int) -> None:
    best = (trained - 1) // 256 * 256
    assert fit(trained, None, room_for(best), measured()).ctx_size == best


def test_never_below_4096_even_where_that_does_not_fit() -> None:
    best = fit(32768, None, WEIGHTS, measured())
    assert (best.ctx_size, best.fits) == (4096, False)
    assert fit(2048, None, 0, measured()).ctx_size == 2048  # trained for no more
    assert fit(0, None, 0, measured()).ctx_size == 4096  # not said


def test_what_was_asked_for_is_not_touched() -> None:
    for asked in (256, 5000, 1 << 20):
        best = fit(8192, asked, 0, measured())
        assert (best.ctx_size, best.fits, best.trained) == (asked, False, 8192)


def test_nothing_is_reduced_where_nothing_can_be_measured() -> None:
    best = fit(32768, None, 0, lambda ctx_size: None)
    assert (best.ctx_size, best.memory, best.fits) == (32768, None, True)


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in is a script")
def test_a_measurement_is_made_once(tmp_path: Path) -> None:
    program, model, book = tmp_path / "fit", tmp_path / "m.gguf", tmp_path / "book.json"
    # Its process id tells runs apart: it may write nothing but what it prints.
    words = f"-m {model} -c 7 -b 8 -fitp on --no-repack"
    program.write_text(
        f'#!/bin/sh\n[ "$*" = "{words}" ] && echo CPU 10 7 $$ || echo CPU 20 "$4" $$\n'
    )
    program.chmod(0o755)
    model.write_bytes(b"m")

    def measure(build: str, ctx_size: int) -> Memory:
        measurement = memory.measure(program, build, model, ["-b", "8"], ctx_size, book)
        assert measurement
        return measurement

    first, second, longer, rebuilt = (
        measure("b1", 7),
        measure("b1", 7),
        measure("b1", 8),
        measure("b2", 7),
    )
    assert first == second and first.devices == second.devices
    assert first.devices == (Device("CPU", 10 * MIB, 7 * MIB, first.compute),)
    assert (longer.weights, longer.context) == (20 * MIB, 8 * MIB)
    assert (rebuilt.weights, rebuilt.context) == (10 * MIB, 7 * MIB)
    assert len({first.compute, longer.compute, rebuilt.compute}) == 3
    program.write_text("#!/bin/sh\nexit 1\n")
    assert memory.measure(program, "b3", model, [], 7, book) is None
