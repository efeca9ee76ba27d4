"""Whether a port is free, and whether the server on it is ready."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.core.errors import PipelineError, UsageError

from .keys import keys_of
from .server import GATEWAY, Server

if TYPE_CHECKING:
    import http.client

BACKLOG = 1024  # connections that wait to be taken


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
    also where a step of the exchange takes longer than `timeout` seconds."""
    from http.client import HTTPException  # slow to load, and not needed to plan a server

    headers = {"Content-Type": "application/json"}
    if token := key(server):
        headers["Authorization"] = f"Bearer {token}"
    connection = _connection(server, timeout)
    try:
        data = None if body is None else json.dumps(body)
        connection.request("POST" if data else "GET", server.prefix + path, data, headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode("utf-8", "replace")
    except (HTTPException, ValueError) as error:
        raise OSError(str(error)) from None
    finally:
        connection.close()


def _connection(server: Server, timeout: float) -> http.client.HTTPConnection:
    import http.client
    import ssl

    if not server.tls:
        return http.client.HTTPConnection(server.address, server.port, timeout=timeout)
    # On this machine, with a certificate that names it as others see it.
    context = ssl._create_unverified_context()  # noqa: S323
    return http.client.HTTPSConnection(
        server.address, server.port, timeout=timeout, context=context
    )


def is_ready(server: Server, timeout: float = 2) -> bool:
    """Whether a server answers that its model is loaded. A gateway is ready once it answers at all:
    its /health is about the others."""
    with contextlib.suppress(OSError):
        # with the key: given an --api-prefix, llama-server requires it here too
        status, _ = ask(server, "/health", timeout=timeout)
        return status == 200 or server.engine == GATEWAY
    return False
