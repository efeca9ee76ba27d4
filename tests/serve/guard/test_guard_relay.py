"""A guarded port: what passes to the server behind it, what does not, and when connections end."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import free_port, wait_for

from pipeline.core.errors import PipelineError
from pipeline.serve.guard import port as guarded
from pipeline.serve.guard import relay
from pipeline.serve.guard.port import GuardedPort
from pipeline.serve.server import Server

pytestmark = pytest.mark.skipif(os.name == "nt", reason="no Unix sockets in asyncio")

MB = 1_000_000
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX-Raw:  kept \r\n\r\nok"
CLOSE = OK.replace(b"\r\nX-Raw", b"\r\nConnection: close\r\nX-Raw")
Script = Callable[[socket.socket], None]


class Behind:
    """A server on the private socket that keeps the bytes of each connection, and does what
    `script` says with it."""

    def __init__(self, path: str) -> None:
        self.received: list[bytes] = []
        self.ended = 0
        self.script: Script = self.answer
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen(4)
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection = self._listener.accept()[0]
                threading.Thread(target=self._serve, args=[connection], daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            self.script(connection)
        self.ended += 1

    def answer(self, connection: socket.socket) -> None:
        """Answer whatever comes, once for each piece, until the other side has sent all."""
        at = len(self.received)
        self.received.append(b"")
        while data := connection.recv(65536):
            self.received[at] += data
            connection.sendall(OK)

    def close(self) -> None:
        self._listener.close()


class Guarded:
    """A guarded port and what is behind it."""

    def __init__(self, folder: Path, **more: object) -> None:
        self.number = free_port()
        self.server = Server(
            name="x",
            executable="llama-server",
            cmd=("--host", "127.0.0.1", "--port", str(self.number)),
            folder=str(folder),
            log_file=str(folder / "log"),
            port=self.number,
            guard=True,
            **more,  # type: ignore[arg-type]
        )
        self.port = GuardedPort(self.server)
        self.behind = Behind(self.port.command()[2])
        self.port.serve()

    def connect(self, seconds: float = 120) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.number), timeout=seconds)

    def ask(self, request: bytes) -> bytes:
        """All that comes back for it until the connection is closed, after the client's end."""
        with self.connect() as connection:
            connection.sendall(request)
            return everything(connection)

    def one(self, request: bytes, answer: bytes = OK) -> None:
        """It is answered with exactly this, and the connection stays."""
        with self.connect() as connection:
            connection.sendall(request)
            assert exactly(connection, len(answer)) == answer


def everything(connection: socket.socket) -> bytes:
    blocks = []
    with contextlib.suppress(ConnectionResetError):
        while block := connection.recv(65536):
            blocks.append(block)
    return b"".join(blocks)


