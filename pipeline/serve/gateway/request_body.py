"""A request's body, and the model that it names."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from starlette.requests import Request

from .answers import Refused

MAX_BYTES = 100_000_000
MAX_NAME = 1000  # characters
BOUNDARY = re.compile(r'boundary=(?:"([^"]+)"|([^\s;"]+))', re.IGNORECASE)
MODEL_PART = re.compile(rb'^content-disposition:[^\r\n]*;\s*name="?model"?\s*(?:;|$)', re.I | re.M)


@dataclass(frozen=True, slots=True)
class RequestBody:
    """A body, the model that it names if any, and a function that puts another name into it."""

    body: bytes
    model: str | None
    renamed: Callable[[str], bytes]


async def read_body(request: Request, limit: int = MAX_BYTES) -> bytes:
    """The whole body. Raises Refused beyond `limit` bytes, ClientDisconnect where it is cut."""
    too_long = Refused(413, f"the request is longer than {limit:,} bytes")
    if int(request.headers.get("content-length", "0")) > limit:
        raise too_long
    if request.headers.get("content-encoding", "identity") != "identity":
        raise Refused(415, "compressed requests are not supported; send the body uncompressed")
    blocks, count = [], 0
    async for block in request.stream():
        count += len(block)
        if count > limit:
            raise too_long
        blocks.append(block)
    return b"".join(blocks)


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
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the request is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise Refused(400, "the request is not a JSON object")
    model = data.get("model")
    if model is not None and not isinstance(model, str):
        raise Refused(400, '"model" must be a string')

    def renamed(name: str) -> bytes:
        return json.dumps({**data, "model": name}).encode()

    return RequestBody(body, model or None, renamed)


def _parse_form(content_type: str, body: bytes) -> RequestBody:
    """Only the boundaries between the form's parts are looked at, not its files."""
    match = BOUNDARY.search(content_type)
    if not match:
        raise Refused(400, "the form has no boundary")
    boundary = b"--" + (match[1] or match[2]).encode("latin-1", "replace")
    at = body.find(boundary)
    while at >= 0:
        start = at + len(boundary)
        text = body.find(b"\r\n\r\n", start)
        at = body.find(b"\r\n" + boundary, start)
        if 0 <= text < at and MODEL_PART.search(body[start:text].replace(b"\r\n", b"\n")):
            model = body[text + 4 : at].decode("utf-8", "replace").strip()
            return RequestBody(body, model or None, partial(_spliced, body, text + 4, at))
        at = at + 2 if at >= 0 else at
    return RequestBody(body, None, lambda name: body)


def _spliced(body: bytes, start: int, end: int, name: str) -> bytes:
    return body[:start] + name.encode() + body[end:]
