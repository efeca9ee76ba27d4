"""What runs say together of the effects: from made runs."""

from __future__ import annotations

import random

import pytest

from pipeline.report.tuning_effects import MACHINE, Effects, Filter, Key

A, B, BOTH, BASE = ("a",), ("b",), ("a", "b"), ("base",)


def prior(key: Key) -> float:
    return 0.03 if key == BOTH else 0.2


def test_runs_that_change_two_axes_say_something_of_each() -> None:
    known = Filter(0.02, prior)
    for _ in range(4):
        known.add({BASE: 1}, 0.0)
        known.add({BASE: 1, A: 1}, 0.1)
        known.add({BASE: 1, A: 1, B: 1, BOTH: 1}, -0.1)
    assert known.mean({A: 1}) == pytest.approx(0.1, abs=0.01)
    assert known.mean({B: 1, BOTH: 1}) == pytest.approx(-0.2, abs=0.01)
    assert known.deviation({A: 1}) < 0.02 < known.deviation({("new",): 1}) == 0.2


def test_a_run_that_something_disturbed_moves_little() -> None:
    known = Filter(0.02, prior)
    for value in (0.0, 0.01, -0.01, 0.0, -2.0):
        known.add({BASE: 1}, value)
    assert known.mean({BASE: 1}) == pytest.approx(0, abs=0.02)


def test_a_machine_that_gets_slower_favours_no_value() -> None:
    known = Filter(0.01, lambda key: 0.02 if key == MACHINE else 0.2)
    for turn in range(40):
        is_changed = turn % 2
        row = {BASE: 1.0, MACHINE: 1.0, **({A: 1.0} if is_changed else {})}
        known.add(row, 0.05 * is_changed - 0.004 * turn)
    assert known.mean({A: 1}) == pytest.approx(0.05, abs=0.005)


@pytest.mark.parametrize("noise", [0.01, 0.05, 0.3])
def test_the_noise_is_that_of_the_runs(noise: float) -> None:
    draw = random.Random(1).gauss
    known = Effects(prior)
    for turn in range(40):
        value = draw(0, noise)
        known.add({BASE: 1, **({A: 1} if turn % 2 else {})}, [value + 0.1 * (turn % 2)] * 3)
    assert noise / 1.5 < known.noise < noise * 1.5


def test_there_is_no_less_noise_than_the_samples_of_a_run_have() -> None:
    known = Effects(prior)
    known.add({BASE: 1}, [-0.3, 0, 0.3])
    assert known.noise > 0.16
