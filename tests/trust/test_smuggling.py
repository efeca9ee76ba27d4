"""Requests on raw sockets that two readers could take for different ones: at the guard, at the
gateway, and before the real llama-server. What passes is what the client was allowed to send."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h11
import pytest
from conftest import Doit, free_port, wait_for
from figures import Figure
from gateway_tools import Site, site
from serve.guard.test_guard_relay import Guarded, everything, head

from pipeline.serve.guard import request as guard_request

SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n"
BODY = b'{"content": "a"}'
HIDDEN = b'{"content":\r\n\r\n"GET /smuggled HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n"}'
LENGTH = f"Content-Length: {len(BODY)}"
POST = "POST /tokenize HTTP/1.1"
STATUS = re.compile(rb"HTTP/1\.[01] [2-5]\d\d ")  # of an answer that is no interim one
CHUNKED = "Transfer-Encoding: chunked"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


# Each hides a second request in the first for whoever reads it in another way.
ATTACKS: dict[str, bytes] = {
    "CL.TE": head(POST, f"Content-Length: {5 + len(SMUGGLED)}", CHUNKED) + b"0\r\n\r\n" + SMUGGLED,
    "TE.CL": head(POST, CHUNKED, "Content-Length: 4")
    + chunk(SMUGGLED)
    + b"0\r\n\r\n",
    "TE twice": head(POST, CHUNKED, "Transfer-Encoding: identity", LENGTH) + BODY + SMUGGLED,
    "TE in odd spelling": head(POST, "Transfer-Encoding: xchunked", LENGTH) + BODY + SMUGGLED,
    "TE with a tab": head(POST, "Transfer-Encoding:\tchunked", "Content-Length: 4") + chunk(SMUGGLED),
    "TE behind a blank": head(POST, "Transfer-Encoding : chunked", LENGTH) + BODY + SMUGGLED,
    "TE behind a line": head(POST, "X: y\nTransfer-Encoding: chunked", LENGTH) + BODY + SMUGGLED,
    "TE behind a return": head(POST, "X: y\rTransfer-Encoding: chunked", LENGTH) + BODY + SMUGGLED,
    "two lengths": head(POST, "Content-Length: 0", LENGTH) + SMUGGLED[: len(BODY)] + SMUGGLED,
    "a list of lengths": head(POST, "Content-Length: 0, 16") + SMUGGLED,
    "a length with a sign": head(POST, "Content-Length: +0") + SMUGGLED,
    "a length in hex": head(POST, "Content-Length: 0x10") + BODY + SMUGGLED,
    "a length of two words": head(POST, "Content-Length: 0 16") + BODY + SMUGGLED,
    "a length that overflows": head(POST, f"Content-Length: {2**64 + 16}") + BODY + SMUGGLED,
    "a folded line": head(POST, "Content-Length:\r\n 0", "X: y") + SMUGGLED,
    "a folded name": head(POST, "X: y\r\n Content-Length: 3") + SMUGGLED,
    "bare line feeds": b"GET /health HTTP/1.1\nHost: localhost\n\n" + SMUGGLED,
    "a line feed ends the head": b"GET /health HTTP/1.1\r\nHost: localhost\n\n" + SMUGGLED,
    "NUL in a name": head(POST, "Content-\0Length: 3", LENGTH) + BODY + SMUGGLED,
    "NUL in a value": head(POST, "X: a\0b", LENGTH) + BODY + SMUGGLED,
    "NUL in the target": head("GET /health\0/x HTTP/1.1") + SMUGGLED,
    "a chunk's size overflows": head(POST, CHUNKED) + b"1" + b"0" * 16 + b"\r\n" + SMUGGLED,
    "a negative chunk": head(POST, CHUNKED) + b"-1\r\n" + SMUGGLED,
    "a chunk with 0x": head(POST, CHUNKED) + b"0x10\r\n" + BODY + b"\r\n0\r\n\r\n" + SMUGGLED,
    "a chunk that is longer": head(POST, CHUNKED) + b"2\r\n" + BODY + b"\r\n0\r\n\r\n" + SMUGGLED,
    "a chunk ends in a line feed": head(POST, CHUNKED) + b"10\n" + BODY + b"\n0\n\n" + SMUGGLED,
    "an extension over lines": head(POST, CHUNKED) + b"10;a\nb\r\n" + BODY + b"\r\n0\r\n\r\n" + SMUGGLED,
    "chunks in HTTP/1.0": head("POST /tokenize HTTP/1.0", CHUNKED, LENGTH) + BODY + SMUGGLED,
    "HTTP/0.9": b"GET /smuggled\r\n\r\n",
    "no version": b"GET /smuggled HTTP\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + SMUGGLED,
    "another protocol": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 200,
    "two hosts": head("GET /smuggled HTTP/1.1", "Host: evil.example"),
    "another's host": head("GET /smuggled HTTP/1.1", host="evil.example"),
    "a host with a user": head("GET /smuggled HTTP/1.1", host="localhost@evil.example"),
    "a header without a name": head(POST, ": x", LENGTH) + BODY + SMUGGLED,
    "a header without a colon": head(POST, "X", LENGTH) + BODY + SMUGGLED,
    "a huge head": b"GET /smuggled HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 300_000,
    "many headers": head("GET /smuggled HTTP/1.1", *(f"X{n}: y" for n in range(5000))),
    "CONNECT": b"CONNECT evil.example:443 HTTP/1.1\r\nHost: localhost\r\n\r\n" + SMUGGLED,
}
# Odd, and still one request each, or several that are meant: what they are for llama-server.
GOOD: dict[str, tuple[bytes, list[str]]] = {
    "a body": (head(POST, LENGTH) + BODY, ["/tokenize"]),
    "chunks": (head(POST, CHUNKED) + chunk(BODY) + b"0\r\n\r\n", ["/tokenize"]),
    "extensions and trailers": (
        head(POST, CHUNKED) + b"10;a=\"b\"\r\n" + BODY + b"\r\n0;c\r\nHost: evil.example\r\n\r\n",
        ["/tokenize"],
    ),
    "a body that looks like a request": (
        head(POST, f"Content-Length: {len(HIDDEN)}") + HIDDEN,
        ["/tokenize"],
    ),
    "one behind the other": (
        head("GET /health HTTP/1.1") + head(POST, LENGTH) + BODY + head("GET /health HTTP/1.1"),
        ["/health", "/tokenize", "/health"],
    ),
    "an expectation": (head(POST, LENGTH, "Expect: 100-continue") + BODY, ["/tokenize"]),
    "an offer to upgrade": (
        head(POST, LENGTH, "Connection: Upgrade", "Upgrade: h2c") + BODY,
        ["/tokenize"],
    ),
    "HTTP/1.0": (b"GET /health HTTP/1.0\r\n\r\n", ["/health"]),
    "a host with a port": (head("GET /health HTTP/1.1", host="localhost:1"), ["/health"]),
    "a path with dots": (head("GET /x/../health HTTP/1.1"), ["/x/../health"]),
}


def close_to_end(connection: socket.socket, data: bytes) -> bytes:
    """All that comes back for these bytes, after which the client has no more to say."""
    with contextlib.suppress(OSError):
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
    return everything(connection)


def requests_in(data: bytes) -> list[str]:
    """The targets of the requests in these bytes, as h11 reads them; nothing may be left."""
    targets = []
    while data:
        parser = h11.Connection(h11.SERVER)
        parser.receive_data(data)
        parser.receive_data(b"")
        request = parser.next_event()
        assert isinstance(request, h11.Request), data
        targets.append(request.target.decode("latin-1"))
        while not isinstance(event := parser.next_event(), h11.EndOfMessage):
            assert isinstance(event, h11.Data), "an incomplete request"
        data = parser.trailing_data[0]
    return targets


# The guard

unix = pytest.mark.skipif(os.name == "nt", reason="no guard there")


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Guarded]:
    made = Guarded(tmp_path)
    yield made
    made.port.close()
    made.behind.close()


def through_guard(guarded: Guarded, request: bytes) -> bytes:
    """What the server behind gets of it."""
    before = len(guarded.behind.received)
    with guarded.connect(20) as connection:
        close_to_end(connection, request)
    return b"".join(guarded.behind.received[before:])


def is_incomplete(data: bytes) -> bool:
    """Whether the last request in these bytes has no end: nobody can take what follows for more."""
    try:
        requests_in(data)
    except (AssertionError, h11.RemoteProtocolError):
        return True
    return False


@unix
@pytest.mark.parametrize("name", ATTACKS)
def test_nothing_is_smuggled_past_the_guard(guarded: Guarded, name: str) -> None:
    got = through_guard(guarded, ATTACKS[name])
    assert b"/smuggled" not in got or is_incomplete(got)


@unix
@pytest.mark.parametrize("name", GOOD)
def test_what_the_guard_passes_on_is_what_was_sent(guarded: Guarded, name: str) -> None:
    request, targets = GOOD[name]
    got = through_guard(guarded, request)
    if b"HTTP/1.0" not in got:
        assert requests_in(got) == targets


@unix
def test_a_guard_that_lets_two_lengths_pass_is_noticed(
    guarded: Guarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the tests above would show nothing."""
    lenient = guard_request.RequestHead

    def read_head(data: bytes) -> guard_request.RequestHead:
        return lenient("POST", "/", {"content-length": "0"}, data)

    monkeypatch.setattr("pipeline.serve.guard.relay.read_head", read_head)
    got = through_guard(guarded, ATTACKS["CL.TE"])
    assert b"/smuggled" in got


