"""Harnesses for what servers answer: streams, documents, metrics, and GitHub's releases."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
from gateway_tools import instance
from hostile_input import cuts, damaged, encoded, harness, mutated, replace
from hypothesis import strategies

from pipeline.chat import completions
from pipeline.core.errors import PipelineError
from pipeline.serve.gateway import upstream
from pipeline.serve.gateway.ollama import replies
from pipeline.serve.gateway.renaming import Renamed, renaming
from pipeline.serve.gateway.servers import Target
from pipeline.serve.gateway.upstream import Answer

# Events

EVENT = {
    "choices": [
        {
            "delta": {
                "content": "hä",
                "reasoning_content": "b",
                "tool_calls": [
                    {"index": 0, "id": "c", "function": {"name": "f", "arguments": "{}"}}
                ],
            },
            "finish_reason": "stop",
            "logprobs": {"content": [{"token": "a"}]},
        }
    ],
    "usage": {"prompt_tokens": 3, "completion_tokens": 4},
    "timings": {
        "prompt_ms": 1.5,
        "predicted_ms": 2.5,
        "predicted_n": 4,
        "predicted_per_second": 9.0,
    },
    "error": None,
}
DONE = b"data: [DONE]\n\n"


def event(document: Any) -> bytes:
    return b"data: " + json.dumps(document).encode() + b"\n\n"


STREAMS = (
    b": waiting\n\n" + event(EVENT) * 2 + DONE,
    event(EVENT).replace(b"\n", b"\r\n") + b"event: error\ndata: {}\n\n",
    b'error: {"message": "x", "code": 503}\n\n',
)
streams = strategies.one_of(
    mutated(*STREAMS),
    strategies.lists(damaged(EVENT).map(event), max_size=3).map(
        lambda events: b"".join(events) + DONE
    ),
)
ODD_EVENTS = (
    event({"timings": {"prompt_ms": 1e308}}) + DONE,
    event({"error": {"code": 10**30, "message": 10**30}}),
    event({"error": 10**30}),
    event({"error": {"code": True, "message": ["\ud800"]}}),
    b'data: {"choices": [{"delta": {"content": "\xff"}}]}\n\n' + DONE,
    b'data: {"error": "\xff"}\n\n',
    b"data: " + b"[" * 100_000 + b"\n\n",
    b'data: {"error": ' + b"[" * 100_000 + b"\n\n",
    event(
        {
            "choices": [
                {"delta": {"tool_calls": [{"function": {"arguments": '{"a": ' + "9" * 40 + "}"}}]}}
            ]
        }
    )
    + DONE,
    event({"choices": [{"delta": {"tool_calls": [{"function": {"arguments": '{"a": 1e999}'}}]}}]})
    + DONE,
    event({"usage": {"prompt_tokens": 10**30}}) + DONE,
)
ODD_CUTS = [[odd] for odd in ODD_EVENTS]


def without_times(lines: bytes) -> list[Any]:
    """The objects of NDJSON, less what depends on the clock."""
    objects = [json.loads(line) for line in lines.splitlines()]
    return [
        {key: each[key] for key in each if key not in ("created_at", "total_duration")}
        for each in objects
    ]


@harness(
    cuts(streams),
    spoil=replace(replies.Text, "feed", lambda self, block: self._line(block)),
    cases=ODD_CUTS,
)
def ollama_stream(blocks: list[bytes], folder: Path) -> None:
    """Every line is JSON, and the same comes of a stream however it is cut."""
    for is_chat in (True, False):

        def translated(pieces: Sequence[bytes], is_chat: bool = is_chat) -> bytes:
            text = replies.Text("chat", is_chat=is_chat)
            out = b"".join(replies.lines(text.feed(piece)) for piece in pieces)
            return out + replies.lines(text.end())

        def whole(data: bytes, is_chat: bool = is_chat) -> Any:
            text = replies.Text("chat", is_chat=is_chat)
            made = replies.joined([*text.feed(data), *text.end()])
            assert text.error_status == 0 or 400 <= text.error_status < 600
            return json.loads(msgspec.json.encode(made))

        lines = translated(blocks)
        assert without_times(lines) == without_times(translated([b"".join(blocks)]))
        whole(b"".join(blocks))


VECTORS = {"data": [{"embedding": [0.5, -1]}], "usage": {"prompt_tokens": 3}}


@harness(
    strategies.one_of(
        damaged(VECTORS).map(json.dumps).map(encoded), mutated(json.dumps(VECTORS).encode())
    ),
    spoil=replace(replies, "shortened", lambda vector, dimensions: json.loads(vector)[dimensions]),
    cases=[
        b'{"data": [{"embedding": "\xff"}]}',
        b'{"data": [{"embedding": [1e308, 1e308]}]}',
        b'{"data": [{"embedding": [1]}], "usage": {"prompt_tokens": ' + b"9" * 30 + b"}}",
        b"[" * 100_000,
        b'{"data": ' + b"[" * 100_000,
    ],
)
def ollama_vectors(document: bytes, folder: Path) -> None:
    """As the gateway answers with them."""
    for dimensions in (None, 2):
        reply = replies.Vectors("x", dimensions=dimensions)
        try:
            made = reply.read(document)
        except msgspec.DecodeError:
            continue
        json.loads(msgspec.json.encode(made).decode("utf-8", "replace"))


@harness(
    strategies.one_of(
        damaged({"error": {"message": "x", "code": 503}}).map(json.dumps).map(encoded),
        mutated(b'{"error": "x"}', b"<html>", b'{"detail": [{"msg": "x"}]}'),
    ),
    spoil=replace(replies, "error_of", lambda document, status=0: (json.loads(document), 500)),
    cases=[b"9" * 40, b"[" * 100_000, b'"\xff"', b'{"error": {"code": 1e400}}', b"", b'""'],
)
def server_errors(document: bytes, folder: Path) -> None:
    for status in (0, 400):
        text, code = replies.error_of(document, status)
        assert isinstance(text, str) and text and 400 <= code < 600
        msgspec.json.encode({"error": text})


CHAT = completions.ChatServer(url="http://x", model="x")


async def _pieces(blocks: Iterable[bytes]) -> AsyncIterator[bytes]:
    for block in blocks:
        yield block


@harness(
    cuts(streams),
    spoil=replace(completions, "_lines", lambda pieces: pieces),
    cases=ODD_CUTS,
)
def chat_stream(blocks: list[bytes], folder: Path) -> None:
    """The same comes of a stream however it is cut: chunks of an answer, and an error at most."""

    def read(pieces: Sequence[bytes]) -> list[Any]:
        async def collect() -> list[Any]:
            made: list[Any] = []
            try:
                async for chunk in completions._chunks(CHAT, _pieces(pieces)):
                    made.append(chunk)
                    completions._ending(CHAT, chunk.timings or completions.Timings(), is_cut=True)
            except PipelineError as error:
                made.append(str(error))
            return made

        return asyncio.run(collect())

    assert read(blocks) == read([b"".join(blocks)])


@harness(
    strategies.tuples(
        strategies.sampled_from([0, 200, 400, 401, 503]),
        strategies.one_of(
            damaged({"error": {"message": "x", "type": "y", "n_ctx": 1, "n_prompt_tokens": 2}})
            .map(json.dumps)
            .map(encoded),
            mutated(b'{"error": "x"}', b"<html>"),
        ),
    ),
    spoil=replace(completions, "_shown", lambda text: text.decode()),
    cases=[(400, b"[" * 100_000), (400, b'"\xff"'), (0, b'{"error": "\xff"}')],
)
def chat_errors(example: tuple[int, bytes], folder: Path) -> None:
    error = completions.refusal(CHAT, *example)
    assert isinstance(error, PipelineError) and len(str(error)) < 1000


# HTTP

ANSWERS = (
    b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Type: text/event-stream\r\n\r\nhello",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.0 200 OK\r\n\r\nhello",
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\nhello",
)


@harness(
    cuts(mutated(*ANSWERS)),
    spoil=replace(upstream.httptools, "HttpParserError", ZeroDivisionError),
    cases=[
        [b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello"],
        [b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\n"],
        [b"HTTP/1.1 999 X\r\nContent-Length: 0\r\n\r\n"],
        [b"HTTP/1.1 0 X\r\n\r\n"],
        [*ANSWERS[4:], b"more"],
        [b"\0" * 50],
    ],
)
def server_answers(blocks: list[bytes], folder: Path) -> None:
    """An answer ends once, with a failure or as a whole; what is returned can be sent by h11."""

    def read(pieces: Sequence[bytes]) -> tuple[int, bytes, bool]:
        answer = Answer((b"",), is_head=False)
        closed = SimpleNamespace(writelines=lambda blocks: None, abort=lambda: None)
        answer.connection_made(closed)
        for piece in pieces:
            answer.data_received(piece)
        answer.connection_lost(None)
        assert answer.ended.is_set() and answer.began.is_set()
        _ = (answer.is_events, answer.is_compressed, answer.length)
        returned = upstream.returned_headers(answer.headers)
        assert not any(b"\n" in value or b"\r" in value for header in returned for value in header)
        return answer.status, answer.kept, bool(answer.failure)

    async def both() -> tuple[Any, Any]:
        return read(blocks), read([b"".join(blocks)])

    cut, whole = asyncio.run(both())
    assert cut[0] == whole[0] and (cut == whole or whole[2])


@harness(
    cuts(
        strategies.lists(
            strategies.sampled_from(
                [b'"model": "chat"', b'"model":"\\u00fc"', b"\n", b"x", b"\xff"]
            )
        ).map(b"".join)
    ),
    spoil=replace(Renamed, "end", lambda self: None),
)
def renamed_stream(blocks: list[bytes], folder: Path) -> None:
    target = Target(instance=instance("chat", aliases=("ü",)), state="ready")
    rename = renaming(target, "other")
    assert rename
    out: list[bytes] = []
    stream = Renamed(out.append, rename)
    for block in blocks:
        stream.write(block)
    stream.end()
    whole = rename(b"".join(blocks))
    assert b"".join(out) == whole
    assert b'"chat"' not in whole and b"u00fc" not in whole
