"""Who makes room for a model, and who is next: examples, and random cases held against all ways."""

from __future__ import annotations

import math
import random
from itertools import combinations
from typing import Any

import pytest

from pipeline.core.errors import UsageError
from pipeline.serve.placing import (
    OFTEN,
    RECENT,
    TOTAL,
    Placement,
    Resident,
    Waiting,
    amount,
    budget,
    order,
    pause,
    place,
    used_again,
)

GB = 10**9


def resident(name: str, need: int, last_use: float, **more: Any) -> Resident:
    return Resident(name=name, need={"ram": need}, last_use=last_use, **more)


A, B, C = (resident(name, need, use) for name, need, use in (("a", 2, 1), ("b", 3, 2), ("c", 4, 3)))


def placed(need: int, *residents: Resident, room: int = 10, **more: Any) -> Placement:
    return place("new", {"ram": need}, residents, {"ram": room}, **more)


def test_what_fits_unloads_nothing() -> None:
    assert placed(1, A, B, C) == Placement()
    assert placed(3, A, B, C, room=12) == Placement()
    assert place("a", {"ram": 2}, [A, B, C], {"ram": 9}) == Placement(), "its own place is its own"


def test_the_oldest_go_first_and_no_more_than_needed() -> None:
    assert placed(2, A, B, C).unload == ("a",)
    assert placed(5, A, B, C).unload == ("a", "b")
    assert placed(6, A, B, C).unload == ("a", "b")
    assert placed(7, A, B, C).unload == ("a", "c"), "with c, b would be unloaded for nothing"
    assert placed(10, A, B, C).unload == ("a", "b", "c")


def test_what_loads_slowest_stays_where_either_is_enough() -> None:
    slow, quick = resident("s", 2, 1, load_seconds=9), resident("q", 2, 2)
    unload = placed(7, slow, quick, resident("x", 4, 3, load_seconds=1), room=9).unload
    assert unload == ("q", "x")


def test_pinned_and_busy_models_stay() -> None:
    pinned, busy = resident("p", 2, 1, is_pinned=True), resident("w", 3, 2, is_busy=True)
    assert placed(2, pinned, busy, C, room=9).unload == ("c",)
    assert placed(5, pinned, busy, C, room=9) == Placement(hold=("w",)), "once it is idle"
    assert placed(3, pinned, busy, room=5) == Placement(hold=("w",))
    problem = placed(4, pinned, busy, room=5).problem
    assert problem == "it needs 4 B of ram; models may take 5 B, and pinned models hold 2 B of it"


def test_lower_priorities_make_room_before_older_ones() -> None:
    first = resident("first", 4, 1, priority=2)
    assert placed(4, first, resident("last", 4, 9), room=8).unload == ("last",)
    assert placed(6, first, resident("last", 4, 9), room=8).unload == ("last", "first")


def test_what_never_fits_is_said_with_the_figures() -> None:
    assert placed(11, A).problem == "it needs 11 B of ram; models may take 10 B"
    both = {"ram": 2 * GB, "gpu0": 7 * GB}
    problem = place("new", both, [], {TOTAL: 8 * GB}).problem
    assert problem == "it needs 9.0 GB of all devices; models may take 8.0 GB"


def test_the_machines_own_word_counts_too() -> None:
    assert placed(3, A, free={"ram": 2}).unload == ("a",), "by the books, 8 are free"
    problem = placed(5, A, free={"ram": 2}).problem
    assert problem == "other programs hold memory that it needs: 1 B of ram are missing"


def test_only_models_on_the_device_that_is_short_are_unloaded() -> None:
    gpu = [Resident(name=f"g{n}", need={f"gpu{n}": 5}, last_use=n) for n in range(2)]
    room = {"gpu0": 6, "gpu1": 6}
    assert place("new", {"gpu1": 4}, gpu, room).unload == ("g1",)
    assert place("new", {"gpu0": 4, "gpu1": 4}, gpu, room).unload == ("g0", "g1")


def covers(chosen: tuple[Resident, ...], short: dict[str, int]) -> bool:
    return all(sum(amount(x.need, d) for x in chosen) >= lack for d, lack in short.items())


