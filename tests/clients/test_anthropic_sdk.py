"""Anthropic's SDK through the gateway: what it does with tools, and what goes wrong."""

from __future__ import annotations

from typing import Any

import pytest
from client_tools import KEY
from gateway_tools import Site

pytestmark = [pytest.mark.build, pytest.mark.slow]
HELLO: Any = [{"role": "user", "content": "hello there"}]
WEATHER: Any = {
    "name": "weather",
    "description": "The weather of a city",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Oslo", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


def test_a_tool_is_called_and_answers(clients: Site) -> None:
    import anthropic

    asked: Any = {"model": "brief", "max_tokens": 200, "tools": [WEATHER]}
    # llama-server overlooks disable_parallel_tool_use: only the model's end ends its calls
    call: Any = {"tool_choice": {"type": "any"}}
    with anthropic.Anthropic(base_url=clients.url, api_key=KEY, max_retries=0) as client:
        made = client.messages.create(**asked, **call, messages=HELLO)
        block = made.content[0]
        assert made.stop_reason == "tool_use" and block.type == "tool_use"
        assert block.name == "weather" and block.input["city"] in ("Oslo", "Rome")
        with client.messages.stream(**asked, **call, messages=HELLO) as stream:
            streamed = stream.get_final_message().content[0]
        assert streamed.type == "tool_use" and streamed.input["city"] in ("Oslo", "Rome")
        result = {"type": "tool_result", "tool_use_id": block.id, "content": "7 degrees"}
        said: Any = [
            *HELLO,
            {"role": "assistant", "content": [block]},
            {"role": "user", "content": [result]},
        ]
        after = client.messages.create(model="chat", max_tokens=8, messages=said)
        assert after.usage.input_tokens > made.usage.input_tokens - 200
        more = client.messages.count_tokens(model="chat", messages=HELLO, tools=[WEATHER])
        less = client.messages.count_tokens(model="chat", messages=HELLO)
        assert more.input_tokens > less.input_tokens + 50


def test_errors(clients: Site) -> None:
    import anthropic

    with (
        anthropic.Anthropic(base_url=clients.url, api_key="wrong", max_retries=0) as other,
        pytest.raises(anthropic.AuthenticationError),
    ):
        other.messages.create(model="chat", max_tokens=1, messages=HELLO)
