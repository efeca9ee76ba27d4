"""The knapsack of a mix, against every solution of small ones."""

from __future__ import annotations

import itertools
import random

import pytest

from pipeline.models.knapsack import Variant, solve


def test_it_is_exact() -> None:
    """As with real tensors, sizes repeat, and losses fall with them, but not always."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(150):
        items = some_items(rng)
        least, most = (sum(f(o.bytes for o in item) for item in items) for f in (min, max))
        budget = rng.randint(least, most + 10)
        chosen = solve(items, budget)
        assert taken(items, chosen) <= budget
        assert lost(items, chosen) == pytest.approx(best(items, budget), rel=1e-9, abs=1e-300)


def test_a_solution_of_fewer_bytes_is_not_taken_for_a_better_one() -> None:
    items = [
        [Variant(256, 1.2), Variant(192, 11.0), Variant(128, 43.0)],
        [Variant(384, 1.9), Variant(512, 0.1), Variant(192, 51.0)],
        [Variant(288, 0.1), Variant(192, 0.6)],
    ]
    chosen = solve(items, 640)
    assert lost(items, chosen) == best(items, 640)


def some_items(rng: random.Random) -> list[list[Variant]]:
    items = []
    for _ in range(rng.randint(1, 6)):
        size, scale = rng.choice((64, 64, 96, 1024)), 10 ** rng.uniform(-6, 1)
        bits = rng.sample((2, 3, 4, 5, 6, 8, 16), rng.randint(1, 5))
        items.append([Variant(size * b, scale * 4.0**-b * rng.uniform(0.5, 2)) for b in bits])
    return items


def best(items: list[list[Variant]], budget: int) -> float:
    every = itertools.product(*(range(len(item)) for item in items))
    return min(lost(items, chosen) for chosen in every if taken(items, chosen) <= budget)


def taken(items: list[list[Variant]], chosen: object) -> int:
    return sum(item[n].bytes for item, n in zip(items, chosen, strict=True))  # type: ignore[call-overload]


def lost(items: list[list[Variant]], chosen: object) -> float:
    return sum(item[n].loss for item, n in zip(items, chosen, strict=True))  # type: ignore[call-overload]


def test_as_many_tensors_as_a_large_model_has() -> None:
    """No solution loses less than the relaxed one, and what is found is next to it."""
    rng = random.Random(7)
    types = (2.06, 2.31, 2.56, 2.63, 3.06, 3.44, 4.25, 4.5, 5.5, 6.56, 8.5, 16.0)
    items = []
    for layer in range(16):
        for elements in (16 << 20, 4 << 20, 4 << 20, 16 << 20, 56 << 20, 56 << 20, 56 << 20):
            cost = rng.lognormvariate(0, 1) * (1 + layer / 16)
            items.append([Variant(int(elements * b / 8), cost * 4.0**-b) for b in types])
    budget = int(sum(item[7].bytes for item in items) * 1.07)
    chosen = solve(items, budget)
    assert budget * 0.999 < taken(items, chosen) <= budget
    plain = sum(item[7].loss for item in items)
    assert lost(items, chosen) < plain


def test_a_budget_that_is_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match="smallest options take 8 bytes, the budget is 7"):
        solve([[Variant(8, 1.0), Variant(9, 0.5)]], 7)
    assert solve([[Variant(8, 1.0), Variant(9, 0.5)]], 8) == [0]
    assert solve([[Variant(8, 1.0), Variant(9, 0.5)]], 1 << 60) == [1]