@pytest.mark.parametrize("seed", range(300))
def test_random_cases(seed: int) -> None:
    """Where some way is there, one is taken, of which nothing can be left out."""
    dice = random.Random(seed)
    devices = ["ram", "gpu0", "gpu1"][: dice.randint(1, 3)]
    residents = [
        Resident(
            name=str(n),
            need={d: dice.randint(0, 5) for d in devices},
            last_use=dice.random(),
            load_seconds=dice.random(),
            priority=dice.randint(0, 1),
            is_pinned=dice.random() < 0.2,
            is_busy=dice.random() < 0.3,
        )
        for n in range(dice.randint(0, 6))
    ]
    room = {d: sum(amount(x.need, d) for x in residents) + dice.randint(0, 3) for d in devices}
    need = {d: dice.randint(0, 9) for d in devices}
    short = {d: need[d] + sum(amount(x.need, d) for x in residents) - room[d] for d in devices}
    short = {d: lack for d, lack in short.items() if lack > 0}
    idle = [x for x in residents if not (x.is_pinned or x.is_busy)]
    ways = [c for n in range(len(idle) + 1) for c in combinations(idle, n) if covers(c, short)]
    found = place("new", need, residents, room)
    if ways:
        chosen = tuple(x for x in idle if x.name in found.unload)
        assert len(chosen) == len(found.unload) and covers(chosen, short)
        assert not any(covers(c, short) for c in combinations(chosen, max(0, len(chosen) - 1))) or (
            not chosen
        )
        assert not (found.hold or found.problem)
    else:
        movable = tuple(x for x in residents if not x.is_pinned)
        assert not found.unload and bool(found.hold) == covers(movable, short)
        assert bool(found.problem) != bool(found.hold)


MACHINE = {"ram": 100 * GB, "gpu0": 40 * GB}


@pytest.mark.parametrize(
    ("setting", "result"),
    [
        ("auto", MACHINE),
        ("80%", {"ram": 80 * GB, "gpu0": 32 * GB}),
        ("20GB", {TOTAL: 20 * GB}),
        ("1.5 GiB", {TOTAL: 3 * 2**29}),
        ({"ram": "50%", "gpu0": "100 %"}, {"ram": 50 * GB, "gpu0": 40 * GB}),
        ({"gpu0": "512MiB"}, {"gpu0": 2**29}),
    ],
)
def test_budgets(setting: str | dict[str, str], result: dict[str, int]) -> None:
    assert budget(setting, MACHINE) == result


def test_a_budget_of_a_device_that_is_not_there() -> None:
    with pytest.raises(UsageError, match=r"memory\.gpu7: this machine has no such device"):
        budget({"gpu7": "1GB"}, MACHINE)


def test_who_is_next() -> None:
    waiting = [
        Waiting(name="many", since=95, requests=5),
        Waiting(name="first", since=97, priority=1),
        Waiting(name="old", since=70),
        Waiting(name="older", since=60),
        Waiting(name="one", since=90),
        Waiting(name="other", since=91),
    ]
    names = [each.name for each in order(waiting, now=100)]
    assert names == ["older", "old", "first", "many", "one", "other"]


def test_uses_count_less_the_older_they_are() -> None:
    twice = used_again(100.0, 100.0)
    assert math.exp((twice - 100) / RECENT) == pytest.approx(2)
    assert used_again(twice, 100 + 50 * RECENT) == pytest.approx(100 + 50 * RECENT)
    assert used_again(0.0, 1e9) == 1e9, "the first"


def test_room_for_a_model_waits_the_longer_the_more_others_are_used() -> None:
    def seconds(uses: float, requests: int = 1, now: float = 100.0) -> float:
        leaving = [resident("a", 1, now + RECENT * math.log(uses / 2))] * 2
        return pause(Waiting(name="x", since=100, requests=requests), leaving, now, longest=3)

    assert seconds(OFTEN / 3) == pytest.approx(1)
    assert seconds(OFTEN / 3, requests=2) == pytest.approx(0.5)
    assert seconds(99 * OFTEN) == 3 and seconds(99 * OFTEN, now=104) == -1
    assert 0 < seconds(0.01) < 0.01
