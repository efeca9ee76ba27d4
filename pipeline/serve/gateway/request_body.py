"""A request's body, and what the gateway reads of it: above all the model that it names.

The rest of the document is checked and skipped, never built: 100 MB may hold more values than fit
in memory.
"""

from __future__ import annotations

import re
from codecs import getincrementaldecoder
from collections.abc import AsyncIterator, Callable
from functools import partial

import anyio
import msgspec
from msgspec import Raw, Struct
from starlette.requests import Request

from pipeline.serve.guard.refusal import Refused

MAX_BYTES = 100_000_000
MAX_NAME = 1000  # characters
MAX_VALUES = 1_000_000  # of a document that is built
MAX_PARTS, MAX_PART_HEADERS = 1000, 10_000  # of a form, and bytes of a part's headers
IDLE_SECONDS = 20.0  # without a byte of a request that has begun
LONGEST_KEEP = 10 * 365 * 86400.0  # seconds; what is longer is for ever

BOUNDARY = re.compile(r'boundary=(?:"([^"]+)"|([^\s;"]+))', re.IGNORECASE)
MODEL_PART = re.compile(rb'^content-disposition:[^\r\n]*;\s*name="?model"?\s*(?:;|$)', re.I | re.M)
# A duration such as `1h30m`, as Go reads it: nothing but 0 goes without a unit, and mu is either
# the sign of micro or the Greek letter.
PART = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|\u03bcs|ms|s|m|h)", re.A)
DURATION = re.compile(rf"([+-]?)(0|(?:{PART.pattern})+)", re.A)
MICRO = dict.fromkeys(("us", "µs", "\u03bcs"), 1e-6)
UNITS = {"ns": 1e-9, **MICRO, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
BLOCK = 1024 * 1024  # bytes of a text that are decoded at once
BOM = b"\xef\xbb\xbf"


class _Document(Struct):
    """What is read of a JSON document."""

    model: str | None = None
    stream: Raw = Raw()
    keep_alive: Raw = Raw()


class RequestBody(Struct, frozen=True):
    """A body, and what the gateway reads of it. `keep_alive`: the seconds for which the model
    should stay loaded after the request, below 0 for ever, None where the request says nothing.
    `is_json`: it was read as such, whatever the client calls it."""

    body: bytes
    model: str | None = None
    is_json: bool = False
    renamed: Callable[[str], bytes] | None = None  # the same with another model, where it has one
    streams: bool = False
    keep_alive: float | None = None


async def read_body(request: Request, limit: int = MAX_BYTES) -> bytes:
    """The whole body. Raises Refused beyond `limit` bytes or once it stalls, or
    ClientDisconnect."""
    too_long = Refused(413, f"the request is longer than {limit:,} bytes", closes=True)
    if int(request.headers.get("content-length", "0")) > limit:
        raise too_long
    if request.headers.get("content-encoding", "").strip().lower() not in ("", "identity"):
        raise Refused(415, "compressed requests are not supported; send the body uncompressed")
    blocks, count = [], 0
    async for block in _blocks(request):
        count += len(block)
        if count > limit:
            raise too_long
        blocks.append(block)
    return b"".join(blocks)


async def _blocks(request: Request) -> AsyncIterator[bytes]:
    stream = aiter(request.stream())
    while True:
        try:
            with anyio.fail_after(IDLE_SECONDS):
                block = await anext(stream, None)
        except TimeoutError:
            text = f"the rest of the request did not come within {IDLE_SECONDS:g} s"
            raise Refused(408, text, closes=True) from None
        if block is None:
            return
        yield block


def parse_body(content_type: str, body: bytes) -> RequestBody:
    """The model that a body names. Raises Refused where it cannot be read."""
    if content_type.lower().startswith("multipart/form-data"):
        parsed = _parse_form(content_type, body)
    elif body:
        parsed = _parse_json(body)
    else:
        parsed = RequestBody(body)
    if parsed.model and len(parsed.model) > MAX_NAME:
        raise Refused(400, f'"model" is longer than {MAX_NAME} characters')
    return parsed


def _parse_json(body: bytes) -> RequestBody:
    body_without_bom = body.removeprefix(BOM)
    _require_utf8(body_without_bom)
    try:
        document = msgspec.json.decode(body_without_bom, type=_Document)
    except msgspec.ValidationError as error:
        is_model = str(error).endswith("`$.model`")
        text = '"model" must be a string' if is_model else "the request is not a JSON object"
        raise Refused(400, text) from None
    except msgspec.DecodeError as error:
        raise Refused(400, f"the request is not valid JSON: {error}") from None
    except RecursionError:
        raise Refused(400, "the request is nested too deep") from None
    return RequestBody(
        body,
        document.model or None,
        is_json=True,
        renamed=partial(_with_model, body_without_bom),
        streams=bytes(document.stream) == b"true",
        keep_alive=seconds(_keep_alive(document.keep_alive)),
    )


def _require_utf8(body: bytes) -> None:
    """Raise Refused for a text in another encoding, at which llama-server fails with status 500.
    It is read in parts: as one text it may take four times as much."""
    if body.isascii():
        return
    decoder = getincrementaldecoder("utf-8")()
    try:
        for start in range(0, len(body), BLOCK):
            decoder.decode(body[start : start + BLOCK])
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        raise Refused(400, "the request is not valid JSON: its text is not UTF-8") from None


def _keep_alive(value: Raw) -> float | str | None:
    """A number or a text. Raises Refused."""
    try:
        return msgspec.json.decode(value, type=float | str | None) if value else None
    except msgspec.DecodeError:
        text = 'keep_alive must be a number of seconds or a duration such as "5m"'
        raise Refused(400, text) from None


def _with_model(body: bytes, name: str) -> bytes:
    """A JSON document with another model. Raises Refused."""
    require_few_values(body)
    try:
        document = msgspec.json.decode(body, type=dict[str, Raw])
    except msgspec.DecodeError as error:  # only now are all its keys read
        raise Refused(400, f"the request is not valid JSON: {error}") from None
    return msgspec.json.encode({**document, "model": name})


def require_few_values(body: bytes) -> None:
    """Raise Refused where a document may not fit in memory once it is built."""
    if sum(map(body.count, (b":", b"[", b"{"))) > MAX_VALUES:
        raise Refused(400, f"the request has more than {MAX_VALUES:,} values")


def seconds(keep_alive: float | str | None) -> float | None:
    """How long a model should stay loaded after its request, from a number of seconds or a
    duration such as `5m` or `0`; below 0: for ever; None: the instance's idle_timeout. Raises
    Refused."""
    if keep_alive is None:
        return None
    if isinstance(keep_alive, float):
        return keep_alive if keep_alive <= LONGEST_KEEP else -1.0
    match = DURATION.fullmatch(keep_alive.strip())
    if not match:
        raise Refused(400, f'keep_alive {keep_alive[:100]!r} is not a duration such as "5m"')
    parts = PART.findall(match[2])
    total = sum(float(number) * UNITS[unit] for number, unit in parts)
    return -1.0 if (match[1] == "-" and total) or total > LONGEST_KEEP else total


def _parse_form(content_type: str, body: bytes) -> RequestBody:
    """Only the boundaries between the form's parts are looked at, not its files."""
    match = BOUNDARY.search(content_type)
    if not match:
        raise Refused(400, "the form has no boundary")
    boundary = b"--" + (match[1] or match[2]).encode("latin-1", "replace")
    at = body.find(boundary)
    for _ in range(MAX_PARTS):
        start = at + len(boundary)
        text = body.find(b"\r\n\r\n", start, start + MAX_PART_HEADERS)
        at = body.find(b"\r\n" + boundary, start)
        if at < 0:
            return RequestBody(body)
        if 0 <= text < at and MODEL_PART.search(body[start:text].replace(b"\r\n", b"\n")):
            model = body[text + 4 : at].decode("utf-8", "replace").strip()
            return RequestBody(body, model or None, renamed=partial(_spliced, body, text + 4, at))
        at += 2
    raise Refused(400, f"the form has more than {MAX_PARTS:,} parts")


def _spliced(body: bytes, start: int, end: int, name: str) -> bytes:
    return body[:start] + name.encode() + body[end:]
