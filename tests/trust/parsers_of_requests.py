"""Harnesses for what clients send: heads and chunks at the guard, bodies at the gateway."""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h11
import msgspec
from hostile_input import cuts, damaged, encoded, harness, mutated, pieces, replace, texts
from hostile_input import values as json_values
from hypothesis import strategies

from pipeline.serve.gateway import request_body
from pipeline.serve.gateway.ollama import requests as ollama
from pipeline.serve.gateway.request_body import parse_body, seconds
from pipeline.serve.guard import request as guard_request
from pipeline.serve.guard.refusal import Refused
from pipeline.serve.guard.relay import ClientSide
from pipeline.serve.guard.rules import Rules
from pipeline.serve.supervisor import usage
from pipeline.serve.supervisor.state import Folder

# The guard

HEADS = (
    b"POST /v1/x?a=b HTTP/1.1\r\nHost: localhost:8080\r\nContent-Length: 5\r\nX: y\r\n\r\nhello",
    b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"5;a=b\r\nhello\r\n0\r\nT: x\r\n\r\n",
    b"GET /a HTTP/1.1\r\nHost: a\r\n\r\nGET /b HTTP/1.1\r\nHost: b\r\nConnection: close\r\n\r\n",
    b"GET http://b/ HTTP/1.0\r\nUpgrade: h2c\r\nConnection: upgrade\r\n\r\n",
)
head_texts = pieces(
    *("GET ", "POST ", "/", " HTTP/1.1\r\n", " HTTP/1.0\r\n", "Host: a\r\n", "\r\n", "\r\n\r\n"),
    *("Content-Length: ", "Transfer-Encoding: ", "chunked", "Upgrade: h2c\r\n", "0", "5", "+5"),
    *(
        "\r\n ",
        "\n",
        "\r",
        "\0",
        "\t",
        ",",
        ", ",
        ":",
        "identity",
        "Content-Length",
        "hello",
        "5\r\n",
    ),
    *(
        "Connection: close\r\n",
        "Expect: 100-continue\r\n",
        "Host: b\r\n",
        "http://b/",
        "*",
        "HTTP/0.9",
    ),
)
requests = strategies.one_of(mutated(*HEADS), head_texts.map(encoded))


def passed_on(blocks: Sequence[bytes]) -> tuple[bytes, bool, bool]:
    """What the guard passes on of a connection's bytes, whether it refused something then, and
    whether it waits for the rest of a head."""
    out: list[bytes] = []
    nothing = dict.fromkeys(("write_eof", "abort", "pause_reading", "resume_reading"), lambda: None)
    sides = SimpleNamespace(write=out.append, is_closing=lambda: False, **nothing)
    rules = Rules("0.0.0.0", [], [], who="it", place="{key}")  # any name
    client = ClientSide(rules, lambda: "", set())
    client.transport = client._server = sides  # type: ignore[assignment]
    for block in blocks:
        client.data_received(block)
        while client._ahead and not client._is_over:
            client.answered(b"HTTP/1.1 200 OK\r\n\r\n")
    return b"".join(out), client._is_over, bool(client._held)


def read_by_another(data: bytes) -> list[tuple[str, str, bytes]]:
    """The requests in these bytes as h11 reads them; the last may lack the rest of its body.
    Raises h11.RemoteProtocolError."""
    seen: list[tuple[str, str, bytes]] = []
    while data:
        parser = h11.Connection(h11.SERVER, max_incomplete_event_size=100_000)
        parser.receive_data(data)
        request = parser.next_event()
        if not isinstance(request, h11.Request):
            return seen
        body = b""
        while isinstance(event := parser.next_event(), h11.Data):
            body += bytes(event.data)
        seen.append((request.method.decode(), request.target.decode("latin-1"), body))
        if not isinstance(event, h11.EndOfMessage):
            return seen
        data = parser.trailing_data[0]
    return seen


def without_host(target: str) -> str:
    """What of a target is passed on: not the address of a server that is taken for a proxy."""
    path = re.sub("^https?://[^/?#]*", "", target, flags=re.IGNORECASE)
    return path if path.startswith("/") or path == target else f"/{path}"


