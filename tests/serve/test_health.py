"""Ports that are taken, and servers that answer this and that."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import REPOSITORY, free_port
from supervisor_tools import stand_in

from pipeline.core.errors import PipelineError, UsageError
from pipeline.serve import health

LISTEN = """
import socket, sys
listener = socket.create_server((sys.argv[1], 0))
print(listener.getsockname()[1], flush=True)
sys.stdin.read()
"""


@contextmanager
def listener(host: str = "127.0.0.1") -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Another process that listens, and its port."""
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", LISTEN, host]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, int(process.stdout.readline())
        finally:
            process.kill()


def test_a_port_in_use_names_its_holder() -> None:
    with listener() as (process, port):
        for host in ("127.0.0.1", "0.0.0.0", "localhost"):
            with pytest.raises(PipelineError) as caught:
                health.require_free(host, port)
            assert f"port {port} on {host} is in use" in str(caught.value)
            if sys.platform != "darwin":  # which tells only root
                assert f"(pid {process.pid})" in str(caught.value)
            assert "port=" in caught.value.hint
    health.require_free("127.0.0.1", port)


def test_a_port_held_for_all_addresses_is_in_use_on_each() -> None:
    with listener("0.0.0.0") as (_, port), pytest.raises(PipelineError, match="is in use"):
        health.require_free("127.0.0.1", port)


def test_a_free_port_stays_free() -> None:
    port = free_port()
    for host in ("127.0.0.1", "0.0.0.0", "localhost"):
        health.require_free(host, port)
    with socket.create_server(("127.0.0.1", port)):
        pass


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
def test_ipv6() -> None:
    try:
        held = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("no IPv6 here")
    with held, pytest.raises(PipelineError, match="is in use"):
        health.require_free("::1", held.getsockname()[1])


@pytest.mark.parametrize("host", ["no host", "1.2.3.4.5 6", "a..b", "x" * 64, "::g"], ids=repr)
def test_a_host_that_is_no_address(host: str) -> None:
    with pytest.raises(UsageError, match="is not an address"):
        health.require_free(host, 8080)


def test_an_address_of_another_machine() -> None:
    with pytest.raises(PipelineError, match="cannot be used") as caught:
        health.require_free("192.0.2.1", 8080)  # RFC 5737: nobody has it
    assert "address of this machine" in caught.value.hint


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="all ports may be used")
def test_a_port_that_needs_rights() -> None:
    with pytest.raises(PipelineError, match="rights of their own"):
        health.require_free("127.0.0.1", 81)


@contextmanager
def answering(reply: bytes) -> Iterator[int]:
    """A server that sends these bytes to whoever connects, and hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(reply)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            thread.join()


def is_ready(port: int) -> bool:
    return health.is_ready(stand_in(Path(), "a", port=port))


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"


@pytest.mark.parametrize(
    ("reply", "ready"),
    [
        (OK, True),
        (b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n{"status":"ok"}', True),
        (b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n", False),
        (b"HTTP/1.1 401 Unauthorized\r\n\r\n", False),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + OK, True),
        (b"HTTP/1.1 100 Continue\r\n\r\n", False),
        (b"HTTP/1.1 101 Switching\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n", False),
        (b"HTTP/1.1 302 Found\r\nLocation: /health\r\n\r\n", False),
        (b"", False),
        (b"SSH-2.0-OpenSSH_9.6\r\n", False),
        (b"HTTP/1.1 twohundred OK\r\n\r\n", False),
        (b"HTTP/1.1 200", False),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\ncut", False),
        (b"\xff\xfe\x00" * 1000, False),
        (b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 1000, False),
        (b"HTTP/1.1 200 OK\r\na: " + b"b" * 100_000, False),
        (b"x" * 100_000, False),
    ],
    ids=lambda value: str(value)[:40],
)
def test_only_a_200_is_ready(reply: bytes, ready: bool) -> None:
    with answering(reply) as port:
        assert is_ready(port) is ready


def test_to_ask_it_loads_no_client() -> None:
    """A server that starts would wait for it."""
    code = (
        "import sys; from pathlib import Path; from pipeline.serve import health, server; "
        "one = server.Server(name='a', executable='', cmd=(), folder='', log_file='', "
        "port=int(sys.argv[1])); assert health.is_ready(one); print(*sys.modules)"
    )
    with answering(OK) as port:
        words = [sys.executable, "-c", code, str(port)]
        done = subprocess.run(words, cwd=REPOSITORY, check=True, capture_output=True, text=True)
    assert "socket" in done.stdout.split()
    assert {"asyncio", "email", "http.client", "ssl"}.isdisjoint(done.stdout.split())


def test_no_answer_is_not_ready() -> None:
    assert not is_ready(free_port())
    assert not health.is_ready(stand_in(Path(), "a", host="a" * 64)), "is not the name of a host"


def test_a_server_that_accepts_and_stays_silent_is_not_ready() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert not is_ready(server.getsockname()[1])
