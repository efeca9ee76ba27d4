"""An answer as a server streams it, and everything that a bad server sends instead."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import free_port
from fakes import completions as fake

from pipeline.chat import completions
from pipeline.chat.completions import (
    ChatServer,
    ContextFull,
    Conversation,
    Ending,
    Message,
    answer,
)
from pipeline.core.errors import PipelineError
from pipeline.core.text import printable


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, list[Any]]]:
    with fake.answering() as running:
        yield running


def ask(url: str, question: str, **more: Any) -> tuple[str, str, Ending]:
    pieces: list[tuple[str, str]] = []
    peer = ChatServer(url=url, model="m", **more)
    ending = asyncio.run(
        answer(peer, [Message("user", question)], lambda *piece: pieces.append(piece))
    )
    return "".join(x for x, _ in pieces), "".join(x for _, x in pieces), ending


def test_an_answer(server: tuple[str, list[Any]]) -> None:
    url, asked = server
    assert ask(url, "hello", key="secret") == ("Hello", "", Ending(tokens=2, speed=7.5))
    assert asked[-1]["key"] == "Bearer secret" and asked[-1]["stream"] is True
    assert asked[-1]["messages"] == [{"role": "user", "content": "hello"}]
    assert ask(url, "comments")[0] == "Hello"
    assert ask(url, "reasons")[:2] == ("so", "hm")


def test_nothing_that_a_terminal_obeys_arrives(server: tuple[str, list[Any]]) -> None:
    assert ask(server[0], "hostile")[0] == "ared]0;title2Jbc"
    assert printable(fake.HOSTILE + "\n\tü 日本 👩‍👩‍👧") == "ared]0;title2Jbc\n\tü 日本 👩‍👩‍👧"


def test_an_answer_that_was_cut_says_why(server: tuple[str, list[Any]]) -> None:
    full = ask(server[0], "full", context=512)[2]
    assert full.cut == "the answer was cut: the context of 512 tokens is full" and full.is_full
    limited = ask(server[0], "limit", context=512)[2]
    assert limited.cut == "the answer was cut at 2 tokens, a limit" and not limited.is_full


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ("cut", "ended the answer in the middle"),
        ("error inside", "ended the answer with an error: out of luck$"),
        ("error line", "ended the answer with an error: out of luck$"),
        ("no json", "sends what is not an answer: {nope"),
        ("other json", "sends what is not an answer"),
        ("no end", "a line without end"),
        ("no stream", "ended the answer in the middle"),
        ("key", "the API key is missing or wrong"),
        ("loading", "Loading model"),
        ("html", "answers with 502$"),
        ("text error", "answers with 500: oh no"),
        ("moved", "answers with 302"),
    ],
)
def test_a_bad_answer_is_one_error(
    server: tuple[str, list[Any]], question: str, message: str
) -> None:
    with pytest.raises(PipelineError) as error:
        ask(server[0], question)
    assert re.search(message, error.value.message) and error.value.hint
    assert len(error.value.message) < 500


@pytest.mark.parametrize("question", ["too long", "vllm too long"])
def test_a_full_context_says_what_to_do(server: tuple[str, list[Any]], question: str) -> None:
    with pytest.raises(ContextFull, match="the context is full") as error:
        ask(server[0], question, larger="ctx_size=…")
    assert error.value.hint == "ctx_size=…"
    if question == "too long":
        assert "takes 900 tokens, the context holds 512" in error.value.message


def test_nobody_answers() -> None:
    with pytest.raises(PipelineError, match="nothing answers at"):
        ask(f"http://127.0.0.1:{free_port()}", "hello")


def test_why_a_connection_broke_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """httpx has no text for a server that is silent for too long."""
    monkeypatch.setattr(completions, "SILENCE_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(PipelineError, match="the connection broke: ReadTimeout"):
            ask(url, "hello")


def test_a_conversation() -> None:
    talk = Conversation("be brief")
    talk.ask("one")
    talk.take("1")
    talk.ask("two")
    talk.take("")  # nothing came of it
    assert [message.content for message in talk.messages] == ["be brief", "one", "1"]
    assert talk.take_back() == "one" and talk.take_back() == ""
    assert [message.role for message in talk.messages] == ["system"]
