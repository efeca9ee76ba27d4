"""Ollama's requests as requests for an instance: decisions without effects.

Fields that only pass through stay bytes (`Raw`): a tool's schema or a list of texts to embed is
never built. What Ollama ignores is ignored here too.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import msgspec
from msgspec import Raw, Struct, field

from pipeline.serve.gateway.request_body import BOM, parse_body, require_few_values
from pipeline.serve.guard.refusal import Refused

# Values that mean the same as an absent field.
EMPTY = (b"", b"null", b'""', b"[]", b"{}")

# Options of one request, by their name in an instance's API.
SAME_NAME = """
    temperature top_k top_p min_p typical_p repeat_last_n repeat_penalty presence_penalty
    frequency_penalty seed stop mirostat mirostat_tau mirostat_eta
"""
SAMPLING = {
    **{name: name for name in SAME_NAME.split()},
    "num_keep": "n_keep",
    "num_predict": "max_tokens",
}
VLLM_NAMES = {"repeat_penalty": "repetition_penalty"}  # an engine ignores the other's name
LEAST = {"num_predict": 1, "seed": 0}  # smaller values mean the default: no limit, a random seed
NUM_CTX = "num_ctx"
# Options of an instance's start, which a request cannot change.
OF_THE_START = (
    *(NUM_CTX, "num_batch", "num_gpu", "main_gpu", "num_thread", "numa", "low_vram", "f16_kv"),
    *("use_mmap", "use_mlock", "vocab_only", "logits_all", "embedding_only"),
)
# Backslashes that are text, a whole pair of escapes, or half of one (the group), which JavaScript
# sends of a text that it has cut.
HIGH, LOW = rb"u[dD][89abAB][0-9a-fA-F]{2}", rb"u[dD][c-fC-F][0-9a-fA-F]{2}"
HALF = re.compile(rb"\\(?:\\(?:\\\\)*+|%b\\%b|(%b|%b))" % (HIGH, LOW, HIGH, LOW))
UNKNOWN = rb"\ufffd"
EFFORTS = ("low", "medium", "high")  # of a model that thinks
# How the images that llama.cpp reads begin.
IMAGES = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif", b"BM": "bmp", b"RIFF": "webp"}
SNIFFED = 16  # characters of base64


class Function(Struct):
    name: str
    arguments: Raw = Raw(b"{}")


class ToolCall(Struct):
    function: Function
    id: str | None = None


class Turn(Struct):
    role: str
    content: str | None = None
    thinking: str | None = None
    images: list[str] | None = None  # base64
    tool_calls: list[ToolCall] | None = None
    tool_name: str | None = None  # of a tool's result
    tool_call_id: str | None = None


class AnyRequest(Struct):
    """The fields of all requests. `keep_alive`: a number of seconds or a duration such as `5m`."""

    model: str | None = None
    name: str | None = None  # an older spelling
    options: dict[str, Raw] | None = None
    keep_alive: float | str | None = None

    @property
    def model_name(self) -> str | None:
        """The model that it names."""
        return self.model or self.name or None

    @property
    def streams(self) -> bool:
        """Whether the answer comes as a stream."""
        return False


class Streamed(AnyRequest):
    """A request whose answer is a stream unless it says otherwise."""

    stream: bool | None = None

    @property
    def streams(self) -> bool:
        return self.stream is not False


class Generation(Streamed):
    """The fields of requests for text."""

    format: Raw = Raw()
    think: bool | str | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


class Chat(Generation):
    messages: list[Turn] | None = None
    tools: Raw = Raw()


class Generate(Generation):
    prompt: str | None = None
    suffix: str | None = None
    system: str | None = None
    template: str | None = None
    raw: bool | None = None
    images: list[str] | None = None


class Embed(AnyRequest):
    input: Raw = Raw()
    dimensions: int | None = None


class Embeddings(AnyRequest):
    prompt: str | None = None


class Translated(Struct, frozen=True):
    """The request for an instance. Without a path the model only has to be loaded."""

    path: str = ""
    body: Mapping[str, Any] = field(default_factory=dict)


R = TypeVar("R", bound=AnyRequest)


def decoded(body: bytes, kind: type[R]) -> R:
    """A request. Half of a pair of escapes is read as Ollama does: llama-server would refuse all of
    the conversation. Raises Refused."""
    try:
        return _decoded(body, kind)
    except Refused:
        mended = HALF.sub(lambda found: UNKNOWN if found[1] else found[0], body)
        if mended == body:
            raise
    return _decoded(mended, kind)


def _decoded(body: bytes, kind: type[R]) -> R:
    parse_body("", body)
    require_few_values(body)
    try:
        return msgspec.json.decode(body.removeprefix(BOM) or b"{}", type=kind)
    except (msgspec.DecodeError, RecursionError) as error:  # a ValidationError is one too
        raise Refused(400, f"invalid request: {error}") from None


def chat(request: Chat) -> Translated:
    """Raises Refused."""
    if not request.messages:
        return Translated()
    tools = list(_tools(request.tools))
    return _conversation(
        request, list(_messages(request.messages)), {"tools": tools} if tools else {}
    )


def generate(request: Generate) -> Translated:
    """Raises Refused."""
    if request.template:
        raise Refused(
            400,
            "template is not supported: the model's own chat template applies; leave it out, pass "
            "raw, or set chat_template_file in the instance's server table",
        )
    if request.raw and request.system:
        raise Refused(400, "raw mode does not support system: write it into the prompt")
    if not (request.prompt or request.suffix or request.images):
        return Translated()
    prompt = request.prompt or ""
    if request.raw or request.suffix:
        if request.images:
            raise Refused(400, "images need the model's template: leave out raw and suffix")
        if request.suffix:
            ends = {"input_prefix": prompt, "input_suffix": request.suffix}
            return Translated("/infill", {**ends, **_plain(request)})
        return Translated("/v1/completions", {"prompt": prompt, **_plain(request)})
    turns = [Turn("system", request.system)] if request.system else []
    turns.append(Turn("user", prompt, images=request.images))
    return _conversation(request, list(_messages(turns)), {})


def embed(texts: Raw | str | None) -> Translated:
    """A text or a list of texts. Raises Refused."""
    if not texts or (isinstance(texts, Raw) and bytes(texts) in EMPTY):
        return Translated()
    if isinstance(texts, Raw) and not bytes(texts).startswith((b'"', b"[")):
        raise Refused(400, "input must be a text or a list of texts")
    return Translated("/v1/embeddings", {"input": texts, "encoding_format": "float"})


def unknown(options: Iterable[str]) -> list[str]:
    """The options that are not known."""
    return [name for name in options if name not in SAMPLING and name not in OF_THE_START]


def context(options: Mapping[str, Raw] | None) -> int:
    """The context that a request asks for, in tokens; 0 where it asks for none."""
    value = _number((options or {}).get(NUM_CTX))
    return int(value) if value and 0 < value < 1e12 else 0


def _conversation(
    request: Generation, messages: Sequence[Mapping[str, Any]], tools: Mapping[str, Any]
) -> Translated:
    body: dict[str, Any] = {"messages": messages, **tools, **_options(request)}
    if schema := _schema(request.format):
        body["response_format"] = (
            {"type": "json_object"}
            if schema is JSON
            else {"type": "json_schema", "json_schema": {"name": "format", "schema": schema}}
        )
    if request.logprobs:
        body |= {"logprobs": True, "top_logprobs": max(1, request.top_logprobs or 0)}
    if request.think not in (None, "", True, False, *EFFORTS):
        raise Refused(400, 'think must be true, false, "low", "medium" or "high"')
    if request.think not in (None, ""):
        body["chat_template_kwargs"] = {"enable_thinking": bool(request.think)}
    if isinstance(request.think, str) and request.think:
        body["reasoning_effort"] = request.think
    return Translated("/v1/chat/completions", body)


def _plain(request: Generation) -> dict[str, Any]:
    """What a request without a conversation has beside its prompt."""
    body = _options(request)
    if schema := _schema(request.format):
        body["json_schema"] = schema
    if request.logprobs:
        body["n_probs"] = max(1, request.top_logprobs or 0)
    return body


FUNCTION = Raw(b'"function"')
JSON = Raw(b'{"type":"object"}')


def _tools(tools: Raw) -> Iterator[dict[str, Raw]]:
    """Tools as an instance wants them: each says that it is a function. Raises Refused."""
    if bytes(tools) in EMPTY:
        return
    try:
        each = msgspec.json.decode(tools, type=list[dict[str, Raw]])
    except (msgspec.DecodeError, RecursionError):
        raise Refused(400, "tools must be a list of objects") from None
    for tool in each:
        yield tool if bytes(tool.get("type", b"")) not in EMPTY else {**tool, "type": FUNCTION}


def _schema(form: Raw) -> Raw | None:
    """The schema that `format` means. Raises Refused."""
    text = bytes(form)
    if text in EMPTY:
        return None
    if text == b'"json"':
        return JSON
    if not text.startswith(b"{"):
        raise Refused(400, 'format must be "json" or a JSON schema')
    return form


def _options(request: Generation) -> dict[str, Any]:
    """The options that an instance takes from a request, under its own names."""
    body: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
    for name, value in (request.options or {}).items():
        if name not in SAMPLING or bytes(value) == b"null":
            continue
        number = _number(value)
        if name in LEAST and number is not None and number < LEAST[name]:
            continue
        body[SAMPLING[name]] = value
        if name in VLLM_NAMES:
            body[VLLM_NAMES[name]] = value
    return body


def _number(value: Raw | None) -> float | None:
    try:
        return msgspec.json.decode(value, type=float) if value else None
    except msgspec.DecodeError:
        return None


def _messages(messages: Sequence[Turn]) -> Iterator[dict[str, Any]]:
    """Messages of OpenAI's API: calls of tools get ids, and results the ids of their calls."""
    open_calls: list[tuple[str, str]] = []  # id and name of those without a result
    for number, message in enumerate(messages):
        turn: dict[str, Any] = {"role": message.role, "content": message.content or ""}
        if message.images:
            texts = [{"type": "text", "text": message.content}] if message.content else []
            turn["content"] = [*texts, *map(_image, message.images)]
        if message.thinking:
            turn["reasoning_content"] = message.thinking
        if message.tool_calls:
            calls = [
                # nine letters and digits: some templates want no other length
                (call.id or f"call{number % 1000:03}{place % 100:02}", call.function)
                for place, call in enumerate(message.tool_calls)
            ]
            open_calls = [(id, function.name) for id, function in calls]
            turn["tool_calls"] = [
                {
                    "id": id,
                    "type": "function",
                    "function": {
                        "name": function.name,
                        "arguments": bytes(function.arguments).decode("utf-8", "replace"),
                    },
                }
                for id, function in calls
            ]
        if message.role == "tool":
            turn |= _result(message, open_calls)
        yield turn


