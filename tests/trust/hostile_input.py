"""What every parser is fed with, and how it is held to its promises.

A harness knows how to make hostile input for one parser, and what must hold for whatever comes out:
no error but the parser's own, no more than some seconds and some memory, and what its check says.
Each can also spoil its parser, so that a test can see the harness fail.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, strategies
from hypothesis.strategies import SearchStrategy
from seeds import dice

CPU_SECONDS = 5.0  # for one input; the first may have to load modules
MEMORY_MB = 400  # that all inputs of a harness may add to the process
Check = Callable[[Any, Path], None]
Spoil = Callable[[pytest.MonkeyPatch], None]


@dataclass(frozen=True)
class Harness:
    """`check(example, folder)` raises where the parser breaks a promise; the folder is empty at
    first, and the same for all examples. `cases` are always tried; `spoil` breaks the parser."""

    examples: SearchStrategy[Any]
    check: Check
    spoil: Spoil
    cases: Sequence[Any] = ()


HARNESSES: dict[str, Harness] = {}


def harness(
    examples: SearchStrategy[Any], *, spoil: Spoil, cases: Sequence[Any] = ()
) -> Callable[[Check], Check]:
    """Registers a check as the harness of its name."""

    def register(check: Check) -> Check:
        HARNESSES[check.__name__] = Harness(examples, check, spoil, cases)
        return check

    return register


def replace(owner: Any, name: str, value: Any) -> Spoil:
    """Spoils a parser by another value for one of its names."""
    return lambda patch: patch.setattr(owner, name, value)


def explore(
    each: Harness, folder: Path, count: int, seed: int | None = None, *, shrinks: bool = True
) -> None:
    """Try the cases and `count` random examples: the same ones each time, unless there is a seed.
    Raises what the check raises; if it `shrinks`, for the smallest example that does it."""

    def check(example: Any) -> None:
        began = time.thread_time()
        each.check(example, folder)
        seconds = time.thread_time() - began
        assert seconds < CPU_SECONDS, f"{seconds:.1f} s of CPU"

    test = hypothesis.given(each.examples)(check)
    for case in each.cases:
        test = hypothesis.example(case)(test)
    if seed is not None:
        test = hypothesis.seed(seed)(test)
    before = peak_mb()
    hypothesis.settings(
        max_examples=count,
        derandomize=seed is None,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.explicit, Phase.generate, *([Phase.shrink] if shrinks else [])),
    )(test)()
    assert peak_mb() - before < MEMORY_MB


def explore_for(each: Harness, folder: Path, seconds: float) -> int:
    """Try random examples for so long; how many they were."""
    chance, end, tried = dice(), time.monotonic() + seconds, 0
    while time.monotonic() < end:
        explore(each, folder, ROUND, chance.getrandbits(32))
        tried += ROUND
    return tried


ROUND = 200


def peak_mb() -> float:
    """The most memory that this process has had; 0 where the system does not say."""
    if sys.platform == "win32":
        return 0.0
    import resource

    unit = 1e6 if sys.platform == "darwin" else 1e3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


# Strategies

ODD_TEXTS = (
    *("", " ", "\0", "\n", "\r\n", "\t", "\x1b[31m", "ü", "日本", "\u202e", "\ufeff", "\ud800"),
    *("\udcff", "..", "/", "../..", "C:\\x", "nul", "~", "~nobody-here", "-", "--", "=", "%2f"),
    *(
        "9" * 30,
        "-1",
        "1e999",
        "nan",
        "0x10",
        "１２",
        "٣",
        "true",
        "null",
        "{}",
        "[",
        "'",
        '"',
        "#",
    ),
)
ODD_NUMBERS = (
    *(0, -1, 1, 2**31, 2**63 - 1, 2**64, -(2**63) - 1, 10**30, 10**400),
    *(0.5, -0.0, 1e308, -1e308, 5e-324, float("inf"), float("-inf"), float("nan")),
)
texts = strategies.one_of(strategies.sampled_from(ODD_TEXTS), strategies.text(max_size=12))
scalars = strategies.one_of(
    strategies.none(), strategies.booleans(), strategies.sampled_from(ODD_NUMBERS), texts
)
values = strategies.recursive(
    scalars,
    lambda inner: strategies.one_of(
        strategies.lists(inner, max_size=3), strategies.dictionaries(texts, inner, max_size=3)
    ),
    max_leaves=6,
)


def pieces(*tokens: str) -> SearchStrategy[str]:
    """A text of these tokens, and some others between them."""
    piece = strategies.one_of(*[strategies.sampled_from(tokens)] * 4, texts)
    return strategies.lists(piece, max_size=16).map("".join)


def encoded(text: str) -> bytes:
    """In UTF-8, halves of letters and all: what a file may hold, right or wrong."""
    return text.encode("utf-8", "surrogatepass")


@strategies.composite
def mutated(draw: Any, *seeds: bytes) -> bytes:
    """One of `seeds` with some bytes changed, cut out, repeated or put in."""
    data = draw(strategies.sampled_from(seeds))
    for _ in range(draw(strategies.integers(0, 4))):
        at = draw(strategies.integers(0, len(data)))
        end = min(len(data), at + draw(strategies.sampled_from((0, 1, 2, 8, 64, 600))))
        instead = draw(
            strategies.one_of(
                strategies.binary(max_size=6),
                strategies.sampled_from((b"\0" * 8, b"\xff" * 4, data[at:end] * 2, b"9" * 12)),
            )
        )
        data = data[:at] + instead + data[end:]
    return data


@strategies.composite
def damaged(draw: Any, document: Any) -> Any:
    """A document of JSON values of which some are others now, are gone, or are new."""
    document = json.loads(json.dumps(document))
    for _ in range(draw(strategies.integers(0, 3))):
        places = list(_places(document))
        if not places or draw(strategies.integers(0, 20)) == 0:
            return draw(values)
        owner, key = draw(strategies.sampled_from(places))
        what = draw(strategies.sampled_from(("change", "change", "remove", "add")))
        if what == "remove":
            del owner[key]
        elif what == "add" and isinstance(owner, dict):
            owner[draw(texts)] = draw(values)
        else:
            owner[key] = draw(values)
    return document


def _places(document: Any) -> Iterator[tuple[Any, Any]]:
    """Each value in a document, as its owner and its key there."""
    if isinstance(document, (dict, list)):
        for key in document if isinstance(document, dict) else range(len(document)):
            yield document, key
            yield from _places(document[key])


@strategies.composite
def cuts(draw: Any, data: SearchStrategy[bytes]) -> list[bytes]:
    """Bytes as they come from a connection, in pieces."""
    rest, blocks = draw(data), []
    while rest:
        at = draw(strategies.sampled_from((1, 2, 3, 7, 20, 100, len(rest))))
        blocks.append(rest[:at])
        rest = rest[at:]
    return blocks
