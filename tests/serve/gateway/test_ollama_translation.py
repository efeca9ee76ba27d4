"""Ollama's requests as an instance's, and its answers as Ollama's, without a process."""

from __future__ import annotations

import base64
import json
from typing import Any

import msgspec
import pytest

from pipeline.serve.gateway import request_body
from pipeline.serve.gateway.ollama import requests
from pipeline.serve.gateway.ollama.replies import Text, Vectors, error_of, joined
from pipeline.serve.guard.refusal import Refused

PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(40)).decode()
JPEG = base64.b64encode(b"\xff\xd8\xff\xe0" + bytes(40)).decode()
HELLO = {"role": "user", "content": "hello"}
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}}
ALWAYS = {"stream": True, "stream_options": {"include_usage": True}}


def plain(asked: requests.Translated) -> Any:
    return json.loads(msgspec.json.encode(asked.body))


def chat(**fields: Any) -> tuple[str, Any]:
    request = requests.decoded(json.dumps({"messages": [HELLO], **fields}).encode(), requests.Chat)
    asked = requests.chat(request)
    return asked.path, plain(asked)


def generate(**fields: Any) -> tuple[str, Any]:
    asked = requests.generate(requests.decoded(json.dumps(fields).encode(), requests.Generate))
    return asked.path, plain(asked)


# Requests


def test_chat() -> None:
    assert chat(model="x", stream=False, keep_alive="5m") == (
        "/v1/chat/completions",
        {**ALWAYS, "messages": [HELLO]},
    )
    _, body = chat(messages=[{"role": "system", "content": None}, {"role": "assistant"}])
    assert body["messages"] == [
        {"role": "system", "content": ""},
        {"role": "assistant", "content": ""},
    ]


def test_options_by_name() -> None:
    same: dict[str, Any] = {
        **{"temperature": 0, "top_k": 5, "top_p": 0.5, "min_p": 0.1, "typical_p": 0.9, "seed": 7},
        **{"repeat_last_n": 64, "presence_penalty": 1.5, "frequency_penalty": 0.25},
        **{"mirostat": 1, "mirostat_tau": 5.0, "mirostat_eta": 0.1, "stop": ["a", "b"]},
    }
    other = {"num_predict": 12, "num_keep": 4, "repeat_penalty": 1.25}
    _, body = chat(options={**same, **other, "num_ctx": 9, "num_gpu": 1, "zzz": {}, "top_n": None})
    del body["messages"]
    renamed = {"max_tokens": 12, "n_keep": 4, "repeat_penalty": 1.25, "repetition_penalty": 1.25}
    assert body == {**ALWAYS, **same, **renamed}
    for absent in ({"num_predict": -1}, {"num_predict": -2}, {"num_predict": 0}, {"seed": -1}):
        assert chat(options=absent)[1] == {**ALWAYS, "messages": [HELLO]}, absent
    assert requests.unknown({"zzz": 1, "num_ctx": 2, "top_k": 3, "main_gpu": 0}) == ["zzz"]


def test_the_context_that_is_asked_for() -> None:
    for text, count in (("4096", 4096), ("4096.0", 4096), ('"x"', 0), ("-1", 0), ("1e99", 0)):
        assert requests.context({"num_ctx": msgspec.Raw(text.encode())}) == count, text
    assert requests.context(None) == requests.context({}) == 0


def test_format() -> None:
    assert chat(format="json")[1]["response_format"] == {"type": "json_object"}
    formed = chat(format=SCHEMA)[1]["response_format"]
    assert formed["type"] == "json_schema" and formed["json_schema"]["schema"] == SCHEMA
    for nothing in (None, "", {}):
        assert "response_format" not in chat(format=nothing)[1]
    assert generate(prompt="x", raw=True, format=SCHEMA)[1]["json_schema"] == SCHEMA
    assert generate(prompt="x", raw=True, format="json")[1]["json_schema"] == {"type": "object"}
    for wrong in ("xml", 3, [1]):
        with pytest.raises(Refused, match='format must be "json" or a JSON schema'):
            chat(format=wrong)


