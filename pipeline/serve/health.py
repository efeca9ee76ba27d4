"""Whether a port is free, and whether the server on it is ready."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import PipelineError, UsageError
from pipeline.core.text import size

from .keys import keys_of
from .server import GATEWAY, Server

if TYPE_CHECKING:
    import http.client

BACKLOG = 1024  # connections that wait to be taken
MOST_BYTES = 16 * 1024 * 1024  # of an answer; the metrics of vLLM take some 100 kB


def require_free(host: str, port: int) -> None:
    """Raise PipelineError, which names the holder, where `host`:`port` cannot be listened on."""
    _bound(host, port).close()


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens there; connections wait in it. Raises PipelineError as
    `require_free`."""
    bound = _bound(host, port)
    try:
        bound.listen(BACKLOG)
    except OSError as error:  # taken since it was bound
        bound.close()
        raise _unusable(host, port, error) from None
    return bound


def _bound(host: str, port: int) -> socket.socket:
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        raise UsageError(f"host={host}: is no address: {error}") from None
    bound = socket.socket(family, kind, proto)
    try:
        if os.name != "nt":  # there it would let two servers share a port
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise _unusable(host, port, error) from None
    return bound


def _unusable(host: str, port: int, error: OSError) -> PipelineError:
    if error.errno == errno.EADDRINUSE:
        holder = _holder(port)
        return PipelineError(
            f"port {port} on {host} is in use{holder and f' by {holder}'}",
            "stop it, or take another: port=…",
        )
    return PipelineError(
        f"port {port} on {host} cannot be used: {error.strerror}",
        "ports below 1024 need rights of their own; take another: port=…"
        if port < 1024
        else "host must be an address of this machine",
    )


def _holder(port: int) -> str:
    """`name (pid N)` of the process that listens on `port`, where the system tells."""
    import psutil

    try:
        for connection in psutil.net_connections("tcp"):
            if (
                connection.status == psutil.CONN_LISTEN
                and connection.laddr
                and connection.laddr[1] == port
                and connection.pid
            ):
                return f"{psutil.Process(connection.pid).name()} (pid {connection.pid})"
    except (psutil.Error, OSError):
        pass  # another user's process, or a system that needs more rights to tell
    return ""


def key(server: Server) -> str | None:
    """The first key in its key file. Raises OSError."""
    if server.api_key_file is None:
        return None
    return next(iter(keys_of(Path(server.folder, server.api_key_file))), None)


def ask(
    server: Server, path: str, body: Mapping[str, object] | None = None, *, timeout: float
) -> tuple[int, str]:
    """The status and text of a server's answer to a GET, or with `body` to a POST. Raises OSError,
    also where the exchange takes longer than `timeout` seconds, or the answer is endless."""
    from http.client import HTTPException  # slow to load, and not needed to plan a server

    headers = {"Content-Type": "application/json", **_authorization(server)}
    connection = _connection(server, timeout)
    try:
        data = None if body is None else json.dumps(body)
        connection.request("POST" if data else "GET", server.prefix + path, data, headers)
        answer = connection.getresponse()
        content = answer.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise OSError(f"{path}: the answer has more than {size(MOST_BYTES)}")
        return answer.status, content.decode("utf-8", "replace")
    except (HTTPException, ValueError) as error:
        raise OSError(str(error)) from None
    finally:
        connection.close()


def _authorization(server: Server) -> dict[str, str]:
    """The header with its key, if it has one. Raises OSError."""
    token = key(server)
    return {"Authorization": f"Bearer {token}"} if token else {}


def _connection(server: Server, timeout: float) -> http.client.HTTPConnection:
    import http.client

    deadline = time.monotonic() + timeout

    def response(sock: socket.socket, *args: Any, **options: Any) -> http.client.HTTPResponse:
        answer = http.client.HTTPResponse(sock, *args, **options)
        answer.fp = io.BufferedReader(_UntilDeadline(answer.fp.detach(), sock, deadline))
        return answer

    connection = http.client.HTTPConnection(server.address, server.port, timeout=timeout)
    if server.tls:
        import ssl

        # On this machine, with a certificate that names it as others see it.
        context = ssl._create_unverified_context()  # noqa: S323
        connection = http.client.HTTPSConnection(
            server.address, server.port, timeout=timeout, context=context
        )
    connection.response_class = response  # type: ignore[assignment]
    return connection


class _UntilDeadline(io.RawIOBase):
    """Reads from a socket until a deadline: its own timeout begins again with each byte."""

    def __init__(self, raw: io.RawIOBase, sock: socket.socket, deadline: float) -> None:
        self._raw, self._sock, self._deadline = raw, sock, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        self._sock.settimeout(left)
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


def is_ready(server: Server, timeout: float = 2) -> bool:
    """Whether a server answers that its model is loaded. A gateway is ready once it answers at all:
    its /health is about the others."""
    with contextlib.suppress(OSError):
        # with the key: given an --api-prefix, llama-server requires it here too
        if server.tls:
            status, _ = ask(server, "/health", timeout=timeout)
        else:
            status = _status(server, "/health", timeout)
        return status == 200 or server.engine == GATEWAY
    return False


def _status(server: Server, path: str, timeout: float) -> int:
    """The status of its answer, as `ask` gets it. http.client takes a while to load, which a server
    that starts need not wait for. Raises OSError."""
    from httptools import HttpParserError, HttpResponseParser

    headers = {"Host": "localhost", "Connection": "close", **_authorization(server)}
    lines = [f"GET {server.prefix}{path} HTTP/1.1", *(f"{n}: {v}" for n, v in headers.items())]
    deadline, size = time.monotonic() + timeout, 0
    answer = _Answer()
    parser = HttpResponseParser(answer)
    with socket.create_connection((server.address, server.port), timeout) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        while not answer.is_over:
            if (left := deadline - time.monotonic()) <= 0 or size > MOST_BYTES:
                raise TimeoutError("the answer is endless")
            connection.settimeout(left)
            block = connection.recv(65536)
            if not block and (answer.has_length or not answer.has_head):
                raise OSError("the answer is cut short")
            if not block:
                break
            size += len(block)
            try:
                parser.feed_data(block)
            except HttpParserError as error:
                raise OSError(str(error)) from None
    return int(parser.get_status_code())


class _Answer:
    """How far an answer has come, as its parser tells it."""

    has_head = has_length = is_over = False

    def on_header(self, name: bytes, value: bytes) -> None:
        self.has_length |= name.lower() in (b"content-length", b"transfer-encoding")

    def on_headers_complete(self) -> None:
        self.has_head = True

    def on_message_complete(self) -> None:
        self.is_over = True
