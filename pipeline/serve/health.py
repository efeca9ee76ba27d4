"""Whether a port is free, and whether a server on it is ready."""

from __future__ import annotations

import errno
import os
import socket
from typing import TYPE_CHECKING

from pipeline.core.errors import PipelineError, UsageError

if TYPE_CHECKING:
    import http.client

BACKLOG = 1024  # connections that wait to be taken


def require_free(host: str, port: int) -> None:
    """Raise PipelineError where `host`:`port` cannot be listened on, with who holds it."""
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


def connection(
    host: str, port: int, *, tls: bool = False, timeout: float = 2
) -> http.client.HTTPConnection:
    """To one of our own servers; `timeout` in seconds, for each step of an exchange."""
    import http.client  # slow to load, and not needed to plan a server
    import ssl

    if not tls:
        return http.client.HTTPConnection(host, port, timeout=timeout)
    # On this machine, with a certificate that names it as others see it.
    context = ssl._create_unverified_context()  # noqa: S323
    return http.client.HTTPSConnection(host, port, timeout=timeout, context=context)


def is_ready(
    host: str, port: int, path: str = "/health", *, tls: bool = False, timeout: float = 2
) -> bool:
    """Whether the server answers that its model is loaded."""
    from http.client import HTTPException

    server = connection(host, port, tls=tls, timeout=timeout)
    try:
        server.request("GET", path)
        return server.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        server.close()


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
