"""Clients of Ollama's API through the gateway, before real llama-servers: its Python package,
LiteLLM's providers, Codex."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from client_tools import KEY, serve
from conftest import free_port, wait_for
from fakes import tiny_projector
from gateway_tools import Site, reached, site
from npm_clients import codex
from test_litellm_proxy import programs
from test_vision import png

from pipeline.models.gguf import read

if TYPE_CHECKING:
    import ollama  # takes a second

__all__ = ["programs"]
pytestmark = [pytest.mark.build, pytest.mark.slow]

HELLO = [{"role": "user", "content": "hello there"}]
SHORT = {"num_predict": 8, "temperature": 0, "num_ctx": 8192}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "count": {"type": "integer"}},
    "required": ["name", "count"],
    "additionalProperties": False,
}


def weather(city: str) -> str:
    """The weather of a city.

    Args:
        city: its name
    """
    return f"rain in {city}"


@pytest.fixture
def client(clients: Site) -> Iterator[ollama.Client]:
    import ollama

    with ollama.Client(clients.url, headers={"Authorization": f"Bearer {KEY}"}) as one:
        yield one


def test_chat(client: ollama.Client) -> None:
    whole = client.chat("tiny:latest", HELLO, options=SHORT)
    assert whole.message.role == "assistant" and whole.message.content
    assert whole.done and whole.done_reason == "length" and whole.model == "tiny:latest"
    assert whole.eval_count == 8 and whole.prompt_eval_count and whole.prompt_eval_duration
    assert whole.total_duration and whole.eval_duration and whole.load_duration is not None
    assert whole.total_duration > whole.eval_duration + whole.prompt_eval_duration > 10_000
    parts = list(client.chat("tiny", HELLO, stream=True, options=SHORT))
    assert "".join(part.message.content or "" for part in parts) == whole.message.content
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    assert len(parts) > 4 and parts[-1].eval_count == 8
    ended = client.chat("brief", HELLO, options={"num_predict": 500})
    assert ended.done_reason == "stop"


def test_generate(client: ollama.Client) -> None:
    whole = client.generate("chat", "hello there", options=SHORT)
    assert whole.response and whole.done_reason == "length" and whole.eval_count == 8
    # the model's template applies: the same conversation
    assert whole.response == client.chat("chat", HELLO, options=SHORT).message.content
    parts = list(client.generate("chat", "hello there", stream=True, options=SHORT))
    assert "".join(part.response or "" for part in parts) == whole.response
    raw = client.generate("chat", "hello there", raw=True, options=SHORT)
    assert raw.response and raw.eval_count == 8
    assert raw.prompt_eval_count and whole.prompt_eval_count
    assert raw.prompt_eval_count < whole.prompt_eval_count
    loaded = client.generate("chat", keep_alive="5m")
    assert loaded.done_reason == "load" and loaded.response == ""


def test_options_have_an_effect(client: ollama.Client) -> None:
    def said(**options: Any) -> str:
        wanted = {"num_predict": 12, "seed": 1, "temperature": 5.0, "top_k": 0, "top_p": 1.0}
        return str(client.generate("tiny", "hello", raw=True, options=wanted | options).response)

    assert said() == said() != said(seed=2)
    assert said(top_k=1) == said(top_k=1, seed=2) == said(temperature=0, seed=3)
    first = said(temperature=0)
    stop = first[len(first) // 2 :][:2]
    assert stop not in said(temperature=0, stop=[stop])


def test_a_schema(client: ollama.Client) -> None:
    options = {"num_predict": 200, "temperature": 0}
    for text in (
        client.chat("tiny", HELLO, format=SCHEMA, options=options).message.content,
        client.generate("tiny", "hello", format=SCHEMA, options=options).response,
        client.generate("tiny", "hello", raw=True, format=SCHEMA, options=options).response,
    ):
        found = json.loads(text or "")
        assert set(found) == {"name", "count"} and isinstance(found["count"], int)


CALL = {"index": 0, "id": "c1", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
CALLS = json.dumps({"choices": [{"delta": {"tool_calls": [CALL]}, "finish_reason": "tool_calls"}]})


def test_tools(client: ollama.Client, tmp_path: Path) -> None:
    """Random weights call nothing by themselves: the calls are a stand-in's, and a real server
    takes a conversation that has them."""
    import ollama

    with site(tmp_path) as here:
        here.upstream("caller", "--chunks", 1, "--reply", CALLS)
        here.gateway()
        with ollama.Client(here.url) as other:
            whole = other.chat("caller", HELLO, tools=[weather])
            parts = list(other.chat("caller", HELLO, tools=[weather], stream=True))
        assert whole.done_reason == parts[-1].done_reason == "stop"
        calls = [call for part in parts for call in part.message.tool_calls or []]
        assert whole.message.tool_calls == calls and len(calls) == 1
        assert weather(**calls[0].function.arguments) == "rain in Oslo"
        (request, _) = here.events("caller", "request")
        (tool,) = json.loads(request["body"])["tools"]
        assert tool["function"]["parameters"]["required"] == ["city"]
    turns = [*HELLO, whole.message, {"role": "tool", "content": "rain", "tool_name": "weather"}]
    answer = client.chat("tiny", turns, options=SHORT)
    less = client.chat("tiny", HELLO, options=SHORT)
    assert answer.eval_count == 8 and answer.prompt_eval_count and less.prompt_eval_count
    assert answer.prompt_eval_count > less.prompt_eval_count


def test_logprobs(client: ollama.Client) -> None:
    answer = client.chat("tiny", HELLO, logprobs=True, top_logprobs=2, options=SHORT)
    assert answer.logprobs and len(answer.logprobs) == 8
    assert answer.logprobs[0].logprob < 0 and len(answer.logprobs[0].top_logprobs or ()) == 2


def test_images(client: ollama.Client, built: Path, gguf: Path, tmp_path: Path) -> None:
    import ollama

    picture = png(b"\xff\x00\x00").partition(",")[2]
    turn = {"role": "user", "content": "what is this", "images": [picture]}
    with pytest.raises(ollama.ResponseError, match="tiny takes no image input") as refused:
        client.chat("tiny", [turn])
    assert refused.value.status_code == 400
    width = read(gguf).values["llama.embedding_length"]
    tiny_projector.make(tmp_path / "mmproj.gguf", width=width)
    with site(tmp_path) as here:
        server = next(built.glob("*/llama-server*"))
        serve(here, server, "sees", gguf, "--mmproj", str(tmp_path / "mmproj.gguf"))
        here.gateway()
        with ollama.Client(here.url) as other:
            assert "vision" in (other.show("sees").capabilities or [])
            seen = other.chat("sees", [turn], options=SHORT)
            blind = other.chat("sees", [{**turn, "images": []}], options=SHORT)
            said = other.generate("sees", "what is this", images=[picture], options=SHORT)
    assert seen.eval_count == blind.eval_count == 8
    assert seen.prompt_eval_count == said.prompt_eval_count
    assert (seen.prompt_eval_count or 0) > (blind.prompt_eval_count or 0) > 0


def test_vectors(client: ollama.Client) -> None:
    made = client.embed("search", ["a cat", "a dog", "a stone"])
    assert [len(vector) for vector in made.embeddings] == [384] * 3 and made.prompt_eval_count
    cat, dog, stone = made.embeddings

    def like(one: Any, other: Any) -> float:
        return sum(a * b for a, b in zip(one, other, strict=True))

    assert like(cat, cat) == pytest.approx(1, abs=1e-3)
    assert like(cat, dog) > like(cat, stone)
    (short,) = client.embed("search", "a cat", dimensions=64).embeddings
    assert len(short) == 64 and like(short, short) == pytest.approx(1, abs=1e-6)
    assert like(short, cat[:64]) > 0
    older = client.embeddings("search", "a cat")
    assert list(older.embedding) == pytest.approx(list(cat), abs=1e-5)
    assert list(client.embed("search", []).embeddings) == []


def test_what_is_here(client: ollama.Client) -> None:
    models = {one.model: one for one in client.list().models}
    assert set(models) == {"tiny", "chat", "brief", "search"}
    tiny, search = models["tiny"], models["search"]
    assert tiny.size and tiny.digest and tiny.modified_at and tiny.details
    assert tiny.details.family == "llama" and tiny.details.quantization_level == "Q8_0"
    assert tiny.digest == models["chat"].digest != search.digest
    assert {one.model for one in client.ps().models} == set(models)
    shown = client.show("tiny")
    assert shown.modelinfo and shown.modelinfo["general.architecture"] == "llama"
    count = shown.modelinfo["general.parameter_count"]
    assert 0 < count < tiny.size
    assert shown.modelinfo["llama.context_length"] > 0
    assert shown.capabilities == ["completion", "tools"]
    assert "Functions: " in (shown.template or "")
    assert client.show("search").capabilities == ["embedding"]
    context = {one.model: one.context_length for one in client.ps().models}["tiny"]
    assert shown.parameters == f"num_ctx {context}"


def test_errors(clients: Site, client: ollama.Client) -> None:
    import ollama

    with pytest.raises(ollama.ResponseError, match="did you mean tiny") as unknown:
        client.chat("tinny", HELLO)
    assert unknown.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match="did you mean tiny"):
        list(client.generate("tinny", "x", stream=True))
    with pytest.raises(ollama.ResponseError, match="template is not supported"):
        client.generate("tiny", "x", template="y")
    with pytest.raises(ollama.ResponseError, match="downloads no models") as pulled:
        client.pull("org/model")
    assert pulled.value.status_code == 403
    assert client.pull("tiny").status == "success"
    with ollama.Client(clients.url) as other, pytest.raises(ollama.ResponseError) as forbidden:
        other.list()
    assert forbidden.value.status_code == 401


LITELLM = """
import json, sys
import litellm

