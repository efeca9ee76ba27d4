"""A conversation, and its answers as a server's /v1/chat/completions streams them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from typing import Any

import httpx2
import msgspec
from msgspec import Struct
from msgspec.structs import replace

from pipeline.core.errors import PipelineError
from pipeline.core.text import printable

CONNECT_SECONDS = 10.0
SILENCE_SECONDS = 3600.0  # a long prompt takes long without a GPU
LONGEST_LINE = 1024 * 1024  # bytes of a streamed event
LONGEST_ERROR = 16 * 1024  # bytes of an error that are read
ERROR_SECONDS = 10.0  # for these
MOST_TEXT = 16 * 1024 * 1024  # characters of an answer; a million tokens are some 4 million
SHOWN = 300  # characters of a server's message
DONE = b"[DONE]"
FULL = ("exceed_context_size_error", "maximum context length")  # llama-server's, vLLM's


class ChatServer(Struct, frozen=True, kw_only=True):
    """The server and the model that answer. `context` is in tokens; None: not known. `larger` says
    how to get more."""

    url: str
    model: str
    key: str = ""
    context: int | None = None
    larger: str = "a server with a larger ctx_size"


class Message(Struct, frozen=True):
    """A message of a conversation: `role` is system, user or assistant."""

    role: str
    content: str


class Conversation:
    """Questions and answers in turn, after the system's message if there is one."""

    def __init__(self, system: str = "") -> None:
        self.system = system
        self.turns: list[Message] = []

    @property
    def messages(self) -> list[Message]:
        """What a server is sent."""
        return [*([Message("system", self.system)] if self.system else []), *self.turns]

    def ask(self, question: str) -> None:
        self.turns.append(Message("user", question))

    def take(self, answer: str) -> None:
        """Keep the answer, as far as it came; the question goes too where there is none."""
        if answer.strip():
            self.turns.append(Message("assistant", answer))
        else:
            self.take_back()

    def take_back(self) -> str:
        """Drop the last question with its answer, and return it; empty where there is none."""
        while self.turns:
            turn = self.turns.pop()
            if turn.role == "user":
                return turn.content
        return ""


class Ending(Struct, frozen=True, kw_only=True):
    """How an answer ended: its tokens and tokens a second, 0 where the server does not report them,
    and why it was cut, if it was; `is_full`: the context has no room for more."""

    tokens: int = 0
    speed: float = 0.0
    cut: str = ""
    is_full: bool = False


class ContextFull(PipelineError):
    """The conversation is longer than the context."""


# What is read of an event


