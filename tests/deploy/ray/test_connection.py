"""The stand-in for a client's connection behind Serve."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from pipeline.deploy.ray.connection import MOST_UNSENT, ServeConnection


class Source:
    """What is read from."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def is_closing(self) -> bool:
        return False

    def pause_reading(self) -> None:
        self.calls.append("pause")

    def resume_reading(self) -> None:
        self.calls.append("resume")


LAST = {"type": "http.response.body", "body": b"", "more_body": False}


def sent(method: str, status: int, blocks: list[bytes], source: Source) -> list[dict[str, Any]]:
    """What Serve gets of an answer."""
    messages: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        await asyncio.sleep(0.001)
        messages.append(message)

    async def check() -> None:
        connection = ServeConnection(send, method)
        with connection.body(source, status, None) as body:  # type: ignore[arg-type]
            for block in blocks:
                body.write(block)
                await asyncio.sleep(0)
            body.end()
        await connection.send(LAST)

    asyncio.run(check())
    return messages


def test_all_blocks_come_in_order_before_the_end() -> None:
    blocks = [b"%d," % number for number in range(100)]
    *messages, last = sent("POST", 200, blocks, Source())
    assert b"".join(message["body"] for message in messages) == b"".join(blocks)
    assert all(message["more_body"] for message in messages)
    assert len(messages) < len(blocks)  # those that came meanwhile go together
    assert last == LAST


@pytest.mark.parametrize(("method", "status"), [("HEAD", 200), ("GET", 204), ("GET", 304)])
def test_an_answer_without_a_body_gets_none(method: str, status: int) -> None:
    assert sent(method, status, [b"x"], Source()) == [LAST]


def test_a_client_that_reads_slowly_slows_the_server() -> None:
    source = Source()
    sent("POST", 200, [b"x" * (MOST_UNSENT + 1)], source)
    assert source.calls == ["pause", "resume"]
    source = Source()
    sent("POST", 200, [b"x"], source)
    assert "pause" not in source.calls