# The gateway


class Upstream:
    """A llama-server's port that keeps the bytes of each connection, and answers each."""

    def __init__(self, port: int) -> None:
        self.received: list[bytes] = []
        self._listener = socket.create_server(("127.0.0.1", port), backlog=64)
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection = self._listener.accept()[0]
                threading.Thread(target=self._serve, args=[connection], daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        at = len(self.received)
        self.received.append(b"")
        with connection, contextlib.suppress(OSError):
            connection.settimeout(0.3)
            with contextlib.suppress(TimeoutError):
                while data := connection.recv(65536):
                    self.received[at] += data
                    if self._is_whole(self.received[at]):
                        break
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

    def _is_whole(self, data: bytes) -> bool:
        with contextlib.suppress(AssertionError, h11.RemoteProtocolError):
            return bool(requests_in(data))
        return False

    def close(self) -> None:
        self._listener.close()


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Site, Upstream]]:
    with site(tmp_path_factory.mktemp("smuggling")) as here:
        added = here.add("chat")
        upstream = Upstream(added.port)
        here.gateway()
        yield here, upstream
        upstream.close()


def answers(port: int, request: bytes, count: int = 0, seconds: float = 30) -> bytes:
    """What comes back: so many answers, or else all that come in this time."""
    answer = b""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        with contextlib.suppress(OSError):
            connection.sendall(request)
            connection.settimeout(seconds)
            while not count or len(STATUS.findall(answer)) < count:
                block = connection.recv(65536)
                if not block:
                    break
                answer += block
    return answer


