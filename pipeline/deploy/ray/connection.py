"""A client's connection, as Serve passes it on: an answer's blocks become messages to its proxy."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.types import Message, Send

from pipeline.serve.gateway.connection import WITHOUT_BODY

MOST_UNSENT = 1024 * 1024  # bytes, until no more are read from the server


class ServeConnection:
    """Stands for `Connection`. The gateway sends its messages through `send`, which keeps them
    behind the blocks that were written before."""

    def __init__(self, send: Send, method: str) -> None:
        self._send, self._is_head = send, method == "HEAD"
        self._body: MessageBody | None = None

    @contextmanager
    def body(
        self, source: asyncio.Transport, status: int, length: int | None
    ) -> Iterator[MessageBody]:
        """The body of the answer whose head was sent, read from `source` no faster than it is
        taken."""
        self._body = MessageBody(
            self._send, source, is_empty=self._is_head or status in WITHOUT_BODY
        )
        yield self._body

    async def send(self, message: Message) -> None:
        """Send a message of the gateway's own."""
        if self._body:
            await self._body.sent()
        await self._send(message)


class MessageBody:
    """What writes the body of one answer."""

    def __init__(self, send: Send, source: asyncio.Transport, *, is_empty: bool) -> None:
        self._send, self._source, self._is_empty = send, source, is_empty
        self._blocks: list[bytes] = []
        self._size = 0
        self._task: asyncio.Task[None] | None = None

    def write(self, block: bytes) -> None:
        """Send a block as it is."""
        if not block or self._is_empty:
            return
        self._blocks.append(block)
        self._size += len(block)
        if self._size > MOST_UNSENT and not self._source.is_closing():
            self._source.pause_reading()
        if self._task is None or self._task.done():
            self._task = asyncio.ensure_future(self._pass())

    async def _pass(self) -> None:
        while self._blocks:
            block = b"".join(self._blocks)
            self._blocks.clear()
            self._size = 0
            await self._send({"type": "http.response.body", "body": block, "more_body": True})
            if not self._source.is_closing():
                self._source.resume_reading()

    async def sent(self) -> None:
        """Return once everything is sent."""
        if self._task:
            await self._task

    def end(self) -> None:
        """The answer is whole."""