class Delta(Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None  # vLLM's name


class StreamedChoice(Struct):
    delta: Delta = msgspec.field(default_factory=Delta)
    finish_reason: str | None = None


class Timings(Struct):
    cache_n: int = 0
    prompt_n: int = 0
    predicted_n: int = 0
    predicted_per_second: float | None = None


class Chunk(Struct):
    choices: list[StreamedChoice] = msgspec.field(default_factory=list)
    timings: Timings | None = None
    error: Any = None


async def answer(
    server: ChatServer, messages: Sequence[Message], show: Callable[[str, str], None]
) -> Ending:
    """Send the messages, and pass each piece of the answer to `show(text, reasoning)`, free of
    control characters. A cancelled call ends the request at the server. Raises PipelineError."""
    body = {
        "model": server.model,
        "messages": msgspec.to_builtins(messages),
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    headers = {"authorization": f"Bearer {server.key}"} if server.key else {}
    timeout = httpx2.Timeout(SILENCE_SECONDS, connect=CONNECT_SECONDS)
    finish, timings, length = "", Timings(), 0
    try:
        async with (
            httpx2.AsyncClient(timeout=timeout, trust_env=False) as client,
            client.stream(
                "POST", f"{server.url}/v1/chat/completions", json=body, headers=headers
            ) as response,
        ):
            if response.status_code != 200:
                raise refusal(server, response.status_code, await _beginning(response))
            async for chunk in _chunks(server, response.aiter_bytes()):
                timings = chunk.timings or timings
                for choice in chunk.choices[:1]:
                    delta, finish = choice.delta, choice.finish_reason or finish
                    reasoning = delta.reasoning_content or delta.reasoning or ""
                    length += len(delta.content or "") + len(reasoning)
                    if length > MOST_TEXT:
                        raise PipelineError(
                            f"{server.url}: the answer is longer than {MOST_TEXT:,} characters",
                            "the server does not end it; its log may say why",
                        )
                    if delta.content or reasoning:
                        show(printable(delta.content or ""), printable(reasoning))
    except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
        raise PipelineError(
            f"nothing answers at {server.url}: {str(error) or 'no connection in time'}",
            "is the server still running?",
        ) from None
    except (httpx2.RequestError, httpx2.InvalidURL) as error:
        raise PipelineError(
            f"{server.url}: the connection broke: {str(error) or type(error).__name__}",
            "is the server still running? Its log says more",
        ) from None
    if not finish:
        raise PipelineError(
            f"{server.url} ended the answer in the middle", "ask again; the server's log says more"
        )
    return _ending(server, timings, is_cut=finish == "length")


def _ending(server: ChatServer, timings: Timings, *, is_cut: bool) -> Ending:
    ending = Ending(tokens=timings.predicted_n, speed=timings.predicted_per_second or 0.0)
    if not is_cut:
        return ending
    used = timings.cache_n + timings.prompt_n + timings.predicted_n
    if server.context and used and used < server.context - 1:
        return replace(ending, cut=f"the answer was cut at {ending.tokens:,} tokens, a limit")
    size = f" of {server.context:,} tokens" if server.context else ""
    return replace(ending, cut=f"the answer was cut: the context{size} is full", is_full=True)


async def _beginning(response: httpx2.Response) -> bytes:
    """The first bytes of a response that is not an answer."""
    body = bytearray()
    with suppress(TimeoutError):
        async with asyncio.timeout(ERROR_SECONDS):
            async for piece in response.aiter_bytes():
                body += piece
                if len(body) >= LONGEST_ERROR:
                    break
    return bytes(body[:LONGEST_ERROR])


async def _chunks(server: ChatServer, pieces: AsyncIterator[bytes]) -> AsyncIterator[Chunk]:
    """The events of a stream, until its end or [DONE]. Raises PipelineError for an error in it, or
    for what is not an event of an answer."""
    async for line in _lines(pieces):
        name, colon, data = line.partition(b":")
        data = data.strip()
        if not colon or name not in (b"data", b"error"):
            continue  # a comment, or the name of an event
        if data == DONE:
            return
        if name == b"error":
            raise refusal(server, 0, b'{"error": %b}' % data)
        try:
            chunk = msgspec.json.decode(data, type=Chunk)
        except (msgspec.DecodeError, RecursionError):
            raise PipelineError(
                f"{server.url} sends what is not an answer: {_shown(data)}",
                "is it the address of a server for models?",
            ) from None
        if chunk.error is not None:
            raise refusal(server, 0, data)
        yield chunk


async def _lines(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    rest = b""
    async for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield line
        if len(rest) > LONGEST_LINE:
            raise PipelineError("the server sends a line without end", "is it a server for models?")
    yield rest


def refusal(server: ChatServer, status: int, body: bytes) -> PipelineError:
    """The error for a response that is not an answer; `status` 0: it came in the middle of a
    stream."""
    try:
        data = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError):
        data = None
    error = data.get("error", data) if isinstance(data, dict) else None
    details = error if isinstance(error, dict) else {}
    message = _shown(str(details.get("message") or (error if isinstance(error, str) else "")))
    if any(word in f"{details.get('type')} {message}" for word in FULL):
        return ContextFull(_too_long(details, message), server.larger)
    if status in (401, 403):
        return PipelineError(
            f"{server.url}: the API key is missing or wrong", "pass api_key_file=PATH"
        )
    if status == 503:
        return PipelineError(f"{server.url}: {message or 'not ready'}", "try again in a moment")
    what = f"answers with {status}" if status else "ended the answer with an error"
    return PipelineError(
        f"{server.url} {what}{f': {message}' if message else ''}", "the server's log says more"
    )


def _too_long(details: dict[str, Any], message: str) -> str:
    taken, size = details.get("n_prompt_tokens"), details.get("n_ctx")
    if isinstance(taken, int) and isinstance(size, int):
        return (
            f"the context is full: the conversation takes {taken:,} tokens, the context holds "
            f"{size:,}"
        )
    return f"the context is full: {message}"


def _shown(text: str | bytes) -> str:
    """What a server wrote, on one line and not too long."""
    if isinstance(text, bytes):
        text = text.decode("utf-8", "replace")
    line = " ".join(printable(text).split())
    return line if len(line) <= SHOWN else f"{line[:SHOWN]}…"
