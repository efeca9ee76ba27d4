"""Each client of a server that anybody may run ends soon and small, whatever the server sends."""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

import httpx2
import pytest
from fakes import hostile

from pipeline.bins.release import github
from pipeline.chat import completions
from pipeline.chat.completions import ChatServer, Message
from pipeline.core import bounded
from pipeline.core.bounded import Bound
from pipeline.core.download import remote
from pipeline.core.errors import PipelineError
from pipeline.deploy import claude
from pipeline.deploy.ray import cluster
from pipeline.deploy.ray.cluster import Cluster
from pipeline.serve import health
from pipeline.serve.gateway.ollama import exchange
from pipeline.serve.gateway.ollama.replies import Vectors
from pipeline.serve.gateway.renaming import LONGEST_LINE, Renamed
from pipeline.serve.gateway.upstream import Answer
from pipeline.serve.server import Server

MIB = 1024 * 1024
BOUND = Bound(bytes=MIB, seconds=0.4)
IN_FLIGHT = 40 * MIB  # what the buffers of both sides take, at most
PATIENCE = 15.0  # seconds, on a busy machine


def releases(url: str) -> None:
    with github.client() as client:
        github.ask(client, "releases", list[int])


def source(url: str) -> None:
    with github.client() as client:
        github.download(client, "tarball/main", io.BytesIO(), MIB)


def models(url: str) -> None:
    claude.chat_models(url, "", "try again")


def dashboard(url: str) -> None:
    Cluster(url, "").serves()


def deployment(url: str) -> None:
    """An error that does not end: any other answer is none."""
    Cluster(url, "").deploy({})
    raise PipelineError("answered")


def chat(url: str) -> None:
    peer = ChatServer(url=url, model="m")
    asyncio.run(completions.answer(peer, [Message("user", "hello")], lambda text, reasoning: None))


def probe(url: str) -> None:
    port = int(url.rpartition(":")[2])
    server = Server(name="a", executable="", cmd=(), folder="", log_file="", port=port)
    assert not health.is_ready(server, 0.4)
    health.ask(server, "/metrics", timeout=0.4)


