"""Which replica has a conversation's prompt."""

from __future__ import annotations

import json
import random
from typing import Any

from pipeline.deploy.ray.prefix import BLOCK, PrefixMemory, hashes


def words(seed: int, count: int = 200) -> str:
    made = random.Random(seed)
    return " ".join(f"{made.randrange(10**6):06}" for _ in range(count))


def turn(*texts: str, **more: Any) -> bytes:
    messages = [{"role": ("user", "assistant")[n % 2], "content": t} for n, t in enumerate(texts)]
    return json.dumps({"model": "chat", "messages": messages, **more}).encode()


def test_the_next_turn_begins_with_all_hashes_of_the_one_before() -> None:
    first, answer, second = words(1), words(2), words(3)
    before, after = hashes(turn(first)), hashes(turn(first, answer, second, temperature=1))
    assert len(before) == len(turn(first)) // BLOCK - 1 or len(before) > 3
    assert after[: len(before)] == before
    assert len(after) > len(before)


def test_what_begins_differently_shares_no_hash() -> None:
    other = hashes(turn("x" + words(1)))
    assert other and not set(hashes(turn(words(1)))) & set(other)
    tools = hashes(turn(words(1), tools=[{"type": "function"}]))
    assert tools and not set(hashes(turn(words(1)))) & set(tools)


def test_prompts_of_all_apis_count_and_other_bodies_do_not() -> None:
    assert hashes(json.dumps({"prompt": words(1)}).encode())
    assert hashes(json.dumps({"system": words(1), "messages": []}).encode())
    assert hashes(json.dumps({"input": [words(1)]}).encode())
    for body in (b"", b"{", b"[1]", b'{"messages": "short"}', b"\xff\xfe", b"[" * 10**5):
        assert hashes(body) == []


def test_ten_megabytes_are_few_hashes() -> None:
    body = json.dumps({"prompt": "a" * 10**7}).encode()
    assert 100 < len(hashes(body)) < 200


def test_the_replica_with_the_longest_part_is_best() -> None:
    memory = PrefixMemory()
    memory.add([1, 2, 3], "a")
    memory.add([1, 2, 9, 10], "b")
    assert memory.best([1, 2, 3, 4], ["a", "b"]) == "a"
    assert memory.best([1, 2, 9], ["a", "b"]) == "b"
    assert memory.best([1], ["a", "b"]) == "b"  # the last that evaluated it
    assert memory.best([1, 2, 3], ["b"]) == "b"  # a is gone
    assert memory.best([7], ["a", "b"]) is None
    assert memory.best([], ["a", "b"]) is None


def test_the_memory_forgets_what_was_not_used_for_long() -> None:
    memory = PrefixMemory(most=4)
    memory.add([1, 2], "a")
    memory.add([3, 4], "b")
    memory.add([1, 2], "a")  # used again
    memory.add([5, 6], "c")
    assert memory.best([3, 4], ["a", "b", "c"]) is None
    assert memory.best([1, 2], ["a", "b", "c"]) == "a"