@pytest.mark.parametrize(
    ("sent", "read"),
    [
        (rb"cut \ud83d", "cut \ufffd"),
        (rb"\ud83d\ud83d\ude00 \ude00\ude00", "\ufffd\U0001f600 \ufffd\ufffd"),
        (rb"\uD83d\\ude00 \\\uDE00", "\ufffd\\ude00 \\\ufffd"),
        (rb"\\ud83d \"\u00e9\n \ud83d\u00e9", '\\ud83d "\xe9\n \ufffd\xe9'),
    ],
)
def test_half_a_pair_of_escapes_is_read_as_ollama_reads_it(sent: bytes, read: str) -> None:
    """JavaScript sends it of a text that it has cut within a letter."""
    asked = requests.decoded(b'{"prompt": "%b"}' % sent, requests.Generate)
    assert asked.prompt == read
    with pytest.raises(Refused, match="prompt"):
        requests.decoded(b'{"prompt": 1, "x": "%b"}' % sent, requests.Generate)


def test_a_mark_before_the_json_is_skipped() -> None:
    """As on OpenAI's paths: Windows' own tools write it into files."""
    asked = requests.decoded(b'\xef\xbb\xbf{"prompt": "x"}', requests.Generate)
    assert asked.prompt == "x"


def test_thinking_and_logprobs() -> None:
    for think in (True, False):
        _, body = chat(think=think)
        assert body["chat_template_kwargs"] == {"enable_thinking": think}
        assert "reasoning_effort" not in body
    for wrong in ("false", "bogus", "High"):
        with pytest.raises(Refused, match='think must be true, false, "low", "medium" or "high"'):
            chat(think=wrong)
    _, body = chat(think="high")
    assert body["chat_template_kwargs"] == {"enable_thinking": True}
    assert body["reasoning_effort"] == "high"
    assert chat(logprobs=True, top_logprobs=3)[1]["top_logprobs"] == 3
    assert chat(logprobs=True)[1]["top_logprobs"] == 1
    assert generate(prompt="x", raw=True, logprobs=True, top_logprobs=2)[1]["n_probs"] == 2


def test_images() -> None:
    turn = {"role": "user", "content": "what?", "images": [PNG, JPEG, f"data:image/x;base64,{PNG}"]}
    content = chat(messages=[turn])[1]["messages"][0]["content"]
    assert content[0] == {"type": "text", "text": "what?"}
    assert [part["image_url"]["url"] for part in content[1:]] == [
        f"data:image/png;base64,{PNG}",
        f"data:image/jpeg;base64,{JPEG}",
        f"data:image/x;base64,{PNG}",
    ]
    # as the command `base64` prints it: llama-server would read no further than the first line
    for wrapped in (f"{PNG[:9]}\n{PNG[9:]}\n", f"data:image/png;base64,{PNG[:40]}\r\n{PNG[40:]}"):
        (turn,) = chat(messages=[{"role": "user", "images": [wrapped]}])[1]["messages"]
        assert turn["content"][0]["image_url"]["url"] == f"data:image/png;base64,{PNG}"
    path, body = generate(images=[PNG])
    assert path == "/v1/chat/completions" and len(body["messages"][0]["content"]) == 1
    unknown = base64.b64encode(b"%PDF-1.7 and so on").decode()
    for image, why in ((unknown, "of no known kind"), ("ä" * 20, "not valid base64")):
        with pytest.raises(Refused, match=why):
            chat(messages=[{"role": "user", "images": [image]}])


def test_a_tool_without_a_type_is_a_function() -> None:
    """Ollama knows no other kind and does not ask for it; llama-server does."""
    function = {"name": "f", "parameters": {"type": "object"}}
    said = {"type": "function", "function": function}
    for tool in ({"function": function}, {"type": "", "function": function}, said):
        assert chat(tools=[tool])[1]["tools"] == [said]
    assert chat(tools=[{"type": "other", "x": 1}])[1]["tools"] == [{"type": "other", "x": 1}]
    for nothing in (None, [], {}, ""):
        assert "tools" not in chat(tools=nothing)[1]
    with pytest.raises(Refused, match="tools must be a list of objects"):
        chat(tools=["f"])


