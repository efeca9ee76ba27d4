"""OpenAI's SDKs, in JavaScript and in Python, through the gateway: all that they are used for."""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import Any

import pytest
from client_tools import KEY
from gateway_tools import Site
from npm_clients import HERE, installed

pytestmark = [pytest.mark.build, pytest.mark.slow]

HELLO: Any = [{"role": "user", "content": "hello there"}]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Oslo", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL: Any = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
SCHEMA: Any = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "count": {"type": "integer"}},
    "required": ["name", "count"],
    "additionalProperties": False,
}


def test_the_npm_packages_are_pinned_and_name_no_host() -> None:
    text = (HERE / "package-lock.json").read_text(encoding="utf-8")
    assert "://" not in text
    packages = {name: one for name, one in json.loads(text)["packages"].items() if name}
    assert packages and all(one["integrity"].startswith("sha512-") for one in packages.values())


def test_javascript(clients: Site) -> None:
    folder, node = installed(), shutil.which("node")
    program = folder / "openai_client.mjs"  # beside node_modules, where it is looked for
    shutil.copy(HERE / program.name, program)
    words = [str(node), str(program), clients.url, KEY]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["chat"] and told["stream"] == told["chat"] and told["after"]
    assert told["finish"] == "tool_calls" and told["call"]["name"] == "weather"
    assert told["call"]["arguments"]["city"] in ("Oslo", "Rome")
    assert set(told["json"]) == {"name", "count"} and isinstance(told["json"]["count"], int)
    assert told["vectors"] == [384, 384]
    assert told["models"] == ["tiny", "chat", "brief", "search"]
    unknown, forbidden = told["unknown"], told["forbidden"]
    assert (unknown["kind"], unknown["status"]) == ("NotFoundError", 404)
    assert (unknown["code"], unknown["param"]) == ("model_not_found", "model")
    assert "did you mean chat?" in unknown["message"]
    assert (forbidden["kind"], forbidden["status"]) == ("AuthenticationError", 401)


def test_python_tools_and_schema(clients: Site) -> None:
    """What test_gateway_clients.py leaves out: there no call can be made."""
    import openai

    asked: Any = {"model": "chat", "messages": HELLO, "max_tokens": 200, "temperature": 0}
    with openai.OpenAI(base_url=f"{clients.url}/v1", api_key=KEY, max_retries=0) as client:
        made = client.chat.completions.create(
            **asked, tools=[TOOL], tool_choice="required", parallel_tool_calls=False
        ).choices[0]
        (call,) = made.message.tool_calls or []
        assert made.finish_reason == "tool_calls" and call.type == "function"
        assert call.function.name == "weather"
        assert json.loads(call.function.arguments)["city"] in ("Oslo", "Rome")
        parts = client.chat.completions.create(
            **asked, tools=[TOOL], tool_choice="required", parallel_tool_calls=False, stream=True
        )
        deltas = [one for part in parts for one in part.choices[0].delta.tool_calls or []]
        assert [one.function.name for one in deltas if one.function and one.function.name]
        text = "".join(one.function.arguments or "" for one in deltas if one.function)
        assert json.loads(text)["city"] in ("Oslo", "Rome")
        form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
        formed = client.chat.completions.create(**asked, response_format=form)
        found = json.loads(formed.choices[0].message.content or "")
        assert set(found) == {"name", "count"} and isinstance(found["count"], int)
        answered = client.responses.create(model="chat", input="hello", max_output_tokens=8)
        assert answered.output_text
