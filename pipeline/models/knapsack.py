"""The multiple-choice knapsack: one option of each item, the least loss within a budget of bytes.

A Lagrange multiplier prices a byte, which gives a first solution and a bound on all others. Then
the items are taken one by one, and of the partial solutions only those are kept that are the best
for their size and can still beat the best solution known (Nemhauser and Ullmann). The result is
exact, unless these are more than MOST_PARTIAL.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import itemgetter
from typing import NamedTuple

PRICES = 100  # that the search for the multiplier tries: it halves an interval
MOST_PARTIAL = 2_000  # partial solutions that are kept; with more, it may miss the very best
BY_SIZE = itemgetter(0, 1)


class Variant(NamedTuple):
    """What an option takes in bytes, and what it loses, in any unit that adds up."""

    bytes: int
    loss: float


class PartialSolution(NamedTuple):
    """Options of the first items: their sums, and the last one behind those before it."""

    bytes: int
    loss: float
    option: int = -1
    before: PartialSolution | None = None


def solve(items: Sequence[Sequence[Variant]], budget: int) -> list[int]:
    """The index of an option for each of `items`, so that they lose least within `budget` bytes.

    Raises ValueError where even the smallest options take more.
    """
    smallest = sum(min(option.bytes for option in item) for item in items)
    if smallest > budget:
        raise ValueError(f"the smallest options take {smallest} bytes, the budget is {budget}")
    price = _price(items, budget)
    best = _filled(items, _cheapest(items, price), budget)
    # What all items from one on lose and pay, at least.
    least = [min(option.loss + price * option.bytes for option in item) for item in items]
    rest = [*accumulate(reversed(least), initial=0.0)][::-1]
    limit = sum(item[n].loss for item, n in zip(items, best, strict=True))
    limit -= 1e-12 * abs(limit)  # rounding makes no better solution
    found = [PartialSolution(0, 0.0)]
    for item, bound in zip(items, rest[1:], strict=True):
        longer = (
            PartialSolution(state.bytes + option.bytes, state.loss + option.loss, n, state)
            for state in found
            for n, option in enumerate(item)
        )
        most = limit + price * budget - bound
        promising = [
            state
            for state in longer
            if state.bytes <= budget
            and state.loss < limit  # else one of few bytes would pass for better
            and state.loss + price * state.bytes < most
        ]
        found = _undominated(sorted(promising, key=BY_SIZE))
        if len(found) > MOST_PARTIAL:
            found.sort(key=lambda state: state.loss + price * state.bytes)
            found = sorted(found[:MOST_PARTIAL], key=BY_SIZE)
    if not found:
        return best
    chosen: list[int] = []
    last: PartialSolution | None = min(found, key=lambda state: (state.loss, state.bytes))
    while last and last.before:
        chosen.append(last.option)
        last = last.before
    return chosen[::-1]


def _price(items: Sequence[Sequence[Variant]], budget: int) -> float:
    """The least price of a byte, in loss, at which the cheapest options keep within the budget."""

    def keeps(price: float) -> bool:
        chosen = zip(items, _cheapest(items, price), strict=True)
        return sum(item[n].bytes for item, n in chosen) <= budget

    if keeps(0.0):
        return 0.0
    low, high = 0.0, 1e-30
    while not keeps(high) and high < 1e300:
        low, high = high, high * 1000
    for _ in range(PRICES):
        middle = (low * high) ** 0.5 if low else high / 1000
        low, high = (low, middle) if keeps(middle) else (middle, high)
    return high


def _cheapest(items: Sequence[Sequence[Variant]], price: float) -> list[int]:
    """The option of each item with the least sum of loss and price, the smaller of equal ones."""
    return [
        min(range(len(item)), key=lambda n: (item[n].loss + price * item[n].bytes, item[n].bytes))
        for item in items
    ]


def _filled(items: Sequence[Sequence[Variant]], chosen: list[int], budget: int) -> list[int]:
    """`chosen` with better options as long as they fit, those that gain most first."""
    room = budget - sum(item[n].bytes for item, n in zip(items, chosen, strict=True))
    while True:
        gains = [
            (item[now].loss - option.loss, -option.bytes, index, n)
            for index, (item, now) in enumerate(zip(items, chosen, strict=True))
            for n, option in enumerate(item)
            if option.loss < item[now].loss and option.bytes - item[now].bytes <= room
        ]
        if not gains:
            return chosen
        _, _, index, n = max(gains)
        room -= items[index][n].bytes - items[index][chosen[index]].bytes
        chosen[index] = n


def _undominated(states: Sequence[PartialSolution]) -> list[PartialSolution]:
    """Of states by size those that lose less than every smaller one."""
    kept: list[PartialSolution] = []
    for state in states:
        if not kept or state.loss < kept[-1].loss:
            kept.append(state)
    return kept