def test_tools() -> None:
    """Arguments are objects here and JSON text there; results are matched with their calls."""
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    arguments = {"city": "Zürich", "n": 1.5}
    calls = [
        {"function": {"name": "f", "arguments": arguments}},
        {"function": {"name": "g", "arguments": {}}},
        {"function": {"name": "f", "arguments": {}}, "id": "own"},
    ]
    results = [
        {"role": "tool", "content": "given", "tool_call_id": "own", "tool_name": "f"},
        {"role": "tool", "content": "of g", "tool_name": "g"},
        {"role": "tool", "content": "of the first f", "tool_name": "f"},
        {"role": "tool", "content": "of nothing"},
    ]
    turn = {"role": "assistant", "content": "", "thinking": "hm", "tool_calls": calls}
    _, body = chat(messages=[HELLO, turn, *results], tools=[tool])
    assert body["tools"] == [tool]
    said = body["messages"][1]
    assert said["reasoning_content"] == "hm"
    first, second, third = said["tool_calls"]
    assert first["type"] == "function" and first["function"]["name"] == "f"
    assert json.loads(first["function"]["arguments"]) == arguments
    assert second["function"]["arguments"] == "{}" and third["id"] == "own"
    assert first["id"] != second["id"] and len(first["id"]) == 9 and first["id"].isalnum()
    ids = [result["tool_call_id"] for result in body["messages"][2:]]
    assert ids[:3] == ["own", second["id"], first["id"]] and ids[3] not in ids[:3]
    assert [result.get("name") for result in body["messages"][2:]] == ["f", "g", "f", None]
    assert "tools" not in chat(tools=[])[1]


def test_generate() -> None:
    path, body = generate(prompt="hi", system="Be brief.")
    assert path == "/v1/chat/completions"
    assert body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
    ]
    assert generate(prompt="a", raw=True) == ("/v1/completions", {"prompt": "a", **ALWAYS})
    ends = {"input_prefix": "def f(", "input_suffix": "return x"}
    assert generate(prompt="def f(", suffix="return x") == ("/infill", {**ends, **ALWAYS})
    for wrong, why in (
        ({"prompt": "x", "template": "{{ .Prompt }}"}, "template is not supported"),
        ({"prompt": "x", "raw": True, "system": "y"}, "raw mode does not support system"),
        ({"prompt": "x", "raw": True, "images": [PNG]}, "leave out raw and suffix"),
    ):
        with pytest.raises(Refused, match=why) as refused:
            generate(**wrong)
        assert refused.value.status == 400


def test_nothing_asked_is_a_request_to_load() -> None:
    assert generate() == generate(prompt="", keep_alive=0, template="") == ("", {})
    assert chat(messages=[]) == chat(messages=None) == ("", {})
    for nothing in (None, "", msgspec.Raw(b"null"), msgspec.Raw(b"[]"), msgspec.Raw()):
        assert requests.embed(nothing).path == ""


@pytest.mark.parametrize("other", [b"5", b"true", b'{"prompt_string": "x"}'])
def test_only_texts_are_embedded(other: bytes) -> None:
    with pytest.raises(Refused, match="input must be a text or a list of texts") as refused:
        requests.embed(msgspec.Raw(other))
    assert refused.value.status == 400


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        *((None, None), (5.0, 5), (-1.0, -1), ("5m", 300), ("1h30m", 5400), ("-1s", -1), ("0s", 0)),
        *(("1.5s", 1.5), ("250ms", 0.25), (" 10s ", 10)),
        *(("0", 0), ("-0", 0), ("-0s", 0), ("+0", 0), (".5h", 1800), ("1.s", 1)),
        ("1\u03bcs", 1e-6),
    ],
)
def test_keep_alive(given: Any, seconds: float | None) -> None:
    assert request_body.seconds(given) == seconds


@pytest.mark.parametrize("wrong", ["5", "00", ".s", "٥m", "nan", "forever", "5 m", "", "m5"])
def test_wrong_keep_alive(wrong: str) -> None:
    with pytest.raises(Refused, match="is not a duration"):
        request_body.seconds(wrong)


