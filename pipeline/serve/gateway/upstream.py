"""One request to one instance."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator

import httpx2
from starlette.requests import Request

from .fleet import Target
from .keys import Keys
from .request_body import Asked

CONNECT_SECONDS = 5.0

# Of one connection only, by RFC 9110; and what the gateway says itself.
HOP_BY_HOP = {
    *(b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization"),
    *(b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade"),
}
NOT_SENT_ON = HOP_BY_HOP | {
    *(b"host", b"content-length", b"expect", b"origin", b"authorization", b"x-api-key"),
    # With it llama-server goes on when the client is gone, and waits to be asked for the rest.
    b"x-conversation-id",
}
NOT_PASSED_BACK = HOP_BY_HOP | {b"server", b"date"}


def client() -> httpx2.AsyncClient:
    """What asks the instances: no limit but on connecting, no proxy, a new connection each time.

    llama-server keeps a thread for each open connection, and one closed just as it is used again
    would lose a request; connecting on one machine costs next to nothing.
    """
    # Our own servers, whose certificates name them as others see them.
    context = ssl._create_unverified_context()  # noqa: S323
    return httpx2.AsyncClient(
        timeout=httpx2.Timeout(None, connect=CONNECT_SECONDS),
        limits=httpx2.Limits(max_connections=None, max_keepalive_connections=0),
        verify=context,
        trust_env=False,
    )


def authorisation(instance_key_file: str | None, keys: Keys) -> list[tuple[bytes, bytes]]:
    """The header that an instance with a key wants."""
    known = keys.of(instance_key_file) if instance_key_file else ()
    return [(b"authorization", b"Bearer " + known[0].encode())] if known else []


class Again(Exception):
    """No byte of an answer came: `sent` where the instance may have worked on the request,
    `loads` where it said that it will be there."""

    def __init__(self, reason: str, *, sent: bool = False, loads: bool = False) -> None:
        super().__init__(reason)
        self.sent = sent
        self.loads = loads


async def ask(
    client: httpx2.AsyncClient, target: Target, request: Request, asked: Asked, keys: Keys
) -> httpx2.Response:
    """The instance's answer, of which the body is still to be read. Raises Again."""
    url = f"{target.instance.url}{request.scope['path']}"
    if request.scope["query_string"]:
        url += "?" + request.scope["query_string"].decode("latin-1")
    served, body = target.served_name, asked.body
    if served is not None and asked.model not in (None, served):
        body = asked.renamed(served)
    headers = [
        *kept(request.headers.raw, NOT_SENT_ON),
        (b"connection", b"close"),
        *authorisation(target.instance.api_key_file, keys),
    ]
    sent = httpx2.Request(request.method, url, headers=headers, content=body)
    try:
        return await client.send(sent, stream=True)
    except (httpx2.ConnectError, httpx2.ConnectTimeout) as why:
        raise Again(f"cannot be reached ({told(why)})") from None
    except httpx2.TransportError as why:
        raise Again(f"ended without an answer ({told(why)})", sent=True) from None


async def first_block(blocks: AsyncIterator[bytes]) -> bytes:
    """The first bytes of an answer's body; none where it is empty. Raises Again."""
    try:
        return await anext(blocks, b"")
    except httpx2.TransportError as why:
        raise Again(f"ended without an answer ({told(why)})", sent=True) from None


def kept(headers: list[tuple[bytes, bytes]], without: set[bytes]) -> list[tuple[bytes, bytes]]:
    """The headers in small letters, less `without` and what `Connection` names."""
    low = [(name.lower(), value) for name, value in headers]
    named = b",".join(value for name, value in low if name == b"connection").lower()
    dropped = without | {word.strip() for word in named.split(b",")}
    return [one for one in low if one[0] not in dropped]


def told(why: Exception) -> str:
    """What the library says, or at least what kind of error it is."""
    return str(why) or type(why).__name__
