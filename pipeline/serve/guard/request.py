"""A request, read strictly and written anew: nothing that is passed on can be read in another way
than it was checked."""

from __future__ import annotations

import re
from collections.abc import Mapping

import httptools
from msgspec import Struct

from .refusal import Refused
from .rules import TWO_LENGTHS

# What llama-server refuses halfway through a head, and then reads the rest as the next request.
MAX_HEAD = 64 * 1024  # bytes
MAX_LINE = 8000  # of a header, or the size of a chunk
MAX_HEADERS = 99
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
TOO_LONG = Refused(431, "the head of the request is too long", closes=True)
TWO_HOSTS = Refused(400, "the request has more than one Host", closes=True)
NOT_CHUNKED = Refused(400, "Transfer-Encoding may be chunked alone", closes=True)

END = b"\r\n\r\n"
# An upgrade to another protocol is never made, and its offer may be ignored.
UPGRADE = re.compile(rb"\r\nupgrade:[^\r\n]*(?=\r\n)", re.IGNORECASE)
ONLY_ONCE = {"content-length", "transfer-encoding", "host"}

# A client that takes us for its proxy names the whole address (RFC 9112, 3.2.2).
ABSOLUTE = re.compile(rb"https?://([^/?#]*)", re.IGNORECASE)

CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(;[^\r\n]*)?")
BROKEN = Refused(400, "the chunks of the request are not valid", closes=True)


class RequestHead(Struct, frozen=True):
    """A request's head, as it is passed on, and what its rules are checked against."""

    method: str
    path: str
    headers: Mapping[str, str]  # names in lower case; the first of several
    raw: bytes


class _HeadLines:
    """Callbacks of httptools that collect the lines of a head."""

    def __init__(self) -> None:
        self.url = b""
        self.headers: list[tuple[bytes, bytes]] = []
        self.is_whole = False

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        self.is_whole = True


def origin_form(target: bytes) -> tuple[bytes, bytes | None]:
    """The path and query that a request asks for, and the host that it names with them: that one
    counts then, whatever the header says."""
    absolute = ABSOLUTE.match(target)
    if not absolute:
        return target, None
    path = target[absolute.end() :]
    return path if path.startswith(b"/") else b"/" + path, absolute[1]


def read_head(data: bytes) -> RequestHead:
    """Parse a head, with the empty line at its end. Raises Refused."""
    lines = _HeadLines()
    parser = httptools.HttpRequestParser(lines)
    try:
        parser.feed_data(UPGRADE.sub(b"", data))
        method, version = parser.get_method().decode(), parser.get_http_version()
    except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
        names = re.findall(rb"\r\n(content-length|transfer-encoding):", data.lower())
        refused = Refused(400, f"the request is not valid HTTP: {error}", closes=True)
        raise TWO_LENGTHS if len(set(names)) == 2 else refused from None
    if not lines.is_whole:
        raise Refused(400, "the request is not valid HTTP", closes=True)
    if method not in METHODS or version not in ("1.0", "1.1"):
        raise Refused(405, f"{method} with HTTP {version} is not supported", closes=True)
    url, named = origin_form(lines.url)
    sizes = [len(lines.url), *(len(name) + len(value) for name, value in lines.headers)]
    if max(sizes) > MAX_LINE or len(lines.headers) > MAX_HEADERS:
        raise TOO_LONG
    headers: dict[str, str] = {}
    for name, value in lines.headers:
        key = name.decode("latin-1").lower()
        if key in headers and key in ONLY_ONCE:
            raise TWO_HOSTS if key == "host" else NOT_CHUNKED
        headers.setdefault(key, value.decode("latin-1"))
    if named is not None:
        headers["host"] = named.decode("latin-1")
        lines.headers = [(b"Host", named)] + [
            header for header in lines.headers if header[0].lower() != b"host"
        ]
    if headers.get("transfer-encoding", "chunked").lower() != "chunked":
        raise NOT_CHUNKED
    path = url.decode("latin-1")
    first = f"{method} {path} HTTP/{version}".encode("latin-1")
    raw = [first, *(b"%b: %b" % header for header in lines.headers), b"", b""]
    return RequestHead(method, path, headers, b"\r\n".join(raw))


class Chunks:
    """Reads the chunks of a body and writes them anew, without extensions and trailers. A chunk is
    passed on as it comes."""

    def __init__(self) -> None:
        self.is_over = False
        self._held = b""  # a line that is not whole yet
        self._left = 0  # bytes of the chunk under way
        self._ends_chunk = self._is_last = False

    def feed(self, data: bytes) -> tuple[bytes, bytes]:
        """What is to be passed on, and what follows the body. Raises Refused."""
        data, self._held = self._held + data, b""
        blocks = []
        while data and not self.is_over:
            if self._left:
                block, data = data[: self._left], data[self._left :]
                self._left -= len(block)
                blocks.append(block)
                continue
            line, end, rest = data.partition(b"\r\n")
            if len(line) > MAX_LINE:
                raise BROKEN
            if not end:
                self._held = data
                break
            blocks.append(self._line(line))
            data = rest
        return b"".join(blocks), data if self.is_over else b""

    def _line(self, line: bytes) -> bytes:
        """What is passed on for a line: the end of a chunk, a size, or after the last a trailer."""
        if self._ends_chunk:
            self._ends_chunk = False
            if line:
                raise BROKEN
            return b"\r\n"
        if self._is_last:
            self.is_over = not line
            return b"\r\n" if self.is_over else b""
        size = CHUNK_SIZE.fullmatch(line)
        if not size:
            raise BROKEN
        self._left = int(size[1], 16)
        self._ends_chunk, self._is_last = self._left > 0, self._left == 0
        return b"%x\r\n" % self._left
