"""A server that means harm: endless answers, bombs, a byte now and then, words for the terminal.

An attack answers one request with what it writes to the connection. Those in `ON_CLIENTS` work on
any client of HTTP; those in `ON_HUB` are documents in the place of the hub's list of a repository.
`Server` counts the bytes that it could send, which is how far its client followed.
"""

import json
import socketserver
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
BLOCK = 1024 * 1024  # bytes
PAUSE = 0.05  # seconds between two bytes: the client sees no difference to a second
COMMIT = "0123456789abcdef0123456789abcdef01234567"
# What a terminal obeys, or shows in another order, and what is left of it.
CONTROL = "\x1b[2J\x1b]0;owned\x07\x9b31m\r\x08\u202e\u2066\u2028"


@dataclass
class Call:
    """One request, and the connection that it came on."""

    method: str
    path: str
    send: Callable[[bytes], object]
    url: str  # of the server


Attack = Callable[[Call], None]


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def document(call: Call, body: bytes, status: str = "200 OK") -> None:
    call.send(
        b"HTTP/1.1 %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        % (status.encode(), len(body))
    )
    call.send(body)


def forever(call: Call, data: bytes, pause: float = 0) -> None:
    while True:
        call.send(data)
        time.sleep(pause)


# On any client


def endless_body(call: Call) -> None:
    call.send(CHUNKED)
    forever(call, chunk(b" " * BLOCK))


def endless_without_length(call: Call) -> None:
    call.send(HEAD + b"Connection: close\r\n\r\n")
    forever(call, b" " * BLOCK)


def endless_small_chunks(call: Call) -> None:
    call.send(CHUNKED)
    forever(call, chunk(b" ") * 10_000)


@cache
def gzipped() -> tuple[bytes, bytes]:
    """The beginning of a file, and 16 MiB of blanks in it that may follow again and again."""
    packer = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS | 16)
    start = packer.compress(b" ") + packer.flush(zlib.Z_FULL_FLUSH)
    return start, packer.compress(b" " * 16 * BLOCK) + packer.flush(zlib.Z_FULL_FLUSH)


def gzip_bomb(call: Call) -> None:
    start, blanks = gzipped()
    call.send(HEAD + b"Content-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n")
    call.send(chunk(start))
    forever(call, chunk(blanks))


def drip_body(call: Call) -> None:
    call.send(HEAD + b"Content-Length: 1000000\r\n\r\n")
    forever(call, b" ", PAUSE)


def drip_headers(call: Call) -> None:
    call.send(HEAD + b"X-Header: ")
    forever(call, b"x", PAUSE)


def endless_interim(call: Call) -> None:
    forever(call, b"HTTP/1.1 100 Continue\r\n\r\n" * 1000)


def endless_header(call: Call) -> None:
    call.send(HEAD + b"X-Header: ")
    forever(call, b"x" * BLOCK)


def endless_redirect(call: Call) -> None:
    call.send(b"HTTP/1.1 302 Found\r\nTransfer-Encoding: chunked\r\n")
    call.send(b"Location: %b/again\r\n\r\n" % call.url.encode())
    forever(call, chunk(b" " * BLOCK))


def endless_error(call: Call) -> None:
    call.send(b"HTTP/1.1 500 \x1b[2J\r\nX-Error-Message: \x1b[2J\r\n")
    call.send(b"Transfer-Encoding: chunked\r\n\r\n")
    forever(call, chunk(b"x" * BLOCK))


def length_lies(call: Call) -> None:
    call.send(HEAD + b"Content-Length: 999999999999999\r\n\r\n{}")


def no_http(call: Call) -> None:
    forever(call, b"\x1b[2J" * BLOCK)


ON_CLIENTS: dict[str, Attack] = {
    attack.__name__: attack
    for attack in (
        *(endless_body, endless_without_length, endless_small_chunks, gzip_bomb, drip_body),
        *(drip_headers, endless_interim, endless_header, endless_redirect, endless_error),
        *(length_lies, no_http),
    )
}


# In the place of the hub's list


def listing(**changes: Any) -> dict[str, Any]:
    """A list that a client takes, but for the changes."""
    sibling = {
        "rfilename": "m-Q4_K_M.gguf",
        "size": 4096,
        "blobId": COMMIT,
        "lfs": {"sha256": "ab" * 32, "size": 4096, "pointerSize": 128},
    }
    return {"id": "org/model", "sha": COMMIT, "siblings": [sibling]} | changes


class Document:
    """An attack that is a document in the place of the list. What it says of a file is not found.

    It is made before the server starts: a client must not give up meanwhile.
    """

    def __init__(self, make: Callable[[], bytes]) -> None:
        self.body = cache(make)

    def __call__(self, call: Call) -> None:
        if call.path.startswith("/api/models/"):
            document(call, self.body())
        else:
            document(call, b"{}", "404 Not Found")


def said(**changes: Any) -> Document:
    return Document(lambda: json.dumps(listing(**changes)).encode())


