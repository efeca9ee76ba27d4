"""Answers of servers that anybody may run: each has an end, in bytes and in seconds.

The HTTP library has neither. Its timeout counts the silence between two bytes, it decompresses
whatever comes, and it reads the body of a redirect before it follows it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from msgspec import Struct

from . import network
from .errors import PipelineError
from .parallel import within
from .text import size

if TYPE_CHECKING:
    import httpx2

MOST_REDIRECTS = 5  # a renamed repository's file takes three
HEADERS_SECONDS = 60.0  # from a request to the end of the headers, redirects included


class Bound(Struct, frozen=True, kw_only=True):
    """The most that is read of an answer: bytes after decompression, and seconds for all of it."""

    bytes: int
    seconds: float


def client(made: httpx2.Client) -> httpx2.Client:
    """Have a client follow few redirects, and read none of their bodies; returns it."""
    made.max_redirects = MOST_REDIRECTS
    hooks = made.event_hooks["response"]
    if _drop_body_of_redirect not in hooks:
        hooks.append(_drop_body_of_redirect)
    return made


def _drop_body_of_redirect(answer: httpx2.Response) -> None:
    import httpx2

    if answer.has_redirect_location and isinstance(answer.stream, httpx2.SyncByteStream):
        answer.stream.close()
        answer.stream = httpx2.ByteStream(b"")


def get(
    client: httpx2.Client, url: str, bound: Bound, *, method: str = "GET", **options: Any
) -> httpx2.Response:
    """The whole answer to a GET, or another method. Raises PipelineError where it is longer, or
    takes longer, than the bound, and httpx2.RequestError. `options` are those of
    `httpx2.Client.stream`."""
    import httpx2

    deadline = time.monotonic() + bound.seconds

    def read() -> httpx2.Response:
        blocks, got = [], 0
        with client.stream(method, url, **options) as answer:
            for block in answer.iter_bytes():
                got += len(block)
                if got > bound.bytes:
                    raise _endless(url, f"sends more than {size(bound.bytes)}")
                if time.monotonic() > deadline:
                    raise TimeoutError
                blocks.append(block)
        return httpx2.Response(
            answer.status_code,
            headers=[  # the content is whole and decompressed here
                (name, value)
                for name, value in answer.headers.multi_items()
                if name.lower() not in ("content-encoding", "content-length", "transfer-encoding")
            ],
            content=b"".join(blocks),
            request=answer.request,
        )

    try:
        return within(bound.seconds, read)
    except TimeoutError:
        raise _endless(url, f"has not ended its answer after {bound.seconds:g} s") from None


@contextmanager
def opened(client: httpx2.Client, url: str, **options: Any) -> Iterator[httpx2.Response]:
    """The answer to a GET once its headers are here; the caller bounds what it reads of the body.
    Redirects are followed. Raises httpx2.RequestError, also for headers that do not end."""
    import httpx2

    request = client.build_request("GET", url, **options)
    try:
        answer = within(
            HEADERS_SECONDS, lambda: client.send(request, stream=True, follow_redirects=True)
        )
    except TimeoutError:
        raise httpx2.ReadTimeout("the headers do not end", request=request) from None
    try:
        yield answer
    finally:
        answer.close()


def _endless(url: str, what: str) -> PipelineError:
    return PipelineError(
        f"{address(url)}: {what}",
        "see whether the address is right, and whether a proxy answers in its place"
        f"{network.through(url)}",
    )


def address(url: str) -> str:
    """A URL as it may be shown: without a password, and without what is signed."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
