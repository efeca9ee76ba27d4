"""One request to one server, with its key: keys are read from files, compared in constant time,
never shown."""

from __future__ import annotations

import hmac
import json
import re
import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

import httpx2
from starlette.requests import Request

from pipeline.serve.keys import keys_of
from pipeline.serve.supervisor.state import Stamp, stamp

from .request_body import RequestBody
from .servers import Target

CONNECT_SECONDS = 5.0

# Headers of one connection only (RFC 9110), and those that the gateway sets itself.
HOP_BY_HOP = {
    *(b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization"),
    *(b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade"),
}
NOT_FORWARDED = HOP_BY_HOP | {
    *(b"host", b"content-length", b"expect", b"origin", b"authorization", b"x-api-key"),
    # With it llama-server goes on after the client left, and keeps the rest for it.
    b"x-conversation-id",
}
NOT_RETURNED = HOP_BY_HOP | {b"server", b"date"}


def client() -> httpx2.AsyncClient:
    """The HTTP client for all servers: no timeout but on connecting, no proxy, no keep-alive.

    llama-server keeps a thread for each open connection, and a request that reuses one just as it
    is closed would be lost; a new connection on the same machine costs next to nothing.
    """
    # Our own servers: their certificates are for the names that others use.
    context = ssl._create_unverified_context()  # noqa: S323
    return httpx2.AsyncClient(
        timeout=httpx2.Timeout(None, connect=CONNECT_SECONDS),
        limits=httpx2.Limits(max_connections=None, max_keepalive_connections=0),
        verify=context,
        trust_env=False,
    )


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


async def forward(
    client: httpx2.AsyncClient,
    target: Target,
    request: Request,
    path: str,
    parsed: RequestBody,
    keys: Keys,
) -> httpx2.Response:
    """The server's answer, its body still unread. Raises NoAnswer."""
    url = f"{target.instance.url}{path}"
    if request.scope["query_string"]:
        url += "?" + request.scope["query_string"].decode("latin-1")
    served, body = target.served_name, parsed.body
    if served is not None and parsed.model not in (None, served):
        body = parsed.renamed(served)
    headers = [
        *without_headers(request.headers.raw, NOT_FORWARDED),
        (b"connection", b"close"),
        *authorization(target.instance.api_key_file, keys),
    ]
    forwarded = httpx2.Request(request.method, url, headers=headers, content=body)
    try:
        return await client.send(forwarded, stream=True)
    except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
        raise NoAnswer(f"cannot be reached ({error_text(error)})") from None
    except httpx2.TransportError as error:
        raise NoAnswer(f"ended without an answer ({error_text(error)})", sent=True) from None


Rename = Callable[[bytes], bytes]


def renaming(target: Target, model: str | None) -> Rename | None:
    """What puts `model`, by which a server was asked, in place of the name that it gives itself:
    llama-server always says the first of its aliases. None where that is the same."""
    if not model or set(target.names) == {model}:
        return None
    spelled = [
        json.dumps(name, ensure_ascii=ascii) for name in target.names for ascii in (False, True)
    ]
    pattern = re.compile(rf'("model"\s*:\s*)(?:{"|".join(map(re.escape, spelled))})'.encode())
    own = json.dumps(model).encode()
    return lambda text: pattern.sub(lambda match: match[1] + own, text)


async def opened(
    response: httpx2.Response, rename: Rename | None
) -> tuple[list[tuple[bytes, bytes]], bytes, AsyncIterator[bytes]]:
    """An answer's headers for the client, its first block (empty where there is none), and the
    others. A document that is changed is read whole, for its length. Raises NoAnswer."""
    headers = returned_headers(response)
    blocks: AsyncIterator[bytes] = response.aiter_raw()
    is_document = "content-length" in response.headers
    rename = None if "content-encoding" in response.headers else rename
    if rename:
        blocks = _renamed(blocks, rename, b"" if is_document else b"\n")
    try:
        first = await anext(blocks, b"")
    except httpx2.TransportError as error:
        raise NoAnswer(f"ended without an answer ({error_text(error)})", sent=True) from None
    if rename and is_document:
        headers = [header for header in headers if header[0] != b"content-length"]
        headers.append((b"content-length", str(len(first)).encode()))
    return headers, first, blocks


async def _renamed(
    blocks: AsyncIterator[bytes], rename: Rename, end: bytes
) -> AsyncIterator[bytes]:
    """The blocks with another name: each held until `end` (a line's), all of them where it is
    empty."""
    held: list[bytes] = []
    async for block in blocks:
        before, at, after = block.rpartition(end) if end else (b"", b"", block)
        if at:
            yield rename(b"".join([*held, before, at]))
            held.clear()
        held.append(after)
    yield rename(b"".join(held))


def without_headers(
    headers: list[tuple[bytes, bytes]], without: set[bytes]
) -> list[tuple[bytes, bytes]]:
    """The headers in lower case, less `without` and those that `Connection` names."""
    lower = [(name.lower(), value) for name, value in headers]
    named = b",".join(value for name, value in lower if name == b"connection").lower()
    dropped = without | {word.strip() for word in named.split(b",")}
    return [(name, value) for name, value in lower if name not in dropped]


def returned_headers(response: httpx2.Response) -> list[tuple[bytes, bytes]]:
    """The headers of an answer that the client gets; CORS is the gateway's own."""
    return [
        (name, value)
        for name, value in without_headers(response.headers.raw, NOT_RETURNED)
        if not name.startswith(b"access-control-")
    ]


def error_text(error: Exception) -> str:
    """The library's message, or at least the kind of error."""
    return str(error) or type(error).__name__
