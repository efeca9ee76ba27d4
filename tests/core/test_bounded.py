"""What is read whole of a server has an end, whatever the server sends."""

from __future__ import annotations

import gzip
import threading

import httpx2
import pytest
from fakes import hostile

from pipeline.core import bounded
from pipeline.core.bounded import Bound
from pipeline.core.errors import PipelineError
from pipeline.core.parallel import within

MIB = 1024 * 1024
BOUND = Bound(bytes=MIB, seconds=0.5)
IN_FLIGHT = 40 * MIB  # what the buffers of both sides take, at most


@pytest.mark.parametrize("name", hostile.ON_CLIENTS)
def test_every_answer_ends(name: str) -> None:
    with (
        hostile.start(hostile.ON_CLIENTS[name]) as server,
        bounded.client(httpx2.Client(timeout=0.4)) as client,
        pytest.raises((PipelineError, httpx2.RequestError)) as error,
    ):
        within(20, lambda: bounded.get(client, server.url, BOUND, follow_redirects=True))
    assert server.sent < IN_FLIGHT
    if isinstance(error.value, PipelineError):
        assert error.value.message.startswith(server.url) and error.value.hint
        assert any(end in error.value.message for end in ("more than 1.0 MB", "after 0.5 s"))


def test_a_whole_answer() -> None:
    def attack(call: hostile.Call) -> None:
        hostile.document(call, b"{}")

    with hostile.start(attack) as server, httpx2.Client() as http:
        answer = bounded.get(http, f"{server.url}/a", BOUND, params={"b": True})
    assert (answer.status_code, answer.json(), server.paths) == (200, {}, ["/a?b=true"])


def test_what_was_compressed_is_whole() -> None:
    def attack(call: hostile.Call) -> None:
        data = gzip.compress(b"x" * 1000)
        head = hostile.HEAD + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n"
        call.send(head % len(data) + data)

    with hostile.start(attack) as server, httpx2.Client() as http:
        assert bounded.get(http, server.url, BOUND).content == b"x" * 1000


def test_the_library_reads_the_body_of_a_redirect_and_we_do_not() -> None:
    """Without this client's hook the attack is seen."""

    def sent(made: httpx2.Client) -> int:
        with (
            hostile.start(hostile.endless_redirect) as server,
            made as http,
            pytest.raises((PipelineError, httpx2.RequestError, TimeoutError)),
        ):
            within(1.5, lambda: bounded.get(http, server.url, BOUND, follow_redirects=True))
        return server.sent

    assert sent(bounded.client(httpx2.Client(timeout=5))) < IN_FLIGHT
    assert sent(httpx2.Client(timeout=5)) > IN_FLIGHT


def test_headers_that_do_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded, "HEADERS_SECONDS", 0.3)
    with (
        hostile.start(hostile.drip_headers) as server,
        httpx2.Client(timeout=5) as http,
        pytest.raises(httpx2.ReadTimeout),
        bounded.opened(http, server.url),
    ):
        pass


def test_an_address_is_shown_without_its_secrets() -> None:
    shown = bounded.address("https://me:secret@host:8/a/b?signature=x#y")
    assert shown == "https://host:8/a/b"


def test_within() -> None:
    assert within(5, lambda: "done") == "done"
    with pytest.raises(KeyError):
        within(5, lambda: {}["nothing"])
    waiting = threading.Event()
    with pytest.raises(TimeoutError):
        within(0.05, waiting.wait)
    waiting.set()
