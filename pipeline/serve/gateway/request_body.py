"""A request's body, and the model that it names.

The document is never built: a body of 100 MB may hold more values than fit in memory. A scan finds
the one string that is needed, a piece at a time, so that the loop goes on meanwhile.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Callable
from functools import partial

import anyio
from anyio import to_thread
from msgspec import Struct
from starlette.requests import Request

from pipeline.serve.guard.refusal import Refused

MAX_BYTES = 100_000_000
MAX_NAME = 1000  # characters
MAX_DEPTH = 1000
MAX_VALUES = 1_000_000  # objects, lists and top-level strings; a list's numbers and texts are free
MAX_PARTS, MAX_PART_HEADERS = 1000, 10_000  # of a form, and bytes of a part's headers
IDLE_SECONDS = 20.0  # without a byte of a request that has begun
INLINE_BYTES = 65_536  # longer bodies are scanned in a thread
PIECE = 65_536  # bytes for one regular expression, which blocks all threads

BOUNDARY = re.compile(r'boundary=(?:"([^"]+)"|([^\s;"]+))', re.IGNORECASE)
MODEL_PART = re.compile(rb'^content-disposition:[^\r\n]*;\s*name="?model"?\s*(?:;|$)', re.I | re.M)

# What the scan passes over at once: to the next string or bracket, to the next bracket, to the end
# of a string.
FLAT = re.compile(rb'[^"\[\]{}]*+')
NESTED = re.compile(rb'(?:[^"\[\]{}]++|"(?:[^"\\]++|\\.)*+")*+', re.DOTALL)
STRING = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)
SCALAR = re.compile(rb'\s*:\s*(true|-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?|"[^"\\]{0,99}")')
# A duration such as `1h30m`.
PART = re.compile(r"(\d+(?:\.\d*)?)(ns|us|µs|ms|s|m|h)")
DURATION = re.compile(rf"([+-]?)((?:{PART.pattern})+)")
UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
SPACE = re.compile(rb"[ \t\r\n]*+")
BOM = b"\xef\xbb\xbf"


class RequestBody(Struct, frozen=True):
    """A body, the model that it names if any, and a function that puts another name into it.
    `keep_alive`: the seconds for which the model should stay loaded after the request, below 0 for
    ever, None where that is not said."""

    body: bytes
    model: str | None
    renamed: Callable[[str], bytes]
    streams: bool = False
    keep_alive: float | None = None


async def read_body(request: Request, limit: int = MAX_BYTES) -> bytes:
    """The whole body. Raises Refused beyond `limit` bytes or where it stops coming,
    ClientDisconnect where it is cut."""
    too_long = Refused(413, f"the request is longer than {limit:,} bytes", closes=True)
    if int(request.headers.get("content-length", "0")) > limit:
        raise too_long
    if request.headers.get("content-encoding", "identity") != "identity":
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


async def parse(request: Request, body: bytes) -> RequestBody:
    """`parse_body`, off the loop where it takes long. Raises Refused."""
    content_type = request.headers.get("content-type", "")
    if len(body) <= INLINE_BYTES:
        return parse_body(content_type, body)
    return await to_thread.run_sync(parse_body, content_type, body)


def parse_body(content_type: str, body: bytes) -> RequestBody:
    """The model that a body names. Raises Refused where it cannot be read."""
    if content_type.lower().startswith("multipart/form-data"):
        parsed = _parse_form(content_type, body)
    elif body:
        parsed = _parse_json(body)
    else:
        parsed = RequestBody(body, None, lambda name: body)
    if parsed.model and len(parsed.model) > MAX_NAME:
        raise Refused(400, f'"model" is longer than {MAX_NAME} characters')
    return parsed


def parse_query(request: Request) -> RequestBody:
    """The same for a request without a body."""
    return RequestBody(b"", request.query_params.get("model") or None, lambda name: b"")


def _parse_json(body: bytes) -> RequestBody:
    (start, end), others = _find_model(body)
    said = others.get("keep_alive", b"null").decode("utf-8", "replace")
    try:
        model = json.loads(body[start:end]) if end else None
    except ValueError as error:
        raise Refused(400, f'"model" is not valid JSON: {error}') from None

    def renamed(name: str) -> bytes:
        return _spliced(body, start, end, json.dumps(name))

    return RequestBody(
        body,
        model or None,
        renamed,
        streams=others.get("stream") == b"true",
        keep_alive=None if said == "null" else seconds(_number(said)),
    )


def seconds(keep_alive: float | str | None) -> float | None:
    """For how long a model should stay loaded after its request, said as a number of seconds or as
    a duration such as `5m`; below 0: for ever, None: as its instance has it. Raises Refused."""
    if keep_alive is None or isinstance(keep_alive, float):
        return keep_alive
    match = DURATION.fullmatch(keep_alive.strip())
    if not match:
        raise Refused(400, f'keep_alive {keep_alive[:100]!r} is no duration such as "5m"')
    parts = PART.findall(match[2])
    total = sum(float(number) * UNITS[unit] for number, unit in parts)
    return -total if match[1] == "-" else total


def _number(text: str) -> float | str:
    """A number of JSON, or the text between quotes."""
    return text.strip('"') if text.startswith('"') else float(text)


def _find_model(body: bytes) -> tuple[tuple[int, int], dict[str, bytes]]:
    """Where the value of the top level's "model" stands, quotes included; (0, 0) where there is
    none. Of two the last counts. And other values of the top level that the gateway reads. Raises
    Refused where the body is no JSON object."""
    at = _after(SPACE, body, len(BOM) if body.startswith(BOM) else 0)
    if body[at : at + 1] != b"{":
        raise Refused(400, "the request is not a JSON object")
    depth, span, others = 0, (0, 0), dict[str, bytes]()
    for _ in range(MAX_VALUES):
        at = _after(NESTED if depth > 1 else FLAT, body, at)
        match body[at : at + 1]:
            case b"{" | b"[":
                depth += 1
            case b"}" | b"]":
                depth -= 1
            case b'"':
                start, at = at, _after(STRING, body, at + 1)
                if depth == 1 and body[start : at + 1] == b'"model"':
                    span = _value(body, at + 1, span)
                elif depth == 1:
                    others |= _scalar(body, start, at + 1)
            case _:
                raise Refused(400, "the request is not valid JSON: it ends early")
        at += 1
        if depth == 0:
            if _after(SPACE, body, at) < len(body):
                raise Refused(400, "the request is not valid JSON: it goes on after its end")
            return span, others
        if depth > MAX_DEPTH:
            raise Refused(400, f"the request is nested more than {MAX_DEPTH:,} deep")
    raise Refused(400, f"the request has more than {MAX_VALUES:,} values")


def _scalar(body: bytes, start: int, end: int) -> dict[str, bytes]:
    """The key between `start` and `end` and its value, if it is one of those that are read."""
    is_read = body[start:end] in (b'"stream"', b'"keep_alive"')
    match = SCALAR.match(body, end, end + 200) if is_read else None
    return {body[start + 1 : end - 1].decode(): match[1]} if match else {}


def _value(body: bytes, at: int, otherwise: tuple[int, int]) -> tuple[int, int]:
    """Where the string stands that is the value of the key that ends at `at`; `otherwise` where
    that was no key. Raises Refused where it is no string."""
    at = _after(SPACE, body, at)
    if body[at : at + 1] != b":":
        return otherwise
    at = _after(SPACE, body, at + 1)
    if body[at : at + 4] == b"null":
        return 0, 0
    if body[at : at + 1] != b'"':
        raise Refused(400, '"model" must be a string')
    return at, _after(STRING, body, at + 1) + 1


def _after(pattern: re.Pattern[bytes], body: bytes, at: int) -> int:
    """The end of what `pattern` matches at `at`. It may stop early before a string, which is then
    passed over by itself."""
    while True:
        end = min(at + PIECE, len(body))
        match = pattern.match(body, at, end)
        stop = match.end() if match else at
        if stop == at or stop < end - 1:
            return stop
        at = stop


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
            return RequestBody(body, None, lambda name: body)
        if 0 <= text < at and MODEL_PART.search(body[start:text].replace(b"\r\n", b"\n")):
            model = body[text + 4 : at].decode("utf-8", "replace").strip()
            return RequestBody(body, model or None, partial(_spliced, body, text + 4, at))
        at += 2
    raise Refused(400, f"the form has more than {MAX_PARTS:,} parts")


def _spliced(body: bytes, start: int, end: int, name: str) -> bytes:
    return body[:start] + name.encode() + body[end:]