def received(upstream: Upstream, after: int) -> list[bytes]:
    """What the server got since then, each on a connection of its own, less the gateway's own."""
    return [each for each in upstream.received[after:] if not each.startswith(b"GET /metrics")]


def test_nothing_is_smuggled_past_the_gateway(gateway: tuple[Site, Upstream]) -> None:
    here, upstream = gateway
    before = len(upstream.received)
    with ThreadPoolExecutor(len(ATTACKS)) as pool:  # most are waited for: the rest should come
        got = dict(zip(ATTACKS, pool.map(lambda x: answers(here.port, x, 0, 2), ATTACKS.values())))
    assert {name for name in got if b" 500 " in got[name]} == set()
    assert "Traceback" not in here.output()
    for connection in received(upstream, before):
        assert len(requests_in(connection)) == 1
        assert b"/smuggled" not in connection


@pytest.mark.parametrize("name", GOOD)
def test_what_the_gateway_passes_on_is_what_was_sent(
    gateway: tuple[Site, Upstream], name: str
) -> None:
    here, upstream = gateway
    request, targets = GOOD[name]
    before = len(upstream.received)
    assert len(STATUS.findall(answers(here.port, request, len(targets)))) == len(targets)
    got, forwarded = received(upstream, before), [x for x in targets if x == "/tokenize"]
    assert [requests_in(each) for each in got] == [[target] for target in forwarded]
    for each in got:
        assert each.partition(b"\r\n\r\n")[2] in (BODY, HIDDEN)


# Slow clients


@pytest.mark.trust
def test_slow_clients_take_no_other_clients_place(gateway: tuple[Site, Upstream]) -> None:
    """200 connections that send a byte now and then are closed in time, and cost others nothing."""
    here, _ = gateway
    slow = [socket.create_connection(("127.0.0.1", here.port), timeout=60) for _ in range(200)]
    try:
        for number, each in enumerate(slow):
            each.sendall(b"GET /h" if number % 2 else head(POST, LENGTH) + b"{")
        began = time.monotonic()
        while time.monotonic() - began < 25:
            assert here.get("/health").status_code == 200
            for each in slow[1::2]:
                with contextlib.suppress(OSError):
                    each.send(b"x")
            time.sleep(1)
        answers = [everything(each) for each in slow]
        assert all(b" 408 " in answer for answer in answers[::2])
        assert all(b"200 OK" not in answer for answer in answers)
    finally:
        for each in slow:
            each.close()


# The real llama-server


@pytest.fixture(scope="module")
def real(
    built: Path, gguf: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[], list[str]]]:
    """A guarded llama-server; the function returns the paths that it was asked for, of its log."""
    from conftest import with_programs

    doit = with_programs(built, tmp_path_factory.mktemp("smuggled") / "hôme")
    with doit.serving(f"gguf_path={gguf}") as url:
        log = Path(doit.summary["log"])

        def paths() -> list[str]:
            lines = log.read_text("utf-8", "replace").splitlines()
            return [line.split("done request: ")[1].split()[1] for line in lines if "done request: " in line]

        paths.port = int(url.rpartition(":")[2])  # type: ignore[attr-defined]
        yield paths


_ = (json, Doit, free_port, wait_for, Figure)
