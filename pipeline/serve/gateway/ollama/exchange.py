"""One request through the proxy: an instance gets what was translated for it, and the client its
answer as Ollama would give it.

To the proxy this is a client like any other, so that all its rules hold: it waits for a server that
loads, tries another one, counts, and leaves the instance when the client leaves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self
from urllib.parse import urlencode

import msgspec
from msgspec import Struct
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from pipeline.serve.gateway.connection import Body, Connection
from pipeline.serve.gateway.proxy import Proxy
from pipeline.serve.gateway.upstream import MOST_HELD

from .replies import Text, Vectors, error_of, joined, lines

LINES, JSON = "application/x-ndjson", "application/json"
# Headers that describe the client's body, or ask for another form of the answer.
REPLACED = (
    *(b"content-length", b"content-type", b"content-encoding", b"transfer-encoding"),
    *(b"accept", b"accept-encoding"),
)
LOAD = "/health"  # answered by every instance once it is ready


class Call(Struct, frozen=True, kw_only=True):
    """A request for the instance `model`. Without a path it only has to be loaded."""

    path: str
    model: str
    reply: Text | Vectors
    streams: bool = False  # the client wants each object as it comes
    keep_alive: float | None = None  # seconds, see `request_body.seconds`
    is_loaded: bool = True

    @property
    def unloads(self) -> bool:
        """Whether it only asks to unload the model."""
        return not self.path and self.keep_alive == 0


class Exchange:
    """Stands for the client's connection: the proxy reads the translated request, with `body`, from
    it and writes the instance's answer into it."""

    def __init__(self, proxy: Proxy, call: Call, body: Mapping[str, Any]) -> None:
        self._proxy, self._call = proxy, call
        self._body: bytes | None = b""
        if call.path:
            self._body = msgspec.json.encode({"model": call.model, **body})
        self._status = 0
        self._headers: list[tuple[bytes, bytes]] = []
        self._stream: Text | None = None  # an answer of which each object is sent as it comes
        self._sink: Body | None = None  # and where to
        self._blocks: list[bytes] = []  # of any other answer
        self._held = 0  # bytes of them
        self._is_whole = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Have the proxy answer. Raises Refused."""
        self._connection: Connection = scope["connection"]
        self._receive, self._send = receive, send
        self._scope = self._translated(scope)
        if self._call.unloads and not self._call.is_loaded:
            await self._respond(200, self._call.reply.loaded(unloads=True))
            return
        await self._proxy(self._scope, self._take, self._give)
        if self._status and not (self._stream or self._is_whole):
            # a client that has left gets nothing
            await self._respond(502, {"error": "the instance broke off its answer"})

    def _translated(self, scope: Scope) -> Scope:
        """The scope of the request for the instance."""
        call = self._call
        headers = [header for header in scope["headers"] if header[0] not in REPLACED]
        if call.path:
            headers.append((b"content-type", JSON.encode()))
        return {
            **scope,
            "method": "POST" if call.path else "GET",
            "path": call.path or LOAD,
            "query_string": b"" if call.path else urlencode({"model": call.model}).encode(),
            "headers": headers,
            "connection": self,
            "keep_alive": call.keep_alive,
            # whether the client gets signs of life while it waits
            "streams": call.streams and bool(call.path),
        }

    async def _take(self) -> Message:
        """What the proxy reads: the translated request, then whether the client leaves."""
        if self._body is None:
            return await self._receive()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}

    async def _give(self, message: Message) -> None:
        """What the proxy sends beside the body."""
        if message["type"] == "http.response.start":
            await self._begin(message)
        elif self._stream:  # a sign of life, an error, or the end
            is_sign = message["body"].startswith(b":")  # the proxy's, for OpenAI's clients
            reply = self._stream
            objects = [reply.sign_of_life()] if is_sign else reply.feed(message["body"])
            await self._send({**message, "body": lines(objects)})
        else:
            await self._answer()

    async def _begin(self, message: Message) -> None:
        self._status, reply = message["status"], self._call.reply
        self._headers = [header for header in message["headers"] if header[0] not in REPLACED]
        if self._status == 200 and self._scope["streams"] and isinstance(reply, Text):
            self._stream = reply
            headers = [*self._headers, (b"content-type", LINES.encode())]
            await self._send({**message, "headers": headers})

    # The body, as the proxy writes it into a connection

    @contextmanager
    def body(self, source: asyncio.Transport, status: int, length: int | None) -> Iterator[Self]:
        """As the connection's own."""
        self._call.reply.load_seconds = self._scope.get("waited")
        if not self._stream:
            self._source = source
            yield self
            return
        with self._connection.body(source, status, None) as self._sink:
            yield self

    def write(self, block: bytes) -> None:
        if self._stream and self._sink:
            self._sink.write(lines(self._stream.feed(block)))
            return
        self._held += len(block)
        if self._held > MOST_HELD:
            self._source.abort()  # the proxy reports that the answer broke off
            return
        self._blocks.append(block)

    def end(self) -> None:
        self._is_whole = True
        if self._stream and self._sink:
            self._sink.write(lines(self._stream.end()))
            self._sink.end()

    # An answer that is sent at once

    async def _answer(self) -> None:
        """Send all of an answer, which has come by now."""
        document, status, reply = b"".join(self._blocks), self._status, self._call.reply
        if status != 200:
            text, status = error_of(document, status)
            made: Mapping[str, Any] = {"error": text}
        elif not self._call.path:
            made = reply.loaded(unloads=self._call.unloads)
        elif isinstance(reply, Vectors):
            try:
                made = reply.read(document)
            except (msgspec.DecodeError, RecursionError):
                status, made = 502, {"error": "the instance's answer cannot be read"}
        else:
            made = joined([*reply.feed(document), *reply.end()])
            status = reply.error_status or status
        await self._respond(status, made)

    async def _respond(self, status: int, made: Mapping[str, Any]) -> None:
        is_line = self._call.streams and status == 200
        content = msgspec.json.encode(made) + (b"\n" if is_line else b"")
        answer = Response(content, status, media_type=LINES if is_line else JSON)
        answer.raw_headers += self._headers
        await answer(self._scope, self._receive, self._send)