ALWAYS = ("gzip_bomb", "drip_headers", "endless_redirect")
CLIENTS: dict[str, Callable[[str], None]] = {
    client.__name__: client for client in (releases, source, models, probe, dashboard, deployment)
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds that a test reaches."""
    monkeypatch.setattr(github, "ANSWER", BOUND)
    monkeypatch.setattr(github, "LONGEST_DOWNLOAD", BOUND.seconds)
    monkeypatch.setattr(github, "TIMEOUT", BOUND.seconds)
    monkeypatch.setattr(claude, "ANSWER", BOUND)
    monkeypatch.setattr(claude, "REQUEST_SECONDS", BOUND.seconds)
    monkeypatch.setattr(cluster, "ANSWER", BOUND)
    monkeypatch.setattr(cluster, "DEPLOYED", BOUND)
    monkeypatch.setattr(bounded, "HEADERS_SECONDS", BOUND.seconds)
    monkeypatch.setattr(health, "MOST_BYTES", BOUND.bytes)
    monkeypatch.setattr(completions, "ERROR_SECONDS", BOUND.seconds)


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize(
    "attack",
    [
        pytest.param(name, marks=() if name in ALWAYS else pytest.mark.trust)
        for name in hostile.ON_CLIENTS
    ],
)
def test_a_client_ends(
    small: None, monkeypatch: pytest.MonkeyPatch, client: str, attack: str
) -> None:
    with hostile.start(hostile.ON_CLIENTS[attack]) as server:
        monkeypatch.setenv("GITHUB_API_URL", server.url)
        began = time.monotonic()
        with pytest.raises((PipelineError, OSError)):
            CLIENTS[client](server.url)
        assert time.monotonic() - began < PATIENCE
    assert server.sent < IN_FLIGHT


@pytest.mark.parametrize("attack", ["endless_body", "gzip_bomb", "endless_error", "no_http"])
def test_a_conversation_ends(small: None, attack: str) -> None:
    """Those that drip are left to the user, who sees them: a long prompt takes long."""
    with hostile.start(hostile.ON_CLIENTS[attack]) as server, pytest.raises(PipelineError):
        chat(server.url)
    assert server.sent < IN_FLIGHT


def test_an_answer_to_a_question_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completions, "MOST_TEXT", 1000)
    event = b'data: {"choices": [{"delta": {"content": "again and again"}}]}\n\n'

    def talk(call: hostile.Call) -> None:
        call.send(hostile.HEAD + b"Connection: close\r\n\r\n")
        hostile.forever(call, event * 100)

    with hostile.start(talk) as server, pytest.raises(PipelineError, match="1,000 characters"):
        chat(server.url)


@pytest.mark.parametrize("deep", [b'{"data": ' + b"[" * 100_000, b'{"x": ' + b'{"a":' * 100_000])
def test_a_deep_answer_is_an_error(deep: bytes) -> None:
    def listed(call: hostile.Call) -> None:
        hostile.document(call, deep)

    with hostile.start(listed) as server, pytest.raises(PipelineError, match="unexpected answer"):
        models(server.url)

    def talk(call: hostile.Call) -> None:
        call.send(hostile.HEAD + b"Connection: close\r\n\r\n")
        call.send(b"data: " + deep + b"\n\n")
        raise OSError

    with hostile.start(talk) as server, pytest.raises(PipelineError, match="not an answer"):
        chat(server.url)


def test_an_instance_that_does_not_end_its_answer_is_left() -> None:
    """The gateway holds the part of an answer that it cannot pass on yet."""

    async def held(most: int) -> Answer:
        request = b"GET / HTTP/1.1\r\n\r\n"
        port = int(server.url.rpartition(":")[2])
        answer = Answer((request,), is_head=False, most=most)
        loop = asyncio.get_running_loop()
        await loop.create_connection(lambda: answer, "127.0.0.1", port)
        async with asyncio.timeout(PATIENCE):
            await answer.ended.wait()
        return answer

    for attack in ("endless_body", "endless_interim", "endless_header"):
        with hostile.start(hostile.ON_CLIENTS[attack]) as server:
            answer = asyncio.run(held(MIB))
        assert answer.failure and len(answer.kept) <= MIB, attack
        assert server.sent < IN_FLIGHT


def test_a_stream_without_line_breaks_is_not_held() -> None:
    """The gateway looks for the model's name in whole lines."""
    passed: list[bytes] = []
    renamed = Renamed(passed.append, lambda text: text)
    for _ in range(20):
        renamed.write(b"x" * 100_000)
    assert len(b"".join(passed)) > LONGEST_LINE


def test_an_answer_that_is_translated_at_once_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer in Ollama's form that is no stream is held until its end."""
    monkeypatch.setattr(exchange, "MOST_HELD", 1000)

    class Source:
        is_left = False

        def abort(self) -> None:
            self.is_left = True

    source: Any = Source()
    call = exchange.Call(path="/v1/embeddings", model="m", reply=Vectors("m"))
    made = exchange.Exchange(None, call, {})  # type: ignore[arg-type]
    made._scope = {}
    with made.body(source, 200, None) as body:
        body.write(b"x" * 1000)
        assert not source.is_left
        body.write(b"x")
        assert source.is_left


@pytest.mark.parametrize(
    ("attack", "message"), [("drip_body", r"only \d+ bytes in 0 s"), ("drip_headers", "no data in")]
)
def test_a_file_that_comes_byte_by_byte_is_given_up(
    small: None, monkeypatch: pytest.MonkeyPatch, attack: str, message: str
) -> None:
    monkeypatch.setattr(remote, "SLOWEST_SECONDS", 0.2)
    with hostile.start(hostile.ON_CLIENTS[attack]) as server, httpx2.Client() as http:
        location = remote.Location(url=server.url)
        options: dict[str, Any] = {"size": None, "timeout": 5, "pause": 0.01, "streamed": True}
        file = remote.Remote(http, "m.gguf", lambda: location, **options)
        with (
            pytest.raises(PipelineError, match=message) as error,
            closing(file.read(0, 9**6)) as data,
        ):
            list(data)
    assert error.value.hint.startswith("run it again")
