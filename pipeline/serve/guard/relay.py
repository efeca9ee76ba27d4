"""Connections of clients, passed on to a server on a Unix socket, or at another address.

Each has one of its own to the server, so that whatever either side does (a connection kept or
closed, a client that leaves) is the same for the other. Of requests the heads are read, checked and
written anew; bodies and answers go through as they come, no faster than they are taken.

A request that a client sends ahead waits until the one before is being answered: llama-server drops
what it has read behind a request, and would take the middle of the next one for its beginning.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any, Protocol

from .refusal import Refused, error_body, is_anthropic
from .request import END, MAX_HEAD, TOO_LONG, Chunks, RequestHead, read_head

HEAD_SECONDS = 20.0  # for the first request on a connection
BUSY_SECONDS, RETRY_SECONDS = 10.0, 0.01  # while the server's queue of connections is full
LINGER_SECONDS = 2.0  # for a client to close a connection whose answers are over
INTERIM = b"HTTP/1.1 1"  # an answer that another one follows
# As llama-server says it itself.
LOADING = {"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}}


Address = str | tuple[str, int]  # the path of a Unix socket, or host and port


class Refusing(Protocol):
    """Decides which requests are passed on."""

    def refusal(self, method: str, headers: Mapping[str, str]) -> Refused | None:
        """Why a request is refused; None where it is not."""


class ClientSide(asyncio.Protocol):
    """A connection from a client, among `connections` while it is open, passed on to the server
    that listens at `address()`."""

    transport: asyncio.Transport

    def __init__(
        self, rules: Refusing, address: Callable[[], Address], connections: set[ClientSide]
    ) -> None:
        self._rules, self._address, self._connections = rules, address, connections
        self._server: asyncio.Transport | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._unsent: list[bytes] = []  # until there is a connection to the server
        self._held = b""  # a head that is not whole yet
        self._ahead = b""  # requests that wait
        self._is_unanswered = False  # the last request is sent
        self._left = 0  # bytes of a body that are to come
        self._chunks: Chunks | None = None  # of a body that is to come
        self._answer = b""  # our own, to follow the server's
        self._has_all_sent = False
        self._is_over = False  # what it sends is not read any more
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self._connections.add(self)
        self._set_timer(HEAD_SECONDS, transport.close)

    def data_received(self, data: bytes) -> None:
        if self._is_over:
            return
        try:
            self._read(data)
        except Refused as refused:
            self._refuse(refused)

    def eof_received(self) -> bool:
        """True keeps the other direction open."""
        self._has_all_sent = True
        if self._is_over or not (self._server or self._connecting):
            return False
        if not self._ahead:
            self._end_requests()  # the server decides whether it still answers
        return True

    def pause_writing(self) -> None:
        if self._server and not self._server.is_closing():
            self._server.pause_reading()

    def resume_writing(self) -> None:
        if self._server and not self._server.is_closing():
            self._server.resume_reading()

    def connection_lost(self, error: Exception | None) -> None:
        self._connections.discard(self)
        self._is_over = True
        self._set_timer(0, None)
        if self._connecting:
            self._connecting.cancel()
        if self._server:
            self._server.abort()  # which ends its work

    # Requests

    def _read(self, data: bytes) -> None:
        """Pass on what may be passed on. Raises Refused."""
        while data:
            if self._left:
                block, data = data[: self._left], data[self._left :]
                self._left -= len(block)
                self._is_unanswered = not self._left
                self._send(block)
            elif self._chunks:
                block, data = self._chunks.feed(data)
                self._chunks = None if self._chunks.is_over else self._chunks
                self._is_unanswered = self._chunks is None
                self._send(block)
            elif self._is_unanswered:
                self._ahead += data
                self.transport.pause_reading()
                return
            else:
                data = self._read_head(data)

    def _read_head(self, data: bytes) -> bytes:
        """What follows the head that `data` completes, if it does. Raises Refused."""
        head, end, rest = (self._held + data).partition(END)
        if len(head) > MAX_HEAD:
            raise TOO_LONG
        self._held = b"" if end else head
        if not end:
            return b""
        self._set_timer(0, None)
        request = read_head(head + end)
        if refused := self._rules.refusal(request.method, request.headers):
            self._refuse(refused, request)
            return b""
        self._left = int(request.headers.get("content-length", "0"))
        self._chunks = Chunks() if "transfer-encoding" in request.headers else None
        self._is_unanswered = not (self._left or self._chunks)
        self._send(request.raw)
        return rest

    def _send(self, block: bytes) -> None:
        if self._server:
            if not self._server.is_closing():
                self._server.write(block)
            return
        self._unsent.append(block)
        if not self._connecting:
            self.transport.pause_reading()
            self._connecting = asyncio.ensure_future(self._connect())

    # The server

    async def _connect(self) -> None:
        try:
            await connect(lambda: ServerSide(self), self._address)
        except OSError:
            self._connecting = None
            self.end_with(_answer(503, LOADING))

    def connected(self, server: asyncio.Transport) -> None:
        """There is a connection to the server."""
        if self.transport.is_closing():
            server.abort()
            return
        self._server, self._connecting = server, None
        server.write(b"".join(self._unsent))
        self._unsent.clear()
        if (self._has_all_sent and not self._ahead) or self._is_over:
            server.write_eof()
        self.transport.resume_reading()

    def answered(self, data: bytes) -> None:
        """The server answers: the next request may be passed on."""
        while data.startswith(INTERIM):
            data = data.partition(END)[2]
        if not (data and self._is_unanswered):
            return
        self._is_unanswered = False
        if self._ahead:
            ahead, self._ahead = self._ahead, b""
            self.transport.resume_reading()
            self.data_received(ahead)
            if self._has_all_sent and not (self._ahead or self._is_over):
                self._end_requests()

    def server_left(self) -> None:
        """The connection to the server is over, and with it that to the client."""
        self._server = None
        self.end_with(self._answer)

    # The end

    def _refuse(self, refused: Refused, request: RequestHead | None = None) -> None:
        anthropic = request is not None and is_anthropic(request.path, request.headers)
        body = error_body(refused.status, refused.message, refused.code, anthropic=anthropic)
        is_head = request is not None and request.method == "HEAD"
        self.end_with(_answer(refused.status, body, is_head=is_head))

    def end_with(self, answer: bytes) -> None:
        """Send the last answer on this connection once those of the server are over."""
        self._is_over = True
        if self._connecting or self._server:
            self._answer = answer
            self._end_requests()  # else the server would wait for more
        elif not self.transport.is_closing():
            self.transport.write(answer)
            self.transport.write_eof()
            self.transport.resume_reading()  # or its end is not seen
            self._set_timer(LINGER_SECONDS, self.transport.close)

    def _end_requests(self) -> None:
        """Tell the server that no more requests come."""
        if self._server and not self._server.is_closing():
            self._server.write_eof()

    def _set_timer(self, seconds: float, call: Callable[[], None] | None) -> None:
        if self._timer:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(seconds, call) if call else None


class ServerSide(asyncio.Protocol):
    """The connection to the server that belongs to a client's."""

    def __init__(self, client: ClientSide) -> None:
        self._client = client
        self._to_client = client.transport

    def connection_made(self, transport: Any) -> None:
        self._client.connected(transport)

    def data_received(self, data: bytes) -> None:
        if not self._to_client.is_closing():
            self._to_client.write(data)
            self._client.answered(data)

    def pause_writing(self) -> None:
        if not self._to_client.is_closing():
            self._to_client.pause_reading()

    def resume_writing(self) -> None:
        if not self._to_client.is_closing():
            self._to_client.resume_reading()

    def connection_lost(self, error: Exception | None) -> None:
        self._client.server_left()


async def connect(
    protocol: Callable[[], asyncio.BaseProtocol],
    address: Callable[[], Address],
    busy_seconds: float = BUSY_SECONDS,
) -> None:
    """Connect to the server, whose address is asked again at each try. Raises OSError."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + busy_seconds
    while True:
        try:
            match address():
                case str(path):
                    await loop.create_unix_connection(protocol, path)
                case host, port:
                    await loop.create_connection(protocol, host, port)
            return
        except BlockingIOError:
            if loop.time() >= deadline:
                raise
            await asyncio.sleep(RETRY_SECONDS)


def _answer(status: int, body: Mapping[str, Any], *, is_head: bool = False) -> bytes:
    """An answer after which the connection is closed."""
    text = json.dumps(body).encode()  # escaped to ASCII: a message may quote what is not UTF-8
    lines = [
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
        "Content-Type: application/json; charset=utf-8",
        f"Content-Length: {len(text)}",
        "Connection: close",
    ]
    return "\r\n".join([*lines, "", ""]).encode() + (b"" if is_head else text)