url, key, open_url = sys.argv[1:]
more = {"api_base": url, "api_key": key, "max_tokens": 8, "temperature": 0}
turns = [{"role": "user", "content": "hello there"}]
whole = litellm.completion(model="ollama_chat/tiny", messages=turns, **more)
parts = litellm.completion(model="ollama_chat/tiny", messages=turns, stream=True, **more)
old = litellm.completion(model="ollama/tiny", messages=turns, **more)
vectors = litellm.embedding(model="ollama/search", input=["a", "b"], api_base=open_url)
try:
    litellm.completion(model="ollama_chat/tinny", messages=turns, **more)
    error = ""
except Exception as failed:
    error = str(failed)
print(json.dumps({
    "whole": whole.choices[0].message.content,
    "usage": whole.usage.completion_tokens,
    "parts": [part.choices[0].delta.content or "" for part in parts],
    "old": old.choices[0].message.content,
    "vectors": [len(one["embedding"]) for one in vectors.data],
    "error": error,
}))
"""


def test_litellm(clients: Site, programs: Path, tmp_path: Path) -> None:
    # with embeddings it sends no key
    port = free_port()
    settings = json.dumps({"port": port})
    words = ["-m", "pipeline.serve.gateway", str(clients.at.path), settings]
    clients.start("open", [sys.executable, *words])
    open_url = f"http://127.0.0.1:{port}"
    wait_for(lambda: reached(f"{open_url}/health"))
    words = [str(next(programs.glob("python*"))), "-c", LITELLM, clients.url, KEY, open_url]
    env = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "HOME": str(tmp_path)}
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["whole"] and told["usage"] == 8 and told["old"]
    assert "".join(told["parts"]) == told["whole"] and len(told["parts"]) > 4
    assert told["vectors"] == [384, 384]
    assert "did you mean tiny" in told["error"]


def test_codex(built: Path, gguf: Path, tmp_path: Path) -> None:
    """It looks for the model among Ollama's, and has missing ones pulled; then it asks OpenAI's
    API. Its first request has some 12,000 tokens."""
    program = str(codex())
    words = [program, "exec", "--oss", "--local-provider", "ollama", "--skip-git-repo-check"]
    with site(tmp_path) as here:
        server = next(built.glob("*/llama-server*"))
        # an end after some words: random weights seldom find one
        sizes = ("--ctx-size", "16384", "--parallel", "1", "--logit-bias", "2+7")
        serve(here, server, "tiny", gguf, *sizes)
        here.gateway()
        home = here.path / "hôme"
        home.mkdir()
        env = {"HOME": str(home), "CODEX_HOME": str(home), "PATH": os.environ["PATH"]}
        env["CODEX_OSS_BASE_URL"] = f"{here.url}/v1"

        def run(model: str) -> subprocess.CompletedProcess[str]:
            more: Any = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
            return subprocess.run(
                [*words, "-m", model, "hello"], env=env, cwd=home, timeout=300, **more
            )

        for _ in range(3):  # random weights may find their end before the first word
            done = run("tiny")
            assert done.returncode == 0, done.stderr
            if done.stdout.strip():
                break
        assert done.stdout.strip(), done.stderr
        assert here.metric('llama_gateway_requests_total{instance="tiny",status="200"}') >= 1
        missing = run("tinny")
        assert missing.returncode and "403" in missing.stderr
