"""Both APIs' own clients through the gateway, before real llama-servers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2
import pytest
from conftest import wait_for, with_programs
from gateway_tools import Site, site, status

if TYPE_CHECKING:  # slow to load, and each worker imports all files of tests
    import anthropic
    import openai

pytestmark = [pytest.mark.build, pytest.mark.slow]

HELLO: Any = [{"role": "user", "content": "hello there"}]
TEMPLATE = """\
{% if tools %}Functions: {{ tools | tojson }}
Call one with <tool_call>{"name": NAME, "arguments": OBJECT}</tool_call>
{% endif %}{% for message in messages %}{{ message.role }}: {{ message.content }}
{% for call in message.tool_calls or [] %}<tool_call>{"name": {{ call.function.name | tojson }}, \
"arguments": {{ call.function.arguments | tojson }}}</tool_call>
{% endfor %}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""
KEY = "the-key-of-this-gateway"


def serve(here: Site, program: Path, name: str, model: Path, *words: str, **more: Any) -> None:
    """A llama-server as an instance, with a key of its own."""
    key = here.path / f"{name}.key"
    key.write_text(f"key-of-{name}\n")
    added = here.add(name, api_key_file=str(key), **more)
    command = [str(program), "--model", str(model), "--port", str(added.port), "--metrics"]
    here.start(name, [*command, "--api-key-file", str(key), *words])