@pytest.mark.parametrize(
    ("body", "where"),
    [
        ('{"messages": "x"}', r"\$\.messages"),
        ('{"messages": [{"content": "x"}]}', "role"),
        ('{"messages": [{"role": "user", "content": ["x"]}]}', r"\$\.messages\[0\]\.content"),
        ('{"options": []}', r"\$\.options"),
        ('{"stream": "yes"}', r"\$\.stream"),
    ],
)
def test_a_wrong_field_is_named(body: str, where: str) -> None:
    with pytest.raises(Refused, match=f"invalid request: .*{where}") as refused:
        requests.decoded(body.encode(), requests.Chat)
    assert refused.value.status == 400
    with pytest.raises(Refused, match="not a JSON object"):
        requests.decoded(b"[1]", requests.Chat)


# Answers


def event(data: Any) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"


def piece(finish: str | None = None, **delta: Any) -> bytes:
    return event({"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})


def call_piece(index: int, arguments: str, **more: Any) -> bytes:
    function = {"arguments": arguments, **({"name": more.pop("name")} if "name" in more else {})}
    return piece(tool_calls=[{"index": index, "function": function, **more}])


COUNTS = {"prompt_tokens": 9, "completion_tokens": 4}
TIMINGS = {"prompt_n": 2, "prompt_ms": 1.5, "predicted_n": 4, "predicted_ms": 20}
USAGE = event({"choices": [], "usage": COUNTS, "timings": TIMINGS})
DONE = b"data: [DONE]\n\n"
TIMES = {"prompt_eval_count": 9, "prompt_eval_duration": 1_500_000}
TIMES |= {"eval_count": 4, "eval_duration": 20_000_000}


def read(stream: bytes, *, is_chat: bool = True, step: int = 10**6) -> list[dict[str, Any]]:
    """The objects of a stream that comes in blocks of `step` bytes."""
    reply = Text("me", is_chat=is_chat)
    reply.load_seconds = 0.5
    blocks = [stream[at : at + step] for at in range(0, len(stream), step)]
    made = [each for block in blocks for each in reply.feed(block)]
    return json.loads(msgspec.json.encode([*made, *reply.end()]))  # type: ignore[no-any-return]


@pytest.mark.parametrize("step", [1, 7, 10**6])
def test_a_stream(step: int) -> None:
    stream = piece(role="assistant", content=None) + piece(reasoning_content="hm")
    stream += b": comment\n\n" + piece(content="Grüß") + piece(content=" Gott") + piece("stop")
    *parts, last = read(stream + USAGE + DONE, step=step)
    assert [part["message"] for part in parts] == [
        {"role": "assistant", "content": "", "thinking": "hm"},
        {"role": "assistant", "content": "Grüß"},
        {"role": "assistant", "content": " Gott"},
    ]
    assert all(part["model"] == "me" and part["done"] is False for part in parts)
    assert last["done"] is True and last["done_reason"] == "stop"
    assert last["message"] == {"role": "assistant", "content": ""}
    assert {name: last[name] for name in TIMES} == TIMES
    assert last["load_duration"] == 500_000_000 and last["total_duration"] > 0
    whole = joined([*parts, last])
    said = {"role": "assistant", "content": "Grüß Gott", "thinking": "hm"}
    assert whole == {**last, "message": said}


def test_what_is_unknown_is_left_out() -> None:
    (last,) = read(piece("length") + DONE)
    assert last["done_reason"] == "length"
    assert not set(TIMES) & set(last)
    (last,) = read(DONE)
    assert last["done"] is True and "done_reason" not in last


def test_generated_text_in_all_forms() -> None:
    raw = event({"choices": [{"text": "ab"}]}) + event({"choices": [{"finish_reason": "length"}]})
    last_one = {"stop_type": "limit", "tokens_evaluated": 9, "tokens_predicted": 4}
    infill = event({"content": "ab", "stop": False})
    infill += event({"content": "", "stop": True, **last_one, "timings": TIMINGS})
    chatted = piece(content="ab") + piece("length")
    for stream in (raw + USAGE + DONE, infill + DONE, chatted + USAGE):
        part, last = read(stream, is_chat=False)
        assert part["response"] == "ab" and "message" not in part
        assert last["done_reason"] == "length" and last["response"] == ""
        assert {name: last[name] for name in TIMES} == TIMES
        assert joined([part, last])["response"] == "ab"


def test_calls_of_tools() -> None:
    stream = call_piece(0, "", name="f", id="one") + call_piece(0, '{"city": ')
    stream += call_piece(0, '"Oslo"}') + call_piece(1, "{}", name="g", id="two")
    part, last = read(stream + piece("tool_calls") + USAGE + DONE)
    assert part["message"]["tool_calls"] == [
        {"id": "one", "function": {"index": 0, "name": "f", "arguments": {"city": "Oslo"}}},
        {"id": "two", "function": {"index": 1, "name": "g", "arguments": {}}},
    ]
    assert last["done_reason"] == "stop"
    assert joined([part, last])["message"]["tool_calls"] == part["message"]["tool_calls"]


def test_a_call_that_the_limit_cut_is_left_out() -> None:
    (last,) = read(call_piece(0, '{"city": "Os', name="f") + piece("length") + DONE)
    assert last["done_reason"] == "length" and "tool_calls" not in last["message"]


def test_logprobs() -> None:
    tokens = [{"token": "a", "logprob": -0.5, "top_logprobs": []}, {"token": "b", "logprob": -1}]
    stream = b"".join(
        event({"choices": [{"delta": {"content": one["token"]}, "logprobs": {"content": [one]}}]})
        for one in tokens
    )
    *parts, last = read(stream + piece("stop") + DONE)
    assert [part["logprobs"] for part in parts] == [[one] for one in tokens]
    assert joined([*parts, last])["logprobs"] == tokens


@pytest.mark.parametrize(
    ("broken", "text", "status"),
    [
        (event({"error": {"message": "out of luck", "code": 503}}), "out of luck", 503),
        (event({"error": {"message": "odd", "code": "x"}}), "odd", 500),
        (event({"error": "text"}), "text", 500),
        (b'error: {"message": "older form", "code": 400}\n\n', "older form", 400),
        (b"data: {nope\n\n", "the instance sent an event that cannot be read", 500),
        (event({"choices": [None]}), "the instance sent an event that cannot be read", 500),
    ],
)
def test_an_error_in_a_stream_is_its_last_object(broken: bytes, text: str, status: int) -> None:
    reply = Text("me", is_chat=True)
    first, last = [*reply.feed(piece(content="a") + broken + piece(content="b")), *reply.end()]
    assert first["message"]["content"] == "a" and last == {"error": text}
    assert reply.error_status == status
    assert joined([first, last]) == {"error": text}


@pytest.mark.parametrize(
    ("document", "text"),
    [
        (b'{"error": {"message": "a", "code": 418}}', "a"),
        (b'{"message": "b", "object": "error"}', "b"),
        (b'{"detail": "c"}', "c"),
        (b'{"error": "d"}', "d"),
        (b"<html>e", "<html>e"),
        (b"", "Bad Gateway"),
        (b"[1]", "[1]"),
    ],
)
def test_errors_of_all_servers(document: bytes, text: str) -> None:
    assert error_of(document, 502) == (text, 502)


def test_vectors() -> None:
    document = (
        b'{"data": [{"embedding": [3.0, 4.0, 12.0], "index": 0}], "usage": {"prompt_tokens": 2}}'
    )
    made = json.loads(msgspec.json.encode(Vectors("me").read(document)))
    assert made["embeddings"] == [[3.0, 4.0, 12.0]] and made["prompt_eval_count"] == 2
    assert made["model"] == "me" and made["total_duration"] > 0
    shorter = Vectors("me", dimensions=2).read(document)
    assert shorter["embeddings"] == [[0.6, 0.8]]
    older = json.loads(msgspec.json.encode(Vectors("me", is_single=True).read(document)))
    assert older == {"embedding": [3.0, 4.0, 12.0]}
    assert Vectors("me").loaded(unloads=False)["embeddings"] == []