def exactly(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count and (block := connection.recv(count - len(data))):
        data += block
    return data


def head(first: str, *lines: str, host: str = "localhost") -> bytes:
    return "\r\n".join([first, f"Host: {host}", *lines, "", ""]).encode("latin-1")


def why(answer: bytes) -> str:
    """The message of an error."""
    return str(json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"])


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Callable[..., Guarded]]:
    with contextlib.ExitStack() as stack:

        def make(**more: object) -> Guarded:
            one = Guarded(tmp_path, **more)
            stack.callback(one.port.close)
            stack.callback(one.behind.close)
            return one

        yield make


@pytest.fixture
def here(made: Callable[..., Guarded]) -> Guarded:
    return made()


# What does not pass


@pytest.mark.parametrize(
    ("request_", "status", "reason"),
    [
        (head("GET /slots HTTP/1.1", host="evil.example"), 403, "the name evil.example"),
        (
            head(
                "POST /completion HTTP/1.1",
                *("Origin: https://evil.example", "Content-Type: text/plain", "Content-Length: 2"),
            )
            + b"{}",
            403,
            "pages of https://evil.example may not ask this server; add it to the server's origins",
        ),
        (
            head(
                "OPTIONS /completion HTTP/1.1",
                *("Origin: https://evil.example", "Access-Control-Request-Method: POST"),
            ),
            403,
            "evil.example",
        ),
        (
            head("GET /slots HTTP/1.1", "Sec-Fetch-Site: cross-site", "Sec-Fetch-Dest: script"),
            403,
            "pages of null",
        ),
        (
            head(
                "GET / HTTP/1.1",
                "Sec-Fetch-Site: cross-site",
                "Sec-Fetch-Dest: iframe",
                "Referer: https://evil.example/",
            ),
            403,
            "pages of https://evil.example",
        ),
        # what could be read in two ways
        (
            head("POST / HTTP/1.1", "Content-Length: 3", "Transfer-Encoding: chunked"),
            400,
            "Content-Length and Transfer-Encoding",
        ),
        (
            head("POST / HTTP/1.1", "Transfer-Encoding: chunked", "Content-Length: 3"),
            400,
            "Content-Length and Transfer-Encoding",
        ),
        (head("POST / HTTP/1.1", "Content-Length: 3", "Content-Length: 4"), 400, "not valid HTTP"),
        (head("POST / HTTP/1.1", "Content-Length: +3"), 400, "not valid HTTP"),
        (head("POST / HTTP/1.1", "Transfer-Encoding: gzip, chunked"), 400, "chunked alone"),
        (head("POST / HTTP/1.1", "Transfer-Encoding: identity"), 400, "not valid HTTP"),
        (head("POST / HTTP/1.1", "Transfer-Encoding : chunked"), 400, "not valid HTTP"),
        (head("GET / HTTP/1.1", "Host: evil.example"), 400, "more than one Host"),
        (head("GET / HTTP/1.1", "X: a\r\n folded"), 400, "not valid HTTP"),
        (head("GET / HTTP/1.1", "X: a\rb"), 400, "not valid HTTP"),
        (b"GET / HTTP/1.1\nHost: localhost\n\n\r\n\r\n", 400, "not valid HTTP"),
        (b"GET / HTTP/2.0\r\n\r\n", 405, "GET with HTTP 2.0"),
        (head("TRACE / HTTP/1.1"), 405, "TRACE"),
        (head("CONNECT a:1 HTTP/1.1"), 400, "not valid HTTP"),
        # of these llama-server would take the rest for the next request
        (head("GET / HTTP/1.1", *(f"X-{n}: y" for n in range(100))), 431, "too long"),
        (head("GET / HTTP/1.1", f"X: {'y' * 8100}"), 431, "too long"),
        (head(f"GET /{'y' * 8100} HTTP/1.1"), 431, "too long"),
        (b"GET / HTTP/1.1\r\nX: " + b"y" * 70_000, 431, "too long"),
    ],
)
def test_what_is_refused_and_never_reaches_the_server(
    here: Guarded, request_: bytes, status: int, reason: str
) -> None:
    answer = here.ask(request_)
    assert answer.startswith(b"HTTP/1.1 %d " % status), answer
    assert reason in why(answer)
    assert here.behind.received == []


def test_errors_have_the_form_of_the_api(here: Guarded) -> None:
    body = here.ask(head("POST /v1/messages HTTP/1.1", host="evil.example")).split(b"\r\n\r\n")[1]
    told = json.loads(body)
    assert told["type"] == "error" and told["error"]["type"] == "permission_error"
    answer = here.ask(head("HEAD / HTTP/1.1", host="evil.example"))
    assert answer.startswith(b"HTTP/1.1 403") and answer.endswith(b"\r\n\r\n")


def test_a_refused_request_behind_others(here: Guarded) -> None:
    """Only what was allowed has passed, and what follows is not read."""
    first, evil = head("GET /1 HTTP/1.1"), head("GET /2 HTTP/1.1", host="evil.example")
    with here.connect() as connection:
        connection.sendall(first)
        assert exactly(connection, len(OK)) == OK
        connection.sendall(evil + first)
        assert "evil.example" in why(everything(connection))
    assert here.behind.received == [first]
    with here.connect() as connection:
        connection.sendall(first + evil + first)
        assert exactly(connection, len(OK)) == OK
        assert "evil.example" in why(everything(connection))
    assert here.behind.received == [first, first]


@pytest.mark.parametrize(
    "body",
    [
        *(b"x\r\n", b"-1\r\n", b"0x3\r\nabc\r\n", b"1" * 17 + b"\r\n", b"3\nabc\r\n"),
        *(b"3\r\nabcd\r\n0\r\n\r\n", b"3\r\nabc0\r\n\r\n", b"1;" + b"x" * 9000),
    ],
)
def test_broken_chunks_end_the_connection(here: Guarded, body: bytes) -> None:
    request = head("POST / HTTP/1.1", "Transfer-Encoding: chunked")
    with here.connect() as connection:
        connection.sendall(request + body)
        assert b"the chunks of the request are not valid" in everything(connection)


# What passes


@pytest.mark.parametrize(
    "request_",
    [
        head("GET /props?a=%20b HTTP/1.1", "X-Odd-CASE: a:b\xff"),
        head("POST /v1/x HTTP/1.1", "Content-Length: 5") + b"\0\r\n\r\xff",
        head("POST / HTTP/1.1", "Content-Length: 2", "Expect: 100-continue") + b"{}",
        head("POST / HTTP/1.1", "Content-Length: 2", "Origin: http://localhost:3000") + b"{}",
        head("POST / HTTP/1.1", "Content-Length: 0", "Origin: my-client"),
        head("GET / HTTP/1.1", "Sec-Fetch-Site: cross-site", "Sec-Fetch-Dest: document"),
        head(
            "GET /x.png HTTP/1.1",
            "Sec-Fetch-Site: cross-site",
            "Sec-Fetch-Dest: image",
            "Referer: http://localhost:3000/",
        ),
        head("GET / HTTP/1.1", "Sec-Fetch-Site: same-origin", "Sec-Fetch-Dest: script"),
        head(
            "OPTIONS / HTTP/1.1",
            "Origin: http://127.0.0.1:1",
            "Access-Control-Request-Method: POST",
        ),
        b"GET /health HTTP/1.0\r\n\r\n",
        head("DELETE /v1/stream/x HTTP/1.1", host="192.168.1.5:8080"),
    ],
)
def test_what_passes_byte_for_byte(here: Guarded, request_: bytes) -> None:
    here.one(request_)
    assert here.behind.received == [request_]


def test_requests_on_one_connection_in_any_pieces(here: Guarded) -> None:
    post = head("POST / HTTP/1.1", "Content-Length: 3") + b"abc"
    requests = head("GET /1 HTTP/1.1") + post + head("GET /2 HTTP/1.1")
    with here.connect() as connection:
        for at in range(len(requests)):
            connection.sendall(requests[at : at + 1])
            time.sleep(0.0005)
        wait_for(lambda: here.behind.received == [requests])
    with here.connect() as connection:
        connection.sendall(b"\r\n" + requests)
        wait_for(lambda: here.behind.received == [requests, requests])


def test_chunks_are_passed_on_without_extensions_and_trailers(here: Guarded) -> None:
    start = head("POST / HTTP/1.1", "Transfer-Encoding: chunked")
    body = b"3;a=b\r\nabc\r\n0A \r\n0123456789\r\n0\r\nHost: evil.example\r\n\r\n"
    clean = b"3\r\nabc\r\na\r\n0123456789\r\n0\r\n\r\n"
    rest = head("GET /2 HTTP/1.1")
    here.one(start + body + rest)
    with here.connect() as connection:
        for byte in start + body + rest:
            connection.sendall(bytes([byte]))
            time.sleep(0.0005)
        wait_for(lambda: here.behind.received == [start + clean + rest] * 2)


def test_a_request_sent_ahead_waits_until_the_one_before_is_answered(here: Guarded) -> None:
    """llama-server drops what it has read behind a request, so that the middle of the next one
    would be its beginning. An interim answer is none."""
    post = head("POST / HTTP/1.1", "Content-Length: 2", "Expect: 100-continue") + b"{}"
    get, go, seen = head("GET /2 HTTP/1.1"), threading.Event(), list[bytes]()

    def read(connection: socket.socket) -> None:
        assert exactly(connection, len(post)) == post
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        connection.settimeout(0.3)
        with contextlib.suppress(TimeoutError):
            seen.append(connection.recv(65536))
        go.wait(20)
        connection.sendall(OK)
        connection.settimeout(20)
        seen.append(exactly(connection, len(get)))
        connection.sendall(OK)
        assert connection.recv(1) == b"", "the end of the client's requests"

    here.behind.script = read
    with here.connect() as connection:
        connection.sendall(post + get)
        connection.shutdown(socket.SHUT_WR)
        time.sleep(0.5)
        go.set()
        assert everything(connection) == b"HTTP/1.1 100 Continue\r\n\r\n" + OK + OK
    assert seen == [get]


def test_an_offer_to_upgrade_is_left_out(here: Guarded) -> None:
    """As Java's client makes it with every first request; the body is not another protocol."""
    lines = ("Connection: Upgrade, HTTP2-Settings", "HTTP2-Settings: AAEAA", "Content-Length: 2")
    here.one(head("POST / HTTP/1.1", lines[0], "Upgrade: h2c", *lines[1:]) + b"{}")
    assert here.behind.received == [head("POST / HTTP/1.1", *lines) + b"{}"]


def test_a_whole_address_is_asked_for_by_its_path(here: Guarded) -> None:
    """As clients do that take the server for their proxy; the name in it is the one that counts."""
    here.one(head("GET http://127.0.0.1:1/v1/models?a=1 HTTP/1.1", "X: y", host="other"))
    here.one(head("GET HTTP://localhost HTTP/1.1"))
    assert here.behind.received == [
        head("GET /v1/models?a=1 HTTP/1.1", "X: y", host="127.0.0.1:1"),
        head("GET / HTTP/1.1", host="localhost"),
    ]
    assert "evil.example" in why(here.ask(head("GET http://evil.example/ HTTP/1.1")))


def test_pages_and_names_can_be_let_in(made: Callable[..., Guarded]) -> None:
    here = made(origins=("https://chat.example",), hosts=("*.lan",))
    page = "Origin: https://chat.example"
    here.one(head("GET / HTTP/1.1", page, host="gpu-box.lan:8080"))
    here.one(head("GET / HTTP/1.1", "Origin: http://gpu-box.lan:8080", host="gpu-box.lan:8080"))
    assert "evil.example" in why(here.ask(head("GET / HTTP/1.1", host="evil.example")))
    evil = head("GET / HTTP/1.1", "Origin: https://chat.example.evil.example")
    assert "evil.example" in why(here.ask(evil))


def test_the_servers_own_origins_are_let_in() -> None:
    server = Server(
        name="x",
        executable="x",
        cmd=("--cors-origins", "https://a.example"),
        folder="",
        log_file="",
    )
    asked = {"host": "localhost", "origin": "https://a.example"}
    assert guarded.rules(server).refusal("GET", asked) is None
    asked["origin"] = "https://b.example"
    assert guarded.rules(server).refusal("GET", asked)


# Bodies and answers


def test_a_body_of_50_mb_is_taken_as_fast_as_the_server_takes_it(here: Guarded) -> None:
    go, digest, body = threading.Event(), hashlib.sha256(), os.urandom(MB) * 50
    start = head("POST / HTTP/1.1", f"Content-Length: {len(body)}")

    def read(connection: socket.socket) -> None:
        assert exactly(connection, len(start)) == start
        go.wait(20)
        left = len(body)
        while left:
            data = connection.recv(min(left, 1 << 16))
            digest.update(data)
            left -= len(data)
        connection.sendall(OK)

    here.behind.script = read
    with here.connect() as connection:
        connection.sendall(start)
        connection.settimeout(1)
        sent = 0
        with contextlib.suppress(TimeoutError):
            while sent < len(body):
                sent += connection.send(body[sent : sent + MB])
        assert sent < 15 * MB, "the rest waits with the client, not in our memory"
        connection.settimeout(20)
        go.set()
        connection.sendall(body[sent:])
        assert exactly(connection, len(OK)) == OK
    assert digest.digest() == hashlib.sha256(body).digest()


def test_an_answer_of_50_mb_is_given_as_fast_as_the_client_takes_it(here: Guarded) -> None:
    body, sent = os.urandom(MB) * 50, 0
    start = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(body)

    def write(connection: socket.socket) -> None:
        nonlocal sent
        connection.recv(65536)
        connection.sendall(start)
        while sent < len(body):
            sent += connection.send(body[sent : sent + MB])

    here.behind.script = write
    with here.connect() as connection:
        connection.sendall(head("GET / HTTP/1.1"))
        time.sleep(1)
        assert sent < 15 * MB, "the rest waits with the server, not in our memory"
        time.sleep(relay.LINGER_SECONDS)
        assert everything(connection) == start + body


# The ends of connections


def test_a_client_that_leaves_ends_its_request(here: Guarded) -> None:
    def write(connection: socket.socket) -> None:
        connection.recv(65536)
        while True:
            connection.sendall(b"data: x\n\n")
            time.sleep(0.01)

    here.behind.script = write
    with here.connect() as connection:
        connection.sendall(head("GET / HTTP/1.1"))
        assert connection.recv(4) == b"data"
        assert here.behind.ended == 0
    wait_for(lambda: here.behind.ended == 1)


def test_a_server_that_closes_ends_the_connection_after_its_answer(
    here: Guarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay, "LINGER_SECONDS", 60.0)

    def write(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(CLOSE)
        connection.shutdown(socket.SHUT_WR)
        connection.settimeout(0.3)
        with contextlib.suppress(TimeoutError):
            everything(connection)  # as llama-server does, so that its answer is not lost

    here.behind.script = write
    began = time.monotonic()
    request = head("POST / HTTP/1.1", f"Content-Length: {3 * MB}")
    assert here.ask(request) == CLOSE
    assert here.ask(request + b"x" * 3 * MB) == CLOSE, "whatever the client still sends"
    assert time.monotonic() - began < relay.LINGER_SECONDS


def test_a_head_that_does_not_come(
    made: Callable[..., Guarded], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay, "HEAD_SECONDS", 1.0)
    here = made()
    for request in (b"", b"GET / HTTP/1.1\r\nHost: localhost\r\n"):
        assert here.ask(request) == b""

    def write(connection: socket.socket) -> None:
        connection.recv(65536)
        time.sleep(1.5)
        connection.sendall(CLOSE)

    here.behind.script = write
    assert here.ask(head("GET / HTTP/1.1")) == CLOSE, "only heads have a limit, not answers"


def test_1000_idle_connections_are_in_nobodys_way(here: Guarded) -> None:
    idle = []
    try:
        for _ in range(1000):
            idle.append(here.connect())
        here.one(head("GET / HTTP/1.1"))
    finally:
        for connection in idle:
            connection.close()
    assert len(here.behind.received) == 1


def test_200_requests_at_once(here: Guarded) -> None:
    """More than the server takes at once: none is lost."""
    waiting = [here.connect() for _ in range(200)]
    try:
        for connection in waiting:
            connection.sendall(head("GET / HTTP/1.1"))
        for connection in waiting:
            assert exactly(connection, len(OK)) == OK
    finally:
        for connection in waiting:
            connection.close()


# The server behind it


def test_until_the_server_is_up_it_is_loading(here: Guarded) -> None:
    here.port.command()  # another start, of which nothing listens yet
    answer = here.ask(head("GET /health HTTP/1.1"))
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2]) == {
        "error": {"message": "Loading model", "type": "unavailable_error", "code": 503}
    }
    here.behind.close()
    here.behind = Behind(here.port.command()[2])
    here.one(head("GET /health HTTP/1.1"))