def raw(field: Callable[[], str]) -> Document:
    """A list with one field as it is written here."""
    return Document(lambda: json.dumps(listing()).encode()[:-1] + b", " + field().encode() + b"}")


def files(count: int) -> Document:
    names = (f'{{"rfilename":"{n:x}"}}' for n in range(count))
    return raw(lambda: f'"siblings": [{",".join(names)}]')


def waits_a_year(call: Call) -> None:
    """For the list, and then for whoever asks for the file."""
    if call.path.startswith("/api/models/"):
        document(call, json.dumps(listing(gated="auto")).encode())
    else:
        call.send(b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 31536000\r\n")
        call.send(b"Content-Length: 0\r\n\r\n")


def at(location: str) -> Attack:
    """The file is where nobody may be led. What is asked there is answered with zeros."""

    def attack(call: Call) -> None:
        if call.path.startswith("/api/models/"):
            document(call, json.dumps(listing()).encode())
            return
        head = f"HTTP/1.1 302 Found\r\nLocation: {location}\r\nContent-Length: 0\r\n"
        head += (
            f'X-Repo-Commit: {COMMIT}\r\nX-Linked-Size: 4096\r\nX-Linked-Etag: "{"ab" * 32}"\r\n'
        )
        call.send(head.encode("latin-1") + b"\r\n")

    return attack


def after_the_list(then: Attack) -> Attack:
    """An honest list, and another attack by the file itself."""

    def attack(call: Call) -> None:
        if call.path.startswith("/api/models/"):
            document(call, json.dumps(listing()).encode())
        elif call.method == "HEAD":
            head = f'HTTP/1.1 200 OK\r\nETag: "{"ab" * 32}"\r\nContent-Length: 4096\r\n'
            call.send(f"{head}X-Repo-Commit: {COMMIT}\r\n\r\n".encode())
        else:
            then(call)

    return attack


def named(name: str) -> Document:
    sibling = listing()["siblings"][0]
    return said(siblings=[sibling | {"rfilename": name}])


ON_HUB: dict[str, Attack] = {
    "million_files": files(1_000_000),
    "many_files": files(600_000),
    "deep_list": raw(lambda: '"siblings": ' + "[" * 1_000_000),
    "deep_elsewhere": raw(lambda: '"cardData": ' + '{"a":' * 1_000_000),
    "deep_value": raw(lambda: '"gated": ' + "[" * 1_000_000),
    "long_number": raw(lambda: '"gated": ' + "9" * 1_000_000),
    "long_name": named("x" * 10_000_000 + ".gguf"),
    "commit_is_a_path": said(sha="../../../../etc"),
    "commit_is_short": said(sha=COMMIT[:39]),
    "commit_is_no_hex": said(sha="x" * 40),
    "commit_has_an_end": said(sha=f"{COMMIT}\n"),
    "commit_is_none": said(sha=None),
    "name_is_a_path": said(id="../../etc"),
    "name_controls": said(id=f"org/{CONTROL}"),
    "file_controls": named(f"m-{CONTROL}Q4_K_M.gguf"),
    "file_is_a_path": named("../../m-Q4_K_M.gguf"),
    "files_control": said(siblings=[{"rfilename": f"{n}{CONTROL}.bin"} for n in range(9)]),
    "no_object": Document(lambda: b"[1, 2]"),
    "no_utf8": Document(lambda: b'{"id": "org/\xff\xfe"}'),
    "waits_a_year": waits_a_year,
    "at_no_address": at("http://[/x"),
    "at_a_path": at("file:///etc/passwd"),
    "at_a_terminal": at("http://127.0.0.1:1/\x1b[2J"),
    "at_no_port": at("http://127.0.0.1:99999999/x"),
    **{f"file_{name}": after_the_list(attack) for name, attack in ON_CLIENTS.items()},
}


# The server


@dataclass
class Running:
    """A server under way: `attack` may be changed, `sent` counts bytes."""

    url: str
    attack: Attack
    sent: int = 0
    paths: list[str] = field(default_factory=list)


@contextmanager
def start(attack: Attack) -> Iterator[Running]:
    """A server on a port of its own, for the length of a `with`."""
    over = threading.Event()
    if isinstance(attack, Document):
        attack.body()

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while line := self.rfile.readline(10_000):
                method, path = line.decode("latin-1").split(" ")[:2]
                length = 0
                while header := self.rfile.readline(10_000).strip().lower():
                    if header.startswith(b"content-length:"):
                        length = int(header.partition(b":")[2])
                self.rfile.read(length)
                running.paths.append(path)
                with suppress(OSError):
                    running.attack(Call(method, path, self.send, running.url))
                    continue
                return

        def send(self, data: bytes) -> None:
            if over.is_set():
                raise OSError("the test is over")
            self.connection.settimeout(20)  # a client that reads no more ends the attack
            self.connection.sendall(data)
            running.sent += len(data)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads, server.block_on_close = True, False
        running = Running(f"http://127.0.0.1:{server.server_address[1]}", attack)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield running
        finally:
            over.set()
            server.shutdown()
