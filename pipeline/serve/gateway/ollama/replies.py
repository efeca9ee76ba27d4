"""An instance's answers as Ollama's: decisions without effects."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from http import HTTPStatus
from typing import Any

import msgspec
from msgspec import Raw, Struct, field

from pipeline.serve.gateway.answers import utc

Object = dict[str, Any]
SECOND, MILLISECOND = 1_000_000_000, 1_000_000  # in nanoseconds
LONGEST_LINE = 16 * 1024 * 1024  # bytes of an event
REASONS = {"tool_calls": "stop", "eos": "stop", "word": "stop", "limit": "length"}


class _FunctionDelta(Struct):
    name: str | None = None
    arguments: str | None = None


class _CallDelta(Struct):
    index: int = 0
    id: str | None = None
    function: _FunctionDelta = field(default_factory=_FunctionDelta)


class _Delta(Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None  # vLLM's newer name
    tool_calls: list[_CallDelta] | None = None


class _Logprobs(Struct):
    content: list[Raw] | None = None


class _Choice(Struct):
    delta: _Delta = field(default_factory=_Delta)
    text: str | None = None  # of /v1/completions
    logprobs: _Logprobs | None = None
    finish_reason: str | None = None


class _Usage(Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Timings(Struct):
    """llama-server's; without the tokens of the prompt that were in its cache."""

    prompt_ms: float | None = None
    predicted_ms: float | None = None