def test_a_port_that_is_closed(here: Guarded) -> None:
    folder = here.port.folder
    assert folder and folder.exists()
    with here.connect() as connection:
        connection.sendall(head("GET / HTTP/1.1"))
        assert exactly(connection, len(OK)) == OK
        here.port.close()
        assert everything(connection) == b""
    assert not folder.exists()
    GuardedPort(here.server).close()


def test_a_port_that_is_taken(here: Guarded) -> None:
    with pytest.raises(PipelineError, match=f"port {here.number} on 127.0.0.1 is in use"):
        GuardedPort(here.server)


# The folder of its socket


def test_the_folder_is_private(here: Guarded) -> None:
    assert here.port.folder
    assert here.port.folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("name", ["a,b", "long" * 30])
def test_a_temporary_folder_that_holds_no_socket(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tempfile.TemporaryDirectory() as short:
        (Path(short) / name).mkdir()
        monkeypatch.setattr(tempfile, "tempdir", f"{short}/{name}")
        folder = guarded._private_folder()
        folder.rmdir()
    assert folder.parent == Path("/tmp")


def test_folders_that_were_left_behind_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guarded, "LONGEST", 1000)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    held = guarded._private_folder()
    lock = guarded._lock(held)
    stale, young, others = (tmp_path / f"{guarded.PREFIX}{name:_<8}" for name in ("s", "y", "o"))
    for folder in (stale, young, others):
        folder.mkdir()
        (folder / "1.sock").touch()
    for folder in (held, stale, others):
        os.utime(folder, (1, 1))
    kept = {held, young}
    if os.getuid() == 0:
        os.chown(others, 12345, 12345)
        kept.add(others)
    another = guarded._private_folder()
    os.close(lock)
    assert {*tmp_path.iterdir()} == {*kept, another}
