"""One request to one server, with its key: keys are read from files, compared in constant time,
never shown. What servers say of themselves."""

from __future__ import annotations

import asyncio
import hmac
import ssl
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import anyio
import httptools
import msgspec
from msgspec import Struct
from starlette.requests import Request

from pipeline.core.text import size
from pipeline.serve.guard.refusal import Refused
from pipeline.serve.guard.relay import connect
from pipeline.serve.guard.request import MAX_HEADERS, MAX_LINE
from pipeline.serve.health import FIRST_FINAL, MOST_BYTES
from pipeline.serve.keys import keys_of
from pipeline.serve.server import LLAMA_CPP
from pipeline.serve.supervisor.state import Stamp, stamp

from .request_body import RequestBody
from .servers import Target, Targets, View

CONNECT_SECONDS = 5.0
ASK_SECONDS = 2.0  # for a server to answer a question of ours
# Bytes of an answer that are held until it is passed on. The longest are embeddings: those of a
# request of 100 MB may take twice as much.
MOST_HELD = 256 * 1024 * 1024

# Headers of one connection only (RFC 9110), and those that the gateway sets itself.
HOP_BY_HOP = {
    *(b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization"),
    *(b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade"),
}
NOT_FORWARDED = HOP_BY_HOP | {
    *(b"host", b"content-length", b"expect", b"origin", b"authorization", b"x-api-key"),
    # Of other programs: a browser sends those of all ports, and llama-server refuses long ones.
    b"cookie",
    # With it llama-server goes on after the client left, and keeps the rest for it.
    b"x-conversation-id",
}
NOT_RETURNED = HOP_BY_HOP | {b"server", b"date"}
EVENTS = "text/event-stream"
# nginx collects an answer before it passes it on, but for one that says so.
UNBUFFERED = (b"x-accel-buffering", b"no")
LENGTHS = (b"content-length", b"transfer-encoding")
OWN_HEADERS = 3  # that each request to a server has besides: host, connection, content-length
PATH_SAFE = "/:@!$&'()*+,;=~"


@cache
def tls() -> ssl.SSLContext:
    """For our own servers, whose certificates are for the names that others use."""
    return ssl._create_unverified_context()  # noqa: S323


class Keys:
    """The keys of files, read again when a file changes."""

    def __init__(self) -> None:
        self._cache: dict[str, tuple[Stamp, tuple[str, ...]]] = {}

    def of(self, file: str) -> tuple[str, ...]:
        """The keys in `file`; none where it cannot be read."""
        current = stamp(Path(file))
        cached = self._cache.get(file)
        if cached is None or cached[0] != current:
            try:
                cached = current, keys_of(Path(file))
            except OSError:
                cached = current, ()
            self._cache[file] = cached
        return cached[1]

    def allow(self, file: str, headers: Mapping[str, str]) -> bool:
        """Whether a request with `headers` carries a key of `file`."""
        scheme, _, token = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            token = headers.get("x-api-key", "")
        sent = token.strip().encode("latin-1", "replace")  # the bytes as sent: servers decode so
        matches = [hmac.compare_digest(sent, key.encode()) for key in self.of(file)]
        return any(matches)


def credentials(target: Target, keys: Keys) -> list[tuple[bytes, bytes]]:
    """The headers that a server requires of each request."""
    return [*target.headers] or authorization(target.instance.api_key_file, keys)


def authorization(key_file: str | None, keys: Keys) -> list[tuple[bytes, bytes]]:
    """The header for a server that requires a key."""
    accepted = keys.of(key_file) if key_file else ()
    return [(b"authorization", b"Bearer " + accepted[0].encode())] if accepted else []


class NoAnswer(Exception):
    """Not a byte of an answer came, so another server may be tried. `sent`: the server may have
    worked on the request; `loads`: it is still loading its model."""

    def __init__(self, reason: str, *, sent: bool = False, loads: bool = False) -> None:
        super().__init__(reason)
        self.sent = sent
        self.loads = loads


class Answer(asyncio.Protocol):
    """A server's answer to one request, on a connection of its own: llama-server keeps a thread for
    each open one, and a request that reuses one just as it is closed would be lost.

    Until `pass_to` blocks of the body are kept; from then on each is written to the client as it
    comes, from one socket to the other with no task between.
    """

    def __init__(self, request: Sequence[bytes], *, is_head: bool, most: int = MOST_HELD) -> None:
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.began = asyncio.Event()  # the body's first block came, or the end
        self.ended = asyncio.Event()
        self.failure = ""  # why it ended before its time
        self._request, self._is_head = request, is_head
        self._parser = httptools.HttpResponseParser(self)
        self._blocks: list[bytes] = []
        self._write: Callable[[bytes], None] | None = None
        self._most, self._received = most, 0

    @property
    def length(self) -> int | None:
        """Bytes of the body, where the head says so."""
        length = self._header(b"content-length")
        return int(length) if length else None

    @property
    def is_events(self) -> bool:
        """Whether an event can be added to it."""
        is_open = self.length is None and not self.is_compressed
        return is_open and self.has_type(EVENTS)

    @property
    def is_compressed(self) -> bool:
        return bool(self._header(b"content-encoding"))

    def has_type(self, kind: str) -> bool:
        """Whether its content type is this one."""
        return self._header(b"content-type").startswith(kind.encode())

    def _header(self, name: bytes) -> bytes:
        return next((value for key, value in self.headers if key == name), b"")

    @property
    def kept(self) -> bytes:
        """The part of the body that came before `pass_to`."""
        return b"".join(self._blocks)

    def _take(self) -> bytes:
        kept = self.kept
        self._blocks.clear()
        return kept

    async def pass_to(self, write: Callable[[bytes], None]) -> None:
        """Write the body as it comes. Returns at its end."""
        write(self._take())
        self._write = write
        await self.ended.wait()

    async def change(self, rename: Callable[[bytes], bytes]) -> None:
        """Wait for all of a document and change it. Raises NoAnswer."""
        await self.ended.wait()
        if self.failure:
            raise NoAnswer(f"ended without an answer ({self.failure})", sent=True)
        self._blocks = [rename(self.kept)]
        self.headers = [header for header in self.headers if header[0] != b"content-length"]
        self.headers.append((b"content-length", str(len(self.kept)).encode()))

    def close(self) -> None:
        """Leave the server, which ends its work where it still answers."""
        self.transport.abort()

    # asyncio's

    def connection_made(self, transport: Any) -> None:
        self.transport: asyncio.Transport = transport
        transport.writelines(self._request)

    def data_received(self, data: bytes) -> None:
        if self.ended.is_set():
            return
        self._received += len(data)
        if self._write is None and self._received > self._most:
            self._end(f"more than {size(self._most)}")
            self.close()
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._end(f"no valid HTTP: {error}")
        if self._blocks:
            self.began.set()
            if self._write:
                self._write(self._take())

    def connection_lost(self, error: Exception | None) -> None:
        has_length = any(name in LENGTHS for name, _ in self.headers)
        is_whole = self.status >= FIRST_FINAL and not has_length
        self._end("" if is_whole else str(error or "the connection was closed"))

    # httptools'

    def on_message_begin(self) -> None:
        self.headers = []

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()
        if self._is_head and self.status >= FIRST_FINAL:
            self._end()

    def on_body(self, body: bytes) -> None:
        self._blocks.append(body)

    def on_message_complete(self) -> None:
        if self.status >= FIRST_FINAL:
            self._end()

    def _end(self, failure: str = "") -> None:
        if not self.ended.is_set():
            self.failure = failure
            self.began.set()
            self.ended.set()


async def forward(
    target: Target, request: Request, path: str, parsed: RequestBody, keys: Keys
) -> Answer:
    """The server's answer, once its body begins. Raises NoAnswer or Refused."""
    path = quote(path, safe=PATH_SAFE)
    if request.scope["query_string"]:
        path += "?" + request.scope["query_string"].decode("latin-1")
    served, body = target.served_name, parsed.body
    if served and parsed.renamed and parsed.model not in (None, served):
        body = parsed.renamed(served)
    headers = credentials(target, keys)
    if parsed.is_json:  # vLLM requires that it is said; `curl -d` says that it is a form
        headers.append((b"content-type", b"application/json"))
    not_forwarded = NOT_FORWARDED | ({b"content-type"} if parsed.is_json else set())
    headers += without_headers(request.headers.raw, not_forwarded)
    if target.instance.engine == LLAMA_CPP:
        _require_readable(headers)
    return await _begin(target, request.method, path, headers, body)


def _require_readable(headers: Sequence[tuple[bytes, bytes]]) -> None:
    """Raise Refused for headers to which llama-server answers 400 without a word."""
    longest = max((len(name) + len(value) for name, value in headers), default=0)
    if longest > MAX_LINE or len(headers) + OWN_HEADERS > MAX_HEADERS:
        text = f"llama-server reads {MAX_HEADERS} headers of {MAX_LINE:,} bytes each at most"
        raise Refused(431, f"{text}; the request has more, or a longer one")


async def ask(
    target: Target, path: str, headers: Iterable[tuple[bytes, bytes]], seconds: float
) -> Answer:
    """All of the server's answer to a question of our own. Raises NoAnswer."""
    try:
        async with asyncio.timeout(seconds):
            answer = await _begin(target, "GET", path, headers, most=MOST_BYTES)
            try:
                await answer.ended.wait()
            finally:
                answer.close()
    except TimeoutError:
        raise NoAnswer(f"did not answer within {seconds:g} s", sent=True) from None
    if answer.failure:
        raise NoAnswer(f"broke off its answer ({answer.failure})", sent=True)
    return answer


async def _begin(
    target: Target,
    method: str,
    path: str,
    headers: Iterable[tuple[bytes, bytes]],
    body: bytes = b"",
    most: int = MOST_HELD,
) -> Answer:
    """Send a request; return once the body of its answer begins. Raises NoAnswer."""
    url = urlsplit(target.instance.url)
    lines = [f"{method} {url.path}{path} HTTP/1.1".encode("latin-1")]
    lines += [b"host: " + url.netloc.encode(), b"connection: close"]
    lines += [b"%b: %b" % header for header in headers]
    if body or method not in ("GET", "HEAD"):
        lines.append(b"content-length: %d" % len(body))
    head = b"\r\n".join([*lines, b"", b""])
    answer = Answer((head, body), is_head=method == "HEAD", most=most)
    try:
        if target.socket:
            await connect(lambda: answer, lambda: target.socket, CONNECT_SECONDS)
        else:
            tls_context = tls() if target.instance.tls else None
            async with asyncio.timeout(CONNECT_SECONDS):
                await asyncio.get_running_loop().create_connection(
                    lambda: answer, url.hostname or "", url.port or 0, ssl=tls_context
                )
    except OSError as error:  # a timeout too
        raise NoAnswer(f"cannot be reached ({str(error) or type(error).__name__})") from None
    try:
        await answer.began.wait()
    except asyncio.CancelledError:
        answer.close()
        raise
    if answer.failure and not answer.kept:
        raise NoAnswer(f"ended without an answer ({answer.failure})", sent=True)
    return answer


class Engines:
    """What the ready servers say of themselves."""

    def __init__(self, view: View, keys: Keys) -> None:
        self._view, self._keys = view, keys
        self._known: dict[str, dict[str, Any]] = {}  # by server, what it said of its model
        self._seen: dict[str, Target] = {}  # and in which state it said so

    async def metrics(self) -> dict[str, str]:
        """The metrics of all that have any, by name."""
        return await self._ask_all("/metrics", self._view.now().targets)

    async def details(self, targets: Targets) -> dict[str, dict[str, Any]]:
        """What each llama-server says of its model, which does not change while it is ready."""
        named = {target.name: target for target in targets if target.instance.engine == LLAMA_CPP}
        new = [target for name, target in named.items() if self._seen.get(name) != target]
        for name, text in (await self._ask_all("/v1/models", new)).items():
            self._known[name] = details(text.encode())
            self._seen[name] = named[name]
        return {name: self._known[name] for name in named if self._seen.get(name) == named[name]}

    async def _ask_all(self, path: str, targets: Iterable[Target]) -> dict[str, str]:
        """The answers of the ready ones, at once; those that fail are left out."""
        texts: dict[str, str] = {}

        async def ask_one(target: Target) -> None:
            with suppress(NoAnswer):
                headers = credentials(target, self._keys)
                answer = await ask(target, path, headers, ASK_SECONDS)
                if answer.status == 200:
                    texts[target.name] = answer.kept.decode("utf-8", "replace")

        async with anyio.create_task_group() as group:
            for target in targets:
                if target.is_ready:
                    group.start_soon(ask_one, target)
        return {target.name: texts[target.name] for target in targets if target.name in texts}


class _Described(Struct):
    meta: dict[str, Any]


class _Capable(Struct):
    capabilities: list[str]


class _ModelList(Struct):
    data: list[_Described]
    models: list[_Capable]


def details(document: bytes) -> dict[str, Any]:
    """What llama-server's own list of models says beyond names; empty where it is no such list."""
    try:
        listed = msgspec.json.decode(document, type=_ModelList)
        return {"meta": listed.data[0].meta, "capabilities": listed.models[0].capabilities}
    except (msgspec.DecodeError, RecursionError, IndexError):
        return {}


def context_of(details: Mapping[str, Any]) -> int | None:
    """The context of a model, in tokens, where its `details` say it."""
    context = details.get("meta", {}).get("n_ctx")
    return context if type(context) is int and context > 0 else None


def without_headers(
    headers: list[tuple[bytes, bytes]], without: set[bytes]
) -> list[tuple[bytes, bytes]]:
    """The headers in lower case, less `without` and those that `Connection` names."""
    lower = [(name.lower(), value) for name, value in headers]
    named = b",".join(value for name, value in lower if name == b"connection").lower()
    dropped = without | {word.strip() for word in named.split(b",")}
    return [(name, value) for name, value in lower if name not in dropped]


def returned_headers(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """The headers of an answer that the client gets; CORS is the gateway's own."""
    returned = [
        (name, value)
        for name, value in without_headers(headers, NOT_RETURNED)
        if not name.startswith(b"access-control-")
    ]
    kind = next((value for name, value in returned if name == b"content-type"), b"")
    if kind.startswith(EVENTS.encode()) and UNBUFFERED not in returned:
        returned.append(UNBUFFERED)
    return returned
