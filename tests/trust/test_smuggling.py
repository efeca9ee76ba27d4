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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h11
import pytest
from conftest import with_programs
from gateway_tools import Site, site
from serve.guard.test_guard_relay import Guarded, everything, head
from smuggled_requests import ATTACKS, BODY, GOOD, HIDDEN, LENGTH, POST, SMUGGLED

from pipeline.serve.gateway.request_body import parse_body
from pipeline.serve.guard import request as guard_request
from pipeline.serve.guard.refusal import Refused

ENDS = (b"}", b"}\r\n0\r\n\r\n")  # of a document
STATUS = re.compile(rb"HTTP/1\.[01] [2-5]\d\d ")  # of an answer that is no interim one


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
    assert is_incomplete(got) or "/smuggled" not in requests_in(got)


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
    assert b"/smuggled" in got and not is_incomplete(got[got.index(b"GET") :])


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
    """What comes back: so many answers, or else all that come in this time. All are documents."""
    answer = b""
    connection = socket.create_connection(("127.0.0.1", port), timeout=30)
    with connection, contextlib.suppress(OSError):
        connection.sendall(request)
        connection.settimeout(seconds)
        while not (count and len(STATUS.findall(answer)) >= count and answer.endswith(ENDS)):
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
        got = dict(
            zip(
                ATTACKS,
                pool.map(lambda attack: answers(here.port, attack, 0, 2), ATTACKS.values()),
                strict=True,
            )
        )
    assert {name for name in got if b" 500 " in got[name]} == set()
    assert "Traceback" not in here.output()
    for connection in received(upstream, before):
        assert requests_in(connection) in (["/tokenize"], ["/completion"])


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
) -> Iterator[tuple[int, int]]:
    """The ports of a guarded llama-server, and of a gateway before it."""
    folder = tmp_path_factory.mktemp("smuggled")
    doit = with_programs(built, folder / "hôme")
    with doit.serving(f"gguf_path={gguf}") as url, site(folder) as here:
        port = int(url.rpartition(":")[2])
        here.add("chat")
        here.change("chat", port=port)
        here.gateway()
        yield port, here.port


def tokens(port: int, body: bytes) -> list[int] | None:
    """What llama-server makes of a body; None where it refuses it."""
    request = head(POST, f"Content-Length: {len(body)}", "Connection: close") + body
    answer = answers(port, request, 1)
    return json.loads(document(answer))["tokens"] if b" 200 " in answer[:20] else None


def document(answer: bytes) -> bytes:
    """The body of an answer, which the gateway's own may send in a chunk."""
    return answer[answer.index(b"{") : answer.rindex(b"}") + 1]


@pytest.mark.build
@unix
def test_llama_server_reads_what_passes_as_it_was_sent(real: tuple[int, int]) -> None:
    """It answers each request once, with the tokens of its body."""
    server, gateway = real
    for request, targets in GOOD.values():
        body = HIDDEN if HIDDEN in request else BODY
        for port in (server, gateway):
            answer = answers(port, request, len(targets))
            assert len(STATUS.findall(answer)) == len(targets)
            if targets == ["/tokenize"]:
                expected = tokens(server, body)
                assert expected and json.loads(document(answer))["tokens"] == expected


@pytest.mark.build
@unix
def test_nothing_is_smuggled_to_llama_server(real: tuple[int, int]) -> None:
    """It would answer what is hidden as what it does not have."""
    for port in real:
        with ThreadPoolExecutor(len(ATTACKS)) as pool:
            got = pool.map(lambda attack, port=port: answers(port, attack, 0, 2), ATTACKS.values())
        odd = [name for name, x in zip(ATTACKS, got, strict=True) if b"File Not Found" in x]
        assert odd == []
        assert tokens(port, BODY)
    assert b"File Not Found" in answers(real[0], SMUGGLED, 1)


# `K` is the key, `E` the same with an escape in it.
DOCUMENTS = (
    *(b'{"K": "a", "K": "b"}', b'{"K": "a", "E": "b"}', b'{"E": "b", "K": "a"}', b'{"E": "b"}'),
    *(b'{"K": "b", "k": "a"}', b'{"x": {"K": "a"}, "K": "b"}', b'{"K": "\\ud83d\\ude00"}'),
    *(
        b'{"K": "b"}\0{"K": "a"}',
        b'{"K": "b"} {"K": "a"}',
        b'\xef\xbb\xbf{"K": "b"}',
        b'{"K": "b",}',
    ),
    *(
        b'{"K": "a\xff"}',
        b'{"\xff": 1, "K": "b"}',
        b'{"K": "b", "x": 1e999}',
        b'{"K": "b", "x": 01}',
    ),
    *(
        b'{"K": "b", "x": "\t"}',
        b'{"K": "b", /* */ "x": 1}',
        b'{"K": "b", "x": NaN}',
        b'\n{"K":"b"}',
    ),
    *(b'{"K": "b", "x": ' + b"[" * n + b"]" * n + b"}" for n in (100, 3000)),
    *(b'{"K": "b", "x": ' + b"9" * 400 + b"}", b'{"K": null, "K": "b"}', b'{"K": "\\u0062"}'),
)


@pytest.mark.build
@unix
def test_a_body_says_the_same_to_llama_server(real: tuple[int, int]) -> None:
    """What the gateway takes for the model is what llama-server takes for the value of the key."""
    both = 0
    for document in DOCUMENTS:
        own = document.replace(b"K", b"model").replace(b"E", b"mod\\u0065l")
        its = document.replace(b"K", b"content").replace(b"E", b"cont\\u0065nt")
        try:
            model = parse_body("application/json", own).model
        except Refused:
            continue  # nor does llama-server see it
        if (read := tokens(real[0], its)) is not None:
            assert read == tokens(real[0], json.dumps({"content": model}).encode()), document
            both += 1
    assert both >= 8
