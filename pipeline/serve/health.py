"""Whether a port is free, and whether the server on it is ready."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from pipeline.core.errors import PipelineError, UsageError
from pipeline.core.text import size

from .keys import keys_of
from .server import GATEWAY, Server

BACKLOG = 1024  # connections that wait to be taken
MOST_BYTES = 16 * 1024 * 1024  # of an answer; the metrics of vLLM take some 100 kB
FIRST_FINAL = 200  # statuses below come before the answer


def require_free(host: str, port: int) -> None:
    """Raise PipelineError, which names the holder, where `host`:`port` cannot be listened on."""
    _bound(host, port).close()


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens there; connections wait in it. Raises as `require_free` does."""
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
        raise UsageError(f"host={host}: is not an address: {error}") from None
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

    with contextlib.suppress(psutil.Error, OSError):  # of another user, or rights are missing
        for each in psutil.net_connections("tcp"):
            is_holder = each.status == psutil.CONN_LISTEN and each.laddr[1:] == (port,)
            if is_holder and each.pid:
                return f"{psutil.Process(each.pid).name()} (pid {each.pid})"
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
    from httptools import HttpParserError, HttpParserUpgrade  # not needed to plan a server

    deadline, answer, received = time.monotonic() + timeout, _Answer(), 0
    try:
        with _connected(server, timeout) as connection:
            connection.sendall(_request(server, path, body))
            while not answer.is_over:
                if (left := deadline - time.monotonic()) <= 0:
                    raise TimeoutError("timed out")
                connection.settimeout(left)
                block = connection.recv(65536)
                received += len(block)
                if received > MOST_BYTES:
                    raise OSError(f"{path}: the answer has more than {size(MOST_BYTES)}")
                answer.feed(block)
    except (HttpParserError, HttpParserUpgrade, ValueError) as error:
        raise OSError(str(error)) from None
    return answer.status, b"".join(answer.blocks).decode("utf-8", "replace")


def require_answer(server: Server, path: str, body: Mapping[str, object], *, timeout: float) -> str:
    """The text of a server's answer to a POST. Raises PipelineError, also where it refuses."""
    try:
        status, text = ask(server, path, body, timeout=timeout)
        if status == 200:
            return text
        why = f"answers {status}: {_error(text)}"
    except OSError as error:
        why = str(error)
    raise PipelineError(f"{server.name}: {path}: {why}", f"its log is {server.log_file}")


def _error(text: str) -> str:
    """The message in an answer of llama-server's or vLLM's."""
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text[:200]


def _connected(server: Server, timeout: float) -> socket.socket:
    connection = socket.create_connection((server.address, server.port), timeout)
    if not server.tls:
        return connection
    import ssl

    # On this machine, with a certificate that names it as others see it.
    context = ssl._create_unverified_context()  # noqa: S323
    return context.wrap_socket(connection, server_hostname=server.address)


def _request(server: Server, path: str, body: Mapping[str, object] | None) -> bytes:
    """The bytes of a request, with the server's key if it has one: given an --api-prefix,
    llama-server requires it for /health too. Raises OSError."""
    data = b"" if body is None else json.dumps(body).encode()
    lines = [f"{'POST' if data else 'GET'} {server.prefix}{path} HTTP/1.1"]
    lines += ["Host: localhost", "Connection: close"]
    if token := key(server):
        lines.append(f"Authorization: Bearer {token}")
    if data:
        lines += ["Content-Type: application/json", f"Content-Length: {len(data)}"]
    return "\r\n".join([*lines, "", ""]).encode() + data


class _Answer:
    """The part of an answer that has come. http.client takes a while to load, which a server that
    starts need not wait for."""

    status = 0
    is_over = _has_length = False

    def __init__(self) -> None:
        from httptools import HttpResponseParser

        self._parser, self.blocks = HttpResponseParser(self), list[bytes]()

    def feed(self, block: bytes) -> None:
        """Parse what was received; nothing is the end of the connection. Raises OSError where it
        came too early, HttpParserError or HttpParserUpgrade."""
        if block:
            self._parser.feed_data(block)
        elif self._has_length or self.status < FIRST_FINAL:
            raise OSError("the answer is cut short")
        else:
            self.is_over = True

    def on_header(self, name: bytes, value: bytes) -> None:
        self._has_length |= name.lower() in (b"content-length", b"transfer-encoding")

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self.blocks.append(body)

    def on_message_complete(self) -> None:
        self.is_over = self.status >= FIRST_FINAL


def is_ready(server: Server, timeout: float = 2) -> bool:
    """Whether a server says that its model is loaded. A gateway only has to answer: its /health is
    about the others."""
    with contextlib.suppress(OSError):
        status, _ = ask(server, "/health", timeout=timeout)
        return status == 200 or server.engine == GATEWAY
    return False