@pytest.fixture(scope="module")
def here(built: Path, gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """The tiny chat model twice, MiniLM, and their gateway with a key."""
    path = tmp_path_factory.mktemp("gateway")
    doit = with_programs(built, path / "hôme")
    doit("prepare", "model=demo-embed", "quant=f16")
    minilm = next(doit.home.rglob("*.gguf"))
    program = next(built.glob("*/llama-server*"))
    with site(path) as one:
        (path / "tools.jinja").write_text(TEMPLATE)
        for name in ("chat-1", "chat-2"):
            words = ("--jinja", "--chat-template-file", str(path / "tools.jinja"))
            serve(one, program, name, gguf, *words, aliases=("chat",))
        serve(one, program, "search", minilm, "--embeddings", kind="embedding")
        (path / "key").write_text(KEY)
        for added in one.instances.values():
            url = f"{added.url}/health"
            wait_for(lambda url=url: status(url) == 200)
        one.gateway(api_key_file=path / "key", models={"claude-*": "chat"})
        yield one


@pytest.fixture
def gpt(here: Site) -> Iterator[openai.OpenAI]:
    import openai

    with openai.OpenAI(base_url=f"{here.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture
def claude(here: Site) -> Iterator[anthropic.Anthropic]:
    import anthropic

    with anthropic.Anthropic(base_url=here.url, api_key=KEY, max_retries=0) as client:
        yield client


def metric(here: Site, line: str) -> float:
    headers = {"Authorization": f"Bearer {KEY}"}
    text = here.get("/metrics", headers=headers).text
    found = re.search(rf"^{re.escape(line)} (\S+)$", text, re.M)
    return float(found[1]) if found else 0


def test_openai_chat(gpt: openai.OpenAI) -> None:
    answer = gpt.chat.completions.create(model="chat", messages=HELLO, max_tokens=16, temperature=0)
    text = answer.choices[0].message.content
    assert text and answer.usage and answer.usage.completion_tokens
    stream = gpt.chat.completions.create(
        model="CHAT", messages=HELLO, max_tokens=16, temperature=0, stream=True
    )
    parts = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert "".join(parts) == text and len(parts) > 4


def test_openai_tools_reach_the_model(gpt: openai.OpenAI, here: Site) -> None:
    """The tiny model's words are random: it never calls one, but its prompt tells of them."""
    tool: Any = {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
    asked: Any = {"model": "chat-1", "messages": HELLO, "max_tokens": 4}
    plain = gpt.chat.completions.create(**asked).usage
    told = gpt.chat.completions.create(**asked, tools=[tool], tool_choice="auto").usage
    assert plain and told and told.prompt_tokens > plain.prompt_tokens + 50
    headers = {"Authorization": f"Bearer {KEY}"}
    body = {"model": "chat-1", "messages": HELLO, "tools": [tool]}
    assert '"weather"' in here.post("/apply-template", body, headers=headers).json()["prompt"]


def test_openai_embeddings_without_a_name_too(gpt: openai.OpenAI) -> None:
    texts = ["a cat sleeps", "a kitten naps", "the budget was cut"]
    told = gpt.embeddings.create(model="search", input=texts, encoding_format="float")
    cat, kitten, budget = (one.embedding for one in told.data)
    assert math.dist(cat, kitten) < math.dist(cat, budget)
    answer = gpt.post("/embeddings", body={"input": "x"}, cast_to=httpx2.Response)
    assert len(answer.json()["data"][0]["embedding"]) == 384


def test_openai_models_and_errors(gpt: openai.OpenAI, here: Site) -> None:
    import openai

    assert [one.id for one in gpt.models.list()] == ["chat-1", "chat", "chat-2", "search"]
    assert gpt.models.retrieve("chat").owned_by == "llama.cpp"
    with pytest.raises(openai.NotFoundError, match="did you mean chat") as why:
        gpt.chat.completions.create(model="chatt", messages=HELLO)
    assert why.value.code == "model_not_found" and why.value.param == "model"
    with pytest.raises(openai.BadRequestError):
        gpt.chat.completions.create(model="chat", messages=HELLO, extra_body={"top_k": "x"})
    with (
        openai.OpenAI(base_url=f"{here.url}/v1", api_key="wrong", max_retries=0) as other,
        pytest.raises(openai.AuthenticationError),
    ):
        other.models.list()


def test_anthropic_messages(claude: anthropic.Anthropic) -> None:
    asked: Any = {"model": "claude-opus-9", "messages": HELLO, "max_tokens": 16}
    asked["extra_body"] = {"temperature": 0}
    answer = claude.messages.create(**asked)
    (block,) = answer.content
    assert block.type == "text" and block.text and answer.usage.output_tokens
    with claude.messages.stream(**asked) as stream:
        assert "".join(stream.text_stream) == block.text
    count = claude.messages.count_tokens(model="chat", messages=HELLO)
    assert count.input_tokens > 3


def test_anthropic_models_and_errors(claude: anthropic.Anthropic) -> None:
    import anthropic

    assert [one.display_name for one in claude.models.list()] == [
        *("chat-1", "chat", "chat-2", "search"),
    ]
    assert claude.models.retrieve("chat").type == "model"
    with pytest.raises(anthropic.NotFoundError, match="did you mean search"):
        claude.messages.create(model="serch", messages=HELLO, max_tokens=1)


def test_both_instances_of_the_alias_are_asked(gpt: openai.OpenAI, here: Site) -> None:
    line = 'llama_gateway_requests_total{{instance="{}",status="200"}}'.format
    before = [metric(here, line(name)) for name in ("chat-1", "chat-2")]
    for _ in range(4):
        gpt.completions.create(model="chat", prompt="hello", max_tokens=1)
    after = [metric(here, line(name)) for name in ("chat-1", "chat-2")]
    assert [b - a for a, b in zip(before, after, strict=True)] == [2, 2]
    assert metric(here, 'llamacpp:n_decode_total{instance="chat-1"}') > 0


def test_llama_server_stops_when_the_client_is_gone(gpt: openai.OpenAI, here: Site) -> None:
    stream = gpt.chat.completions.create(
        model="chat-1",
        messages=HELLO,
        max_tokens=15_000,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    seen = len(re.findall(r"stop processing: n_tokens = (\d+)", here.output("chat-1")))
    stream.close()

    def told() -> list[str]:
        found = re.findall(r"stop processing: n_tokens = (\d+)", here.output("chat-1"))
        return found[seen:]

    assert int(wait_for(told)[0]) < 14_000, "it went on to the end"


def test_a_killed_instance_is_replaced_by_the_other(gpt: openai.OpenAI, here: Site) -> None:
    """The last test: nobody restarts it."""
    import openai

    here.kill("chat-2")
    for _ in range(4):
        assert gpt.completions.create(model="chat", prompt="hello", max_tokens=1).choices
    here.says("chat-2", "failed", "killed by SIGKILL")
    with pytest.raises(openai.InternalServerError, match="chat-2 is failed: killed by SIGKILL"):
        gpt.completions.create(model="chat-2", prompt="hello", max_tokens=1)