@harness(
    cuts(requests),
    spoil=replace(guard_request, "ONLY_ONCE", set()),
    cases=[
        [b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"],
        [b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n"],
        [b"GET / HTTP/1.1\r\nHost: a\r\n\nGET /b HTTP/1.1\r\nHost: b\r\n\r\n"],
        [b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: \r\n\r\n"],
        [b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999999999999\r\n\r\n"],
        [b"\r\n\r\n"],
        [b"GET http://b?x HTTP/1.1\r\nHost: a\r\n\r\n"],
        [b"GET / HTTP/1.1\r\nHost: a\r\nUpgrade: h2c\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n"],
        [b"GET / HTTP/1.0\r\n\r\nGET /b HTTP/1.0\r\nConnection: upgrad\n\r\n"],
    ],
)
def guarded_requests(blocks: list[bytes], folder: Path) -> None:
    """However a connection's bytes are cut, the same is passed on: requests that h11 reads, and the
    same that it reads in what the client sent."""
    out, refused, waits = passed_on(blocks)
    sent = b"".join(blocks)
    at_once = passed_on([sent])
    if at_once != (out, refused, waits):  # more of a broken one, before it was seen to be that
        assert refused and at_once[1]
    try:
        read = read_by_another(out)
    except h11.RemoteProtocolError as error:
        assert str(error).startswith(STRICTER), (out, error)
        return
    if not refused:
        with suppress(h11.RemoteProtocolError):
            asked = read_by_another(sent)
            if waits:  # for an empty line; a bare line feed is one to h11
                asked = asked[: len(read)]
            assert [(method, without_host(url), body) for method, url, body in asked] == read


# What h11 refuses and llama-server takes: HTTP/1.1 without a Host, and odd letters.
STRICTER = ("Missing mandatory Host:", "illegal request line", "illegal header line")


@harness(
    strategies.tuples(texts, texts, strategies.sampled_from(["GET", "POST", "OPTIONS"])),
    spoil=replace(Rules, "_is_own_name", lambda self, host: True),
    cases=[("localhost.evil", "", "GET"), ("[::1", "", "GET"), ("a" * 100_000, "x://y", "GET")],
)
def guard_rules(example: tuple[str, str, str], folder: Path) -> None:
    host, origin, method = example
    rules = Rules("127.0.0.1", ["https://*.ok"], [], who="it", place="{key}")
    headers = {"host": host, "origin": origin}
    refused = rules.refusal(method, headers)
    name = host.lower().split(":")[0].rstrip(".")
    if name and name.isalpha() and name.isascii() and name != "localhost":
        assert refused and refused.status == 403
    evil = {"host": f"x{len(host)}.evil.example"}
    assert rules.refusal(method, evil), "a name that anybody may have"


# Bodies at the gateway

BODIES = (
    b'{"model": "chat", "messages": [{"role": "user", "content": "a"}], "keep_alive": "5m"}',
    b'{"stream": true, "model": "chat", "keep_alive": 1.5, "n": [1, {"model": "other"}]}',
    b'{"model":"a","mod\\u0065l":"b"}',
)
json_bodies = pieces(
    *('{"model": ', '"chat"', '"mod\\u0065l": ', ', "model": ', "null", "1", "}", "{", "[", "]"),
    *('"stream": true', ', "keep_alive": ', '"5m"', "1e999", "-1", '"\\ud800"', ', "x": '),
    *("NaN", "\ufeff", "\0", "01", "1.", '"\x01"', "//", "'", '"\\x"', "9" * 40, ", "),
)


def reads(body: bytes) -> Any:
    """A JSON object as Python reads it, which takes the last of two keys as llama-server does."""
    return json.loads(body.removeprefix(request_body.BOM).decode("utf-8", "replace"))


@harness(
    strategies.one_of(
        json_bodies.map(encoded), mutated(*BODIES), json_values.map(json.dumps).map(encoded)
    ),
    spoil=replace(request_body, "_Document", msgspec.defstruct("_Document", [("model", str)])),
    cases=[
        *BODIES,
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"model": "\xff"}',
        b'{"\xff": 1, "model": "a"}',
        b'{"model": "a"}\0{"model": "b"}',
        b'{"model": "\\ud800"}',
        b'{"keep_alive": "\xff"}',
        b'{"keep_alive": 1e308}',
        b'{"keep_alive": "' + b"9" * 400 + b'h"}',
        b'{"keep_alive": "' + b"1m" * 100_000 + b'x"}',
    ],
)
def gateway_json(body: bytes, folder: Path) -> None:
    try:
        parsed = parse_body("application/json", body)
    except Refused as refused:
        json.dumps(refused.message)
        return
    if not body:
        return
    document = reads(body)
    assert parsed.model == (document.get("model") or None)
    assert parsed.streams == (document.get("stream") is True)
    assert parsed.keep_alive is None or math.isfinite(parsed.keep_alive)
    if parsed.keep_alive is not None:
        ends_well(parsed.keep_alive)
    if parsed.renamed:
        try:
            changed = parsed.renamed("ü")
        except Refused as refused:
            assert refused.status == 400
            return
        assert parse_body("", changed).model == "ü"
        assert {**reads(changed), "model": 0} == {**document, "model": 0}


def ends_well(keep: float) -> None:
    """When a model is unloaded can be told to a client of Ollama's."""
    import time

    from gateway_tools import instance

    from pipeline.serve.gateway.ollama.models import expires_at
    from pipeline.serve.gateway.servers import Target

    target = Target(instance=instance("x"), state="ready", ready_at=time.time())
    assert expires_at(target, usage.ServerUse(keep=keep, last=time.time()))


FORM = (
    b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n--b\r\n\r\n'
    b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper\r\n--b--\r\n'
)


@harness(
    strategies.tuples(
        strategies.sampled_from(
            ["boundary=b", 'boundary="b"', "Boundary=b; a=c", "", "boundary=", "boundary=\xff"]
        ),
        mutated(FORM),
    ),
    spoil=replace(request_body, "_spliced", lambda body, start, end, name: body[:start]),
)
def gateway_form(example: tuple[str, bytes], folder: Path) -> None:
    boundary, body = example
    try:
        parsed = parse_body(f"multipart/form-data; {boundary}", body)
    except Refused:
        return
    if parsed.model and parsed.renamed:
        again = parse_body(f"multipart/form-data; {boundary}", parsed.renamed("other"))
        assert again.model == "other"
        assert parsed.model.encode("utf-8", "replace") in body or "\ufffd" in parsed.model


OLLAMA = {
    "model": "chat",
    "messages": [
        {"role": "user", "content": "a", "images": ["iVBORw0KGgo="]},
        {
            "role": "assistant",
            "thinking": "b",
            "tool_calls": [{"function": {"name": "f", "arguments": {"a": [1]}}}],
        },
        {"role": "tool", "content": "c", "tool_name": "f"},
    ],
    "options": {"num_ctx": 4096, "seed": 1, "stop": ["x"], "num_predict": -1},
    "format": {"type": "object"},
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    "keep_alive": "5m",
    "think": "low",
    "logprobs": True,
    "prompt": "p",
    "system": "s",
    "suffix": "",
    "input": ["a", "b"],
    "dimensions": 2,
}
FORMS = {
    ollama.Chat: ollama.chat,
    ollama.Generate: ollama.generate,
    ollama.Embed: lambda request: ollama.embed(request.input),
    ollama.Embeddings: lambda request: ollama.embed(request.prompt),
    ollama.Streamed: lambda request: None,
}


@harness(
    strategies.tuples(
        strategies.sampled_from(list(FORMS)),
        strategies.one_of(
            damaged(OLLAMA).map(json.dumps).map(encoded), mutated(json.dumps(OLLAMA).encode())
        ),
    ),
    spoil=replace(ollama, "_image", lambda text: {"x": base64.b64decode(text, validate=True)[0]}),
    cases=[
        (ollama.Chat, b'{"messages": [{"role": "\xff"}]}'),
        (ollama.Chat, b'{"messages": [{"role": "a", "content": "\\ud800"}]}'),
        (ollama.Chat, b'{"options": {"num_ctx": 1e308, "seed": 123456789012345678901234567890}}'),
        (ollama.Chat, b'{"keep_alive": 1e308, "messages": []}'),
        (ollama.Chat, b"[" * 100_000),
        (
            ollama.Generate,
            b'{"prompt": "a", "top_logprobs": 123456789012345678901234567890, "logprobs": true}',
        ),
        (ollama.Generate, b'{"prompt": "a", "images": ["\xc3\xa4"]}'),
        (ollama.Embed, b'{"input": "\xff"}'),
    ],
)
def ollama_requests(example: tuple[Any, bytes], folder: Path) -> None:
    """What is accepted can be sent on, as JSON."""
    kind, body = example
    try:
        request = ollama.decoded(body, kind)
        translated = FORMS[kind](request)
        keep = seconds(request.keep_alive)
    except Refused as refused:
        assert refused.status == 400
        json.dumps(refused.message)
        return
    if keep is not None:
        ends_well(keep)
    ollama.context(request.options)
    ollama.unknown(request.options or {})
    if translated and translated.path:
        sent = msgspec.json.encode({"model": "x", **translated.body})
        json.loads(sent.decode("utf-8", "replace"))


@harness(
    strategies.one_of(pieces("1", "5", "m", "h", "ns", "µs", "-", "+", ".", "1h30m"), texts),
    spoil=replace(request_body, "UNITS", {}),
    cases=["9" * 500 + "h", "1m" * 50_000, "-5m", "0"],
)
def durations(text: str, folder: Path) -> None:
    try:
        keep = seconds(text)
    except Refused:
        return
    assert keep is not None
    ends_well(keep)
    at = Folder(folder)
    usage.write(at, usage.Usage(pid=1, started=1.0, servers={"x": usage.ServerUse(keep=keep)}))