def _result(message: Turn, open_calls: list[tuple[str, str]]) -> dict[str, str]:
    """The call that a tool's result belongs to: the one that it names, else the first open one."""
    id, name = message.tool_call_id, message.tool_name
    named = [call for call in open_calls if (call[0] == id if id else name in (None, "", call[1]))]
    call = next(iter(named or open_calls), ("call00000", ""))
    if call in open_calls:
        open_calls.remove(call)
    name = name or call[1]
    return {"tool_call_id": id or call[0], **({"name": name} if name else {})}


def _image(text: str) -> dict[str, Any]:
    """Raises Refused."""
    # Ollama skips the ends of lines, which `base64` writes; llama-server would read no further.
    text = text.replace("\r", "").replace("\n", "")
    if not text.startswith("data:"):
        try:
            start = base64.b64decode(text[:SNIFFED], validate=True)
        except ValueError:
            raise Refused(400, "an image is not valid base64") from None
        kind = next((kind for begin, kind in IMAGES.items() if start.startswith(begin)), "")
        if not kind:
            known = ", ".join(kind.upper() for kind in IMAGES.values())
            raise Refused(400, f"an image is of no known kind; supported: {known}")
        text = f"data:image/{kind};base64,{text}"
    return {"type": "image_url", "image_url": {"url": text}}
