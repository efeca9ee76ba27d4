"""A client's connection: uvicorn's, with a limit on heads of requests and a short way for bodies.

A body that is passed on skips ASGI and h11, which cost more for each event than the model for its
token. h11 is told afterwards what was written, so that the connection goes on as it would.

A request that is refused while it is still being sent is read to its end, and thrown away: where a
connection is closed with bytes unread, the system resets it, and the client may never see why.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any
from urllib.parse import unquote

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from pipeline.serve.guard.refusal import error_body
from pipeline.serve.guard.request import TOO_LONG, origin_form

from . import request_body

WITHOUT_BODY = (204, 304)
CUT_OFF = (h11.SEND_BODY, h11.ERROR)  # states of a client whose request is not over


class Connection(H11Protocol):
    """Closed where the head of a request does not come in time; uvicorn waits for it for ever.
    The application finds it in its scope, as `connection`."""

    _deadline: asyncio.TimerHandle | None = None
    _source: asyncio.Transport | None = None  # of the body that is passed on

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        app = self.app

        async def with_connection(scope: Any, receive: Any, send: Any) -> None:
            await app({**_in_origin_form(scope), "connection": self}, receive, send)

        self.app = with_connection

    @contextmanager
    def body(self, source: asyncio.Transport, status: int, length: int | None) -> Iterator[Body]:
        """The body of the answer whose head was sent, read from `source` no faster than the client
        takes it. Without a length it is sent in chunks, as h11 said in the head."""
        is_old = self.scope["http_version"] != "1.1"
        is_empty = self.scope["method"] == "HEAD" or status in WITHOUT_BODY
        self._source = source
        try:
            yield Body(self, in_chunks=length is None and not is_old and not is_empty)
        finally:
            self._source = None

    # asyncio's

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._raw: asyncio.Transport = transport
        self.transport = _ClosedLater(transport, self)  # type: ignore[assignment]
        self._limit()

    def data_received(self, data: bytes) -> None:
        if not self.transport.is_closing():
            super().data_received(data)
            self._limit()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._release()

    def close(self) -> None:
        """Close it, once the client has sent its request and read the answer."""
        self._release()
        if self.conn.their_state not in CUT_OFF:
            self._raw.close()
            return
        if self._raw.can_write_eof():
            self._raw.write_eof()
        self._raw.resume_reading()
        self._deadline = self.loop.call_later(request_body.IDLE_SECONDS, self._raw.close)

    def shutdown(self) -> None:
        if self.transport.is_closing():
            self._raw.close()
        else:
            super().shutdown()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP, unless an answer has begun: the request that came with it, if
        there is one, gets no other."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._refuse(sys.exception())
        self.transport.close()

    def _refuse(self, error: BaseException | None) -> None:
        """Answer what h11 cannot read."""
        status = getattr(error, "error_status_hint", 400)
        is_long = status == TOO_LONG.status
        why = TOO_LONG.message if is_long else f"the request is not valid HTTP: {error}"
        text = json.dumps(error_body(status, why, None, anthropic=False)).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(text)),
            (b"connection", b"close"),
        ]
        reason = HTTPStatus(status).phrase.encode()
        head = h11.Response(status_code=status, headers=headers, reason=reason)
        for event in (head, h11.Data(data=text), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._source and not self._source.is_closing():
            self._source.pause_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._source and not self._source.is_closing():
            self._source.resume_reading()

    def _limit(self) -> None:
        """Begin to count where no request is being answered."""
        if self.transport.is_closing():
            return
        if self.cycle is not None and not self.cycle.response_complete:
            self._release()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(
                request_body.IDLE_SECONDS, self.timeout_keep_alive_handler
            )

    def _release(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


class _ClosedLater:
    """What uvicorn writes to: the transport, but for the way in which it is closed."""

    def __init__(self, transport: asyncio.Transport, connection: Connection) -> None:
        self._transport, self._connection, self._is_closing = transport, connection, False
        self.write = transport.write  # for each token

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self._is_closing or self._transport.is_closing()

    def close(self) -> None:
        if not self.is_closing():
            self._is_closing = True
            self._connection.close()


def _in_origin_form(scope: Any) -> Any:
    """A request as if it named no host but in its header."""
    path, host = origin_form(scope["raw_path"])
    if host is None:
        return scope
    headers = [header for header in scope["headers"] if header[0] != b"host"]
    text = unquote(path.decode("ascii"))
    return {**scope, "path": text, "raw_path": path, "headers": [(b"host", host), *headers]}


class Body:
    """What writes the body of one answer."""

    def __init__(self, connection: Connection, *, in_chunks: bool) -> None:
        self._connection = connection
        self._in_chunks = in_chunks
        self._written = 0

    def write(self, block: bytes) -> None:
        """Send a block as it is; nothing where the client is gone."""
        transport = self._connection.transport
        if not block or transport.is_closing():
            return
        self._written += len(block)
        transport.write(b"%x\r\n%b\r\n" % (len(block), block) if self._in_chunks else block)

    def end(self) -> None:
        """Have h11 count what was written, before the end of the answer is sent through it. A body
        that knows its length is all it needs, and what it would add is thrown away."""
        if not self._connection.transport.is_closing():
            data = h11.Data(data=range(self._written))  # type: ignore[arg-type]
            self._connection.conn.send_with_data_passthrough(data)
