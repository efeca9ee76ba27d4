"""A request's body, and the model that it names."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from starlette.requests import Request

from .answers import Refused

MOST_BYTES = 100_000_000
MOST_NAME = 1000
BOUNDARY = re.compile(r'boundary=(?:"([^"]+)"|([^\s;"]+))', re.IGNORECASE)
MODEL_PART = re.compile(rb'^content-disposition:[^\r\n]*;\s*name="?model"?\s*(?:;|$)', re.I | re.M)


@dataclass(frozen=True, slots=True)
class Asked:
    """A body, the model that it names if any, and how it reads with another name."""

    body: bytes
    model: str | None
    renamed: Callable[[str], bytes]


async def read_body(request: Request, most: int = MOST_BYTES) -> bytes:
    """The whole body. Raises Refused beyond `most` bytes, ClientDisconnect where it is cut."""
    too_much = Refused(413, f"the request is longer than {most:,} bytes")
    if int(request.headers.get("content-length", "0")) > most:
        raise too_much
    if request.headers.get("content-encoding", "identity") != "identity":
        raise Refused(415, "a compressed request cannot be read; send it as it is")
    blocks, count = [], 0
    async for block in request.stream():
        count += len(block)
        if count > most:
            raise too_much
        blocks.append(block)
    return b"".join(blocks)


def asked(content_type: str, body: bytes) -> Asked:
    """What a body asks for. Raises Refused where it cannot be read."""
    if content_type.lower().startswith("multipart/form-data"):
        found = _in_form(content_type, body)
    elif body:
        found = _in_json(body)
    else:
        found = Asked(body, None, lambda name: body)
    if found.model and len(found.model) > MOST_NAME:
        raise Refused(400, f'"model" is longer than {MOST_NAME} letters')
    return found


def asked_in_query(request: Request) -> Asked:
    """What a request without a body asks for."""
    return Asked(b"", request.query_params.get("model") or None, lambda name: b"")


def _in_json(body: bytes) -> Asked:
    try:
        told = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the request is no JSON: {error}") from None
    if not isinstance(told, dict):
        raise Refused(400, "the request is no JSON object")
    model = told.get("model")
    if model is not None and not isinstance(model, str):
        raise Refused(400, '"model" must be a text')

    def renamed(name: str) -> bytes:
        return json.dumps({**told, "model": name}).encode()

    return Asked(body, model or None, renamed)


def _in_form(content_type: str, body: bytes) -> Asked:
    """The form's files are not looked into; only the borders between its parts are."""
    found = BOUNDARY.search(content_type)
    if not found:
        raise Refused(400, "the form has no boundary")
    border = b"--" + (found[1] or found[2]).encode("latin-1", "replace")
    at = body.find(border)
    while at >= 0:
        start = at + len(border)
        text = body.find(b"\r\n\r\n", start)
        at = body.find(b"\r\n" + border, start)
        if 0 <= text < at and MODEL_PART.search(body[start:text].replace(b"\r\n", b"\n")):
            model = body[text + 4 : at].decode("utf-8", "replace").strip()
            return Asked(body, model or None, partial(_spliced, body, text + 4, at))
        at = at + 2 if at >= 0 else at
    return Asked(body, None, lambda name: body)


def _spliced(body: bytes, start: int, end: int, name: str) -> bytes:
    return body[:start] + name.encode() + body[end:]