class _Event(Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    timings: _Timings | None = None
    error: Raw = Raw()
    # of /infill
    content: str | None = None
    stop_type: str | None = None
    tokens_evaluated: int | None = None
    tokens_predicted: int | None = None


class _Vector(Struct):
    embedding: Raw


class _Vectors(Struct):
    data: list[_Vector]
    usage: _Usage | None = None


class OllamaReply:
    """The answer to one request, which waited `load_seconds` for an instance."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.load_seconds: float | None = None
        self._began = time.monotonic()

    def object(self, **fields: Any) -> Object:
        """An object of Ollama's answer, with the fields that all have."""
        return {"model": self.model, "created_at": utc(time.time()), **fields}

    def durations(self) -> Object:
        total = time.monotonic() - self._began
        return _known(
            total_duration=int(total * SECOND),
            load_duration=_scaled(self.load_seconds, SECOND),
        )


class Text(OllamaReply):
    """An answer that comes as events, each of which becomes an object. `chat` or `generate`."""

    def __init__(self, model: str, *, is_chat: bool = False) -> None:
        super().__init__(model)
        self.error_status = 0  # of an error among the events
        self._is_chat = is_chat
        self._rest = b""
        self._calls: dict[int, _CallDelta] = {}
        self._reason: str | None = None
        self._counts: Object = {}
        self._ended = False

    def feed(self, block: bytes) -> Iterator[Object]:
        """The objects of the events that are complete by now."""
        *lines, self._rest = (self._rest + block).split(b"\n")
        if len(self._rest) > LONGEST_LINE:
            self._rest = b""  # no event is as long
        for line in lines:
            yield from self._line(line)

    def end(self) -> Iterator[Object]:
        """The last objects."""
        yield from self._line(self._rest)
        yield from self._last()

    def sign_of_life(self) -> Object:
        """What a client gets while it waits: a piece of the answer without any text."""
        return self.object(**self._content("", ""), done=False)

    def loaded(self, *, unloads: bool) -> Object:
        """The answer to a request that only has a model loaded, or asks to unload it."""
        reason = "unload" if unloads else "load"
        return self.object(**self._content("", ""), done=True, done_reason=reason)

    def _line(self, line: bytes) -> Iterator[Object]:
        name, _, text = line.strip().partition(b":")
        text = text.strip()
        if self._ended or name not in (b"data", b"error") or not text:
            return
        if text == b"[DONE]":
            yield from self._last()
            return
        try:
            event = msgspec.json.decode(text, type=_Event)
        except (msgspec.DecodeError, RecursionError):
            event = _Event(error=Raw(b'"the instance sent an event that cannot be read"'))
        if name == b"error" or bytes(event.error) not in (b"", b"null"):
            yield self._failed(event.error or Raw(text))
            return
        self._count(event)
        for choice in event.choices or [_Choice(text=event.content)]:
            yield from self._choice(choice)
        if event.stop_type in REASONS:
            self._reason = REASONS[event.stop_type]

    def _choice(self, choice: _Choice) -> Iterator[Object]:
        delta = choice.delta
        content = delta.content or choice.text or ""
        thinking = delta.reasoning_content or delta.reasoning or ""
        for part in delta.tool_calls or []:
            call = self._calls.setdefault(part.index, _CallDelta(part.index))
            call.id = call.id or part.id
            call.function.name = (call.function.name or "") + (part.function.name or "")
            call.function.arguments = (call.function.arguments or "") + (
                part.function.arguments or ""
            )
        if choice.finish_reason:
            self._reason = REASONS.get(choice.finish_reason, choice.finish_reason)
        logprobs = choice.logprobs.content if choice.logprobs else None
        if content or thinking or logprobs:
            more = {"logprobs": logprobs} if logprobs else {}
            yield self.object(**self._content(content, thinking), **more, done=False)

    def _content(self, content: str, thinking: str, calls: Sequence[Object] = ()) -> Object:
        thought = {"thinking": thinking} if thinking else {}
        called = {"tool_calls": calls} if calls else {}
        if self._is_chat:
            return {"message": {"role": "assistant", "content": content, **thought, **called}}
        return {"response": content, **thought}

    def _last(self) -> Iterator[Object]:
        if self._ended:
            return
        self._ended = True
        calls = [
            {
                **({"id": call.id} if call.id else {}),
                "function": {"index": index, "name": call.function.name, "arguments": arguments},
            }
            for index, call in sorted(self._calls.items())
            if (arguments := _object(call.function.arguments)) is not None
        ]
        if calls:
            yield self.object(**self._content("", "", calls), done=False)
        reason = {"done_reason": self._reason} if self._reason else {}
        times = self.durations() | self._counts
        yield self.object(**self._content("", ""), done=True, **reason, **times)

    def _count(self, event: _Event) -> None:
        usage = event.usage or _Usage(event.tokens_evaluated, event.tokens_predicted)
        timings = event.timings or _Timings()
        self._counts |= _known(
            prompt_eval_count=usage.prompt_tokens,
            prompt_eval_duration=_scaled(timings.prompt_ms, MILLISECOND),
            eval_count=usage.completion_tokens,
            eval_duration=_scaled(timings.predicted_ms, MILLISECOND),
        )

    def _failed(self, error: Raw) -> Object:
        self._ended = True
        message, self.error_status = error_of(error)
        return {"error": message}


class Vectors(OllamaReply):
    """One document with vectors, each cut to `dimensions` numbers; None: whole."""

    def __init__(
        self, model: str, *, dimensions: int | None = None, is_single: bool = False
    ) -> None:
        super().__init__(model)
        self._dimensions = dimensions
        self._is_single = is_single

    def read(self, document: bytes) -> Object:
        """Raises msgspec.DecodeError."""
        answer = msgspec.json.decode(document, type=_Vectors)
        vectors: list[Any] = [vector.embedding for vector in answer.data]
        if self._dimensions and self._dimensions > 0:
            vectors = [shortened(vector, self._dimensions) for vector in vectors]
        return self.made(vectors, answer.usage)

    def loaded(self, *, unloads: bool) -> Object:
        return self.made([], None)

    def made(self, vectors: list[Any], usage: _Usage | None) -> Object:
        if self._is_single:
            return {"embedding": vectors[0] if vectors else []}
        counts = _known(prompt_eval_count=usage.prompt_tokens if usage else None)
        return {"model": self.model, "embeddings": vectors, **self.durations(), **counts}


def shortened(vector: Raw, dimensions: int) -> list[float]:
    """The first numbers of a vector, with length 1 again."""
    numbers = msgspec.json.decode(vector, type=list[float])[:dimensions]
    length = math.hypot(*numbers) or 1.0
    return [number / length for number in numbers]


def joined(objects: Sequence[Object]) -> Object:
    """The objects of a stream joined into one; the error, where the stream ended with one."""
    last = dict(objects[-1])
    if "error" in last:
        return last
    is_chat = "message" in last
    name = "content" if is_chat else "response"
    parts = [each["message"] if is_chat else each for each in objects]
    whole: Object = {name: "".join(part[name] for part in parts)}
    if thinking := "".join(part.get("thinking", "") for part in parts):
        whole["thinking"] = thinking
    if calls := [call for part in parts for call in part.get("tool_calls", ())]:
        whole["tool_calls"] = calls
    if logprobs := [each for part in objects for each in part.get("logprobs", ())]:
        last["logprobs"] = logprobs
    return last | ({"message": {"role": "assistant", **whole}} if is_chat else whole)


def lines(objects: Iterable[Object]) -> bytes:
    """The objects as NDJSON."""
    return b"".join(msgspec.json.encode(each) + b"\n" for each in objects)


def error_of(document: bytes | Raw, status: int = 0) -> tuple[str, int]:
    """The text and the status of an error in the form of OpenAI's API, or in any other. `status` is
    that of the answer, 0 for an event in an answer."""
    try:
        error = msgspec.json.decode(document)
    except (msgspec.DecodeError, RecursionError):
        error = bytes(document).decode("utf-8", "replace").strip()
    if isinstance(error, dict):
        error = error.get("error") or error
    code = error.get("code") if isinstance(error, dict) else None
    if isinstance(error, dict):
        error = error.get("message") or error.get("detail") or error
    if not status:
        status = code if isinstance(code, int) and 400 <= code < 600 else 500
    text = error if isinstance(error, str) else msgspec.json.encode(error).decode()
    return text or HTTPStatus(status).phrase, status


def _object(text: str | None) -> Object | None:
    """The arguments of a call; None where they are no object, as in one that was cut short."""
    try:
        return msgspec.json.decode(text or "{}", type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError):
        return None


def _known(**values: Any) -> Object:
    return {name: value for name, value in values.items() if value is not None}


def _scaled(value: float | None, unit: int) -> int | None:
    scaled = (value or 0.0) * unit
    return None if value is None or math.isinf(scaled) else int(scaled)
