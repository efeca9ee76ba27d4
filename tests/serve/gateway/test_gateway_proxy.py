"""The gateway as a process, before stand-ins that behave and misbehave."""

from __future__ import annotations

import json
import os
import socket
import socketserver
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import httpx2
import pytest
from conftest import free_port, wait_for
from gateway_tools import Site, reached, site, stop


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Site]:
    with site(tmp_path) as one:
        yield one


def later(pool: ThreadPoolExecutor, here: Site, **more: Any) -> Any:
    """A request in the background that is held by now."""
    before = here.metric("llama_gateway_held")
    request = pool.submit(here.chat, **more)
    wait_for(lambda: here.metric("llama_gateway_held") > before or request.done())
    return request


def everything(connection: socket.socket) -> bytes:
    """What is sent on a connection until it is closed."""
    return b"".join(iter(lambda: connection.recv(65536), b""))


# Passing through


WITHOUT_TLS = """
import ssl, sys

def refuse(*given, **more):
    sys.exit("a context of TLS is made")

ssl.SSLContext.__new__ = refuse
from pipeline.serve.gateway.__main__ import main
sys.exit(main())
"""


def test_certificates_are_loaded_for_servers_with_tls_alone(here: Site) -> None:
    here.upstream("chat")
    words = [str(here.at.path), json.dumps({"port": here.port})]
    here.start("gateway", [sys.executable, "-c", WITHOUT_TLS, *words])
    wait_for(lambda: reached(f"{here.url}/health"))
    assert here.chat("chat").status_code == 200
    assert here.metric('llamacpp:tokens_total{instance="chat"}') == 12_345_678


def test_body_and_headers_pass_untouched(here: Site) -> None:
    here.upstream("chat", aliases=("alias",))
    here.gateway()
    body = b'{ "model":"alias",\n "x": 1.0e3, "\xc3\xbc": 1}'
    headers = {"X-Mine": "1", "Connection": "X-Hop", "X-Hop": "1", "Accept-Encoding": "br"}
    answer = httpx2.post(f"{here.url}/v1/responses?beta=true", content=body, headers=headers)
    assert answer.status_code == 200 and answer.headers["x-upstream"] == "chat"
    (request,) = here.events("chat", "request")
    assert request["path"] == "/v1/responses?beta=true"
    assert request["body"].encode("latin-1") == body
    got = request["headers"]
    assert got["x-mine"] == "1" and got["accept-encoding"] == "br" and "x-hop" not in got
    assert got["host"] == f"127.0.0.1:{here.instances['chat'].port}"
    assert "transfer-encoding" not in answer.headers
    assert here.metric('llama_gateway_requests_total{instance="chat",status="200"}') == 1
    assert here.metric('llama_gateway_received_bytes_total{instance="chat"}') == len(body)
    assert here.metric('llama_gateway_sent_bytes_total{instance="chat"}') == len(answer.content)


def test_cookies_of_other_programs_do_not_reach_an_instance(here: Site) -> None:
    """A browser sends those of every program on this machine, whatever its port."""
    here.upstream("chat")
    here.gateway()
    cookies = {"Cookie": "a=" + "x" * 9000}
    assert here.post("/v1/completions", {"model": "chat"}, headers=cookies).status_code == 200
    (request,) = here.events("chat", "request")
    assert "cookie" not in request["headers"]


@pytest.mark.parametrize("more", [{"X-Long": "x" * 9000}, {f"X-{n}": "1" for n in range(98)}])
def test_headers_that_llama_server_cannot_read_are_refused(
    here: Site, more: dict[str, str]
) -> None:
    """It answers 400 without a word."""
    here.upstream("chat")
    here.upstream("other", engine="vllm")
    here.gateway()
    answer = here.post("/v1/completions", {"model": "chat"}, headers=more)
    assert answer.status_code == 431
    assert "llama-server reads 99 headers" in answer.json()["error"]["message"]
    assert (
        "llama-server reads"
        in here.post("/api/generate", {"model": "chat", "prompt": "x"}, headers=more).json()[
            "error"
        ]
    )
    assert not here.events("chat", "request")
    if "X-Long" in more:  # the stand-in has a limit of its own to their number
        assert here.post("/v1/completions", {"model": "other"}, headers=more).status_code == 200


FORM = "application/x-www-form-urlencoded"  # what curl -d says where no header is given


@pytest.mark.parametrize("given", [[], [FORM], ["text/plain", "application/json"]])
def test_what_was_read_as_json_is_sent_as_json(here: Site, given: list[str]) -> None:
    """vLLM refuses a body that is said to be anything else, and one that is said to be nothing."""
    here.upstream("chat")
    here.gateway()
    headers = [("Content-Type", kind) for kind in given]
    url = f"{here.url}/v1/chat/completions"
    assert httpx2.post(url, content=b'{"model": "chat"}', headers=headers).status_code == 200
    (request,) = here.events("chat", "request")
    assert request["types"] == ["application/json"]


def test_the_type_of_what_is_not_read_is_the_clients(here: Site) -> None:
    here.upstream("chat")
    here.gateway()
    headers = {"Content-Type": FORM}
    for path, body in (("/upstream/chat/v1/any", b"a=1"), ("/v1/chat/completions", b"")):
        assert httpx2.post(here.url + path, content=body, headers=headers).status_code == 200
    assert [event["types"] for event in here.events("chat", "request")] == [[FORM], [FORM]]


def test_a_name_among_the_settings_is_answered_to(here: Site) -> None:
    here.gateway(hosts=["named.example"])
    statuses = {
        host: here.get("/v1/models", headers={"Host": host}).status_code
        for host in ("named.example", "other.example")
    }
    assert statuses["named.example"] == 200 and statuses["other.example"] >= 400, statuses


class OnSocket(BaseHTTPRequestHandler):
    """A server on a Unix socket, behind the guard of its port."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", "7")
        self.end_headers()
        self.wfile.write(b"private")

    def address_string(self) -> str:  # a client on a Unix socket has none
        return ""


@pytest.mark.skipif(os.name == "nt", reason="guards no ports")
def test_a_guarded_server_is_asked_at_its_socket(here: Site) -> None:
    """Not through its guard: nothing listens at its port here."""
    here.add("chat")
    path = str(Path(tempfile.gettempdir(), f"{free_port()}.sock"))  # a short one
    with socketserver.ThreadingUnixStreamServer(path, OnSocket) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            here.says("chat", "ready", socket=path)
            here.gateway()
            assert here.chat("chat").text == "private"
        finally:
            server.shutdown()
            Path(path).unlink()
    refused = here.chat("chat")
    assert refused.status_code == 503 and "cannot be reached" in refused.text


def test_the_name_that_vllm_serves_is_put_in(here: Site) -> None:
    here.upstream("big", engine="vllm", aliases=("org/model", "other"))
    here.gateway()
    for model in ("big", "org/model", "OTHER"):
        assert here.chat(model, length=None).status_code == 200
    bodies = [json.loads(one["body"]) for one in here.events("big", "request")]
    assert [one["model"] for one in bodies] == ["org/model"] * 3
    assert bodies[0]["do"] == {"length": None}


def test_errors_of_an_instance_are_passed_on(here: Site) -> None:
    here.upstream("chat")
    here.gateway()
    for status in (400, 429, 500, 503):
        answer = here.chat(status=status)
        assert answer.status_code == status and answer.json()["error"]["type"] == "some_error"
    assert len(here.events("chat", "request")) == 4, "none is repeated"


TOO_LONG = {
    "code": 400,
    "message": "request (12031 tokens) exceeds the available context size (4096 tokens)",
    "type": "exceed_context_size_error",
    "n_prompt_tokens": 12031,
    "n_ctx": 4096,
}


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (TOO_LONG, "invalid_request_error", "prompt is too long: 12031 tokens > 4096 maximum"),
        ({"code": 400, "message": "no"}, "invalid_request_error", "no"),
        ({"code": 503, "message": "busy"}, "api_error", "busy"),
    ],
)
def test_errors_of_an_instance_have_the_form_of_the_clients_api(
    here: Site, error: dict[str, Any], kind: str, message: str
) -> None:
    """llama-server answers Anthropic's paths with errors of OpenAI's form."""
    here.upstream("chat")
    here.gateway()
    do = {"status": error["code"], "reply": json.dumps({"error": error})}
    answer = here.post("/v1/messages", {"model": "chat", "do": do})
    assert answer.status_code == error["code"]
    assert answer.json() == {"type": "error", "error": {"type": kind, "message": message}}
    assert here.chat("chat", **do).json() == {"error": error}
    own = json.dumps({"type": "error", "error": {"type": "x", "message": "as it is"}})
    do = {"status": 400, "reply": own}
    assert here.post("/v1/messages", {"model": "chat", "do": do}).text == own


def test_a_key_that_an_instance_refuses_is_not_the_clients(here: Site, tmp_path: Path) -> None:
    """llama-server reads its file of keys once, the gateway at each change."""
    file = tmp_path / "chat.key"
    file.write_text("new-key\n")
    here.upstream("chat", api_key_file=str(file))
    here.upstream("open")
    here.gateway()
    answer = here.chat("chat", status=401)
    assert answer.status_code == 502
    assert "chat refuses the first key of its file" in answer.json()["error"]["message"]
    assert "new-key" not in answer.text and str(file) not in answer.text
    assert here.chat("open", status=401).status_code == 401


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            "the current context does not support logits computation. skipping",
            "chat is an embedding model, which writes no text; ask it at /v1/embeddings",
        ),
        (
            "input (3002 tokens) is too large to process. increase the physical batch size "
            "(current batch size: 512)",
            "the input has 3,002 tokens, and chat takes 512 at most",
        ),
        (
            "image input is not supported - hint: you may need to provide the mmproj",
            "chat takes no image input: it is served without a projector",
        ),
        ("'messages' is required", "'messages' is required"),
        ("[json.exception.out_of_range.406] number overflow parsing '1e400'", "'1e400'"),
        ('Failed to parse tools: Missing tool type: {"x":1}', "Missing tool type"),
        ('"prompt" elements must be a string, a list of tokens', "elements must be a string"),
        ("Unknown reasoning format: x", "Unknown reasoning format: x"),
        ("Invalid base64 value", "Invalid base64 value"),
        (
            "error: cannot make GET request",
            "chat cannot download the image; send it as a data: URL",
        ),
        ("Failed to download image", "chat cannot download the image; send it as a data: URL"),
        ("vector::_M_default_append", "a number in the request is out of range"),
        ("vector::_M_range_check: __n (which is 9) >= this->size()", "number in the request"),
    ],
)
def test_a_request_that_is_wrong_is_not_called_an_error_of_the_server(
    here: Site, said: str, told: str
) -> None:
    """llama-server answers with status 500, after which clients send it again."""
    here.upstream("chat")
    here.gateway()
    error = {"error": {"code": 500, "message": said, "type": "server_error"}}
    do = {"status": 500, "reply": json.dumps(error)}
    answer = here.chat("chat", **do)
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")
    assert told in answer.json()["error"]["message"]
    assert here.post("/v1/messages", {"model": "chat", "do": do}).json()["type"] == "error"
    for own in ("other", "[json.exception.type_error.316] invalid UTF-8 byte"):
        other = json.dumps({"error": {"code": 500, "message": own, "type": "server_error"}})
        assert here.chat("chat", status=500, reply=other).status_code == 500


def test_what_an_instance_cannot_do_is_not_asked_again(here: Site) -> None:
    here.upstream("chat")
    here.gateway()
    assert here.chat(status=501).headers["x-should-retry"] == "false"
    assert "x-should-retry" not in here.chat(status=500).headers


def test_a_reranker_is_not_called_an_embedding_model(here: Site) -> None:
    here.upstream("ranks", kind="rerank")
    here.gateway()
    error = {"error": {"code": 500, "message": "context does not support logits computation"}}
    answer = here.chat("ranks", status=500, reply=json.dumps(error))
    told = "ranks is a reranker, which writes no text; ask it at /v1/rerank"
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, told)


def test_an_error_without_a_word_is_told_in_the_form_of_the_clients_api(here: Site) -> None:
    """llama-server answers so to a form that is cut short, for one."""
    here.upstream("chat")
    here.gateway()
    do = {"status": 400, "reply": ""}
    told = "chat answered 400 (Bad Request) and gave no reason"
    assert here.chat("chat", **do).json()["error"]["message"] == told
    answer = here.post("/v1/messages", {"model": "chat", "do": do})
    assert answer.status_code == 400
    error = {"type": "invalid_request_error", "message": told}
    assert answer.json() == {"type": "error", "error": error}


def test_events_come_one_by_one(here: Site) -> None:
    here.upstream("chat")
    here.gateway()
    body = {"model": "chat", "do": {"chunks": 20, "pause": 0.1}}
    times = []
    with httpx2.stream("POST", f"{here.url}/v1/completions", json=body, timeout=60) as answer:
        assert answer.headers["content-type"] == "text/event-stream"
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                times.append(time.monotonic())
    assert len(times) == 20
    assert times[-1] - times[0] > 1, "they did not come in one piece at the end"


def test_a_proxy_in_front_is_told_to_keep_no_event_back(here: Site) -> None:
    """nginx collects an answer unless a header says otherwise, and not every engine sends it."""
    here.upstream("chat")
    here.gateway()
    body = {"model": "chat", "do": {"chunks": 1}}
    for method, path, sent in (
        ("POST", "/v1/chat/completions", body),
        ("GET", "/models/sse", None),
    ):
        with httpx2.stream(method, here.url + path, json=sent, timeout=60) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            assert answer.headers.get_list("x-accel-buffering") == ["no"], path
    assert "x-accel-buffering" not in here.chat("chat").headers


def test_a_long_body_is_refused_before_it_is_read(here: Site) -> None:
    here.upstream("chat")
    here.gateway()
    with socket.create_connection(("127.0.0.1", here.port)) as connection:
        connection.sendall(
            b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000001\r\n\r\n{"
        )
        answer = everything(connection)
    assert answer.startswith(b"HTTP/1.1 413 ") and b'"request_too_large"' in answer
    big = {"model": "chat", "text": "x" * 5_000_000}
    assert here.post("/v1/chat/completions", big).status_code == 200


def test_a_compressed_body_is_refused_with_what_to_do(here: Site) -> None:
    here.upstream("chat")
    here.gateway()
    for coding, status in (("gzip", 415), ("identity", 200), ("Identity", 200), ("", 200)):
        headers = {"Content-Encoding": coding}
        answer = here.post("/v1/chat/completions", {"model": "chat"}, headers=headers)
        assert answer.status_code == status
        assert (status == 200) == ("uncompressed" not in answer.text)


def test_a_body_without_a_length_is_counted(here: Site) -> None:
    here.upstream("chat")
    here.gateway()

    def blocks(count: int) -> Iterator[bytes]:
        yield b'{"model": "chat", "text": "'
        for _ in range(count):
            yield b"x" * 1_000_000
        yield b'"}'

    url = f"{here.url}/v1/chat/completions"
    assert httpx2.post(url, content=blocks(3), timeout=60).status_code == 200
    refused = httpx2.post(url, content=blocks(101), timeout=60)  # it still writes by then
    assert refused.status_code == 413 and "100,000,000 bytes" in refused.text
    assert len(here.events("chat", "request")) == 1


def test_a_client_that_is_refused_while_it_sends_reads_the_reason(here: Site) -> None:
    here.upstream("chat")
    here.gateway()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
    with socket.create_connection(("127.0.0.1", here.port), timeout=30) as connection:
        connection.sendall(head + b"Content-Length: 130000000\r\n\r\n")
        for _ in range(130):
            connection.sendall(b"x" * 1_000_000)
        assert everything(connection).startswith(b"HTTP/1.1 413 ")
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", here.port), timeout=30) as connection:
        connection.sendall(head + b"Content-Length: 130000000\r\n\r\nx")
        assert everything(connection).startswith(b"HTTP/1.1 413 ")
        assert stop(here.processes["gateway"]) == 0  # it is still open, but is not waited for
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("length", "status"), [(20_000, b"404"), (60_000, b"404"), (70_000, b"431"), (300_000, b"431")]
)
def test_a_long_head_is_read_alike_in_whatever_parts_it_comes(
    here: Site, length: int, status: bytes
) -> None:
    here.upstream("chat")
    here.gateway()
    head = b"GET /%b HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n" % (b"a" * length)
    for first in (len(head), 17_000, len(head) - 3):
        with socket.create_connection(("127.0.0.1", here.port), timeout=30) as connection:
            connection.sendall(head[:first])
            if first < len(head):
                time.sleep(0.1)
                connection.sendall(head[first:])
            answer = everything(connection)
        assert answer.startswith(b"HTTP/1.1 %b " % status)
        assert b"application/json" in answer and b'"message"' in answer


def test_a_transcription_is_routed_by_its_form(here: Site) -> None:
    here.upstream("chat")
    here.upstream("ears", engine="vllm", aliases=("whisper-1",))
    here.gateway()
    sound = os.urandom(100_000)
    answer = httpx2.post(
        f"{here.url}/v1/audio/transcriptions",
        files={"file": ("a.wav", sound)},
        data={"model": "EARS"},
    )
    assert answer.status_code == 200
    (request,) = here.events("ears", "request")
    body = request["body"].encode("latin-1")
    assert sound in body and b"whisper-1" in body and b"EARS" not in body
    (kind,) = request["types"]
    assert kind.startswith("multipart/form-data; boundary=")


STREAM = '{"model": "chat", "do": {"chunks": 3, "pause": 0.05}}'
DOCUMENT = '{"model": "chat"}'


def talk(here: Site, version: str, body: str, *more_headers: tuple[str, ...]) -> bytes:
    """All that comes back for requests on one connection, one for each tuple of headers."""
    head = (f"POST /v1/chat/completions HTTP/{version}", "Host: localhost")
    with socket.create_connection(("127.0.0.1", here.port), timeout=30) as client:
        for headers in more_headers:
            lines = (*head, f"Content-Length: {len(body)}", *headers, "", body)
            client.sendall("\r\n".join(lines).encode())
        answer = b""
        while block := client.recv(65536):
            answer += block
    return answer


def test_a_connection_goes_on_after_an_answer(here: Site) -> None:
    here.upstream("chat")
    here.gateway()
    told = talk(here, "1.1", STREAM, (), ("Connection: close",))
    assert told.count(b"HTTP/1.1 200 ") == told.count(b"\r\n0\r\n\r\n") == 2
    assert told.count(b"[DONE]") == 2
    told = talk(here, "1.1", DOCUMENT, (), ("Connection: close",))
    assert told.count(b"HTTP/1.1 200 ") == told.count(b"content-length") == 2
    assert "Traceback" not in here.output()


def test_an_old_client_gets_no_chunks(here: Site) -> None:
    here.upstream("chat")
    here.gateway()
    head, _, body = talk(here, "1.0", STREAM, ()).partition(b"\r\n\r\n")
    assert b"chunked" not in head and b"connection: close" in head.lower()
    assert body.startswith(b"data: ") and body.endswith(b"data: [DONE]\n\n")


def test_a_client_that_does_not_read_stops_its_server(here: Site) -> None:
    here.upstream("chat")
    here.gateway()
    asked = b'{"model": "chat", "do": {"chunks": 10000000, "pause": 0}}'
    line = 'llama_gateway_sent_bytes_total{instance="chat"}'
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", here.port))
        head = b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
        client.sendall(head % len(asked) + asked)
        seen: list[float] = [0]

        def stands() -> bool:
            time.sleep(0.5)
            seen.append(here.metric(line))
            return 0 < seen[-1] == seen[-2]

        wait_for(stands)
        assert seen[-1] < 20_000_000


# Clients that go away


def test_a_client_that_leaves_ends_its_stream(here: Site) -> None:
    here.upstream("chat")
    here.gateway()
    body = {"model": "chat", "do": {"chunks": 100_000, "pause": 0.02}}
    with httpx2.stream("POST", f"{here.url}/v1/chat/completions", json=body) as answer:
        next(answer.iter_lines())
    wait_for(lambda: here.events("chat", "gone"))
    wait_for(lambda: here.metric('llama_gateway_in_flight{instance="chat"}') == 0)


def test_a_client_that_leaves_ends_its_wait_for_an_answer(here: Site) -> None:
    here.upstream("chat", "--slow", 60)
    here.gateway()
    asked = b'{"model": "chat"}'
    with socket.create_connection(("127.0.0.1", here.port)) as client:
        lines = ("POST /v1/messages HTTP/1.1", f"Host: 127.0.0.1:{here.port}")
        head = "\r\n".join([*lines, f"Content-Length: {len(asked)}", "", ""])
        client.sendall(head.encode() + asked)
        wait_for(lambda: here.events("chat", "request"))  # it is on the way to the answer
    wait_for(lambda: here.events("chat", "gone"))
    wait_for(lambda: here.metric('llama_gateway_requests_total{instance="chat",status="499"}'))


def test_a_client_that_leaves_is_not_held(here: Site) -> None:
    here.upstream("chat", state="loading")
    here.gateway()
    with pytest.raises(httpx2.ReadTimeout):
        httpx2.post(f"{here.url}/v1/messages", json={"model": "chat"}, timeout=0.5)
    wait_for(lambda: here.metric("llama_gateway_held") == 0)
    here.says("chat", "ready")
    assert here.chat().status_code == 200
    assert len(here.events("chat", "request")) == 1


# Waiting


@pytest.mark.parametrize("state", ["waiting", "loading", "pausing", "stopping"])
def test_a_request_is_held_until_its_instance_is_ready(here: Site, state: str) -> None:
    here.upstream("chat", state=state)
    here.upstream("other")
    here.gateway()
    with ThreadPoolExecutor() as pool:
        held = later(pool, here, model="chat")
        assert here.chat("other").status_code == 200, "others are not"
        assert not held.done()
        here.says("chat", "ready")
        assert held.result(30).json()["name"] == "chat"


def test_a_request_waits_for_a_server_that_answers_that_it_loads(here: Site) -> None:
    here.upstream("chat", "--loading", 1.5)
    here.gateway()
    assert here.chat().status_code == 200


def test_what_failed_is_told_at_once_with_its_reason(here: Site) -> None:
    here.add("chat", state="failed", aliases=("m",))
    here.says("chat", "failed", "exit status 1:\n  | a secret of the log")
    here.add("more", state="stopped", aliases=("m",))
    here.gateway()
    answer = here.chat("m")
    assert answer.status_code == 503 and answer.headers["retry-after"]
    told = answer.json()["error"]["message"]
    assert "chat is failed: exit status 1; more is stopped" in told and "secret" not in told


def test_what_failed_on_demand_is_answered_with_the_time_until_its_next_try(here: Site) -> None:
    here.add("chat", start="demand", state="failed")
    here.says("chat", "failed", "out of memory", retry_at=time.monotonic() + 100)
    here.gateway()
    answer = here.chat()
    assert answer.status_code == 503 and "out of memory" in answer.text
    assert 60 < int(answer.headers["retry-after"]) <= 100


def test_a_held_request_ends_when_its_instance_fails(here: Site) -> None:
    here.add("chat", state="loading")
    here.gateway()
    with ThreadPoolExecutor() as pool:
        held = later(pool, here, model="chat")
        here.says("chat", "failed", "out of memory")
        answer = held.result(30)
    assert answer.status_code == 503 and "out of memory" in answer.text


def test_a_request_is_held_no_longer_than_said(here: Site) -> None:
    here.add("chat", state="loading", ready_timeout=0.5)
    here.gateway()
    answer = here.chat()
    assert answer.status_code == 503 and "within 0.5 s: chat is loading" in answer.text
    stop(here.processes["gateway"])
    here.change("chat", ready_timeout=600.0)
    here.gateway(hold_timeout=0.25)
    assert "within 0.25 s" in here.chat().text


# Failing over


def names(here: Site, count: int, model: str) -> Counter[str]:
    return Counter(here.chat(model).json()["name"] for _ in range(count))


def test_instances_of_one_alias_take_turns(here: Site) -> None:
    here.upstream("a", aliases=("m",))
    here.upstream("b", aliases=("m",))
    here.upstream("c", aliases=("m",), state="loading")
    here.gateway()
    assert names(here, 10, "m") == {"a": 5, "b": 5}
    assert names(here, 3, "b") == {"b": 3}
    here.says("b", "stopping")
    assert names(here, 4, "m") == {"a": 4}


def test_the_one_with_less_to_do_is_asked(here: Site) -> None:
    here.upstream("a", aliases=("m",))
    here.upstream("b", aliases=("m",))
    here.gateway()
    with ThreadPoolExecutor() as pool:
        pool.submit(here.chat, "a", slow=600)
        wait_for(lambda: here.events("a", "request"))
        assert names(here, 5, "m") == {"b": 5}
        here.kill("gateway")


def test_an_instance_that_cannot_be_reached_is_passed_over(here: Site) -> None:
    here.add("a", aliases=("m",))
    here.upstream("b", aliases=("m",))
    here.upstream("c", "--loading", 600, aliases=("m",))
    here.gateway()
    assert names(here, 6, "m") == {"b": 6}
    assert here.metric('llama_gateway_failures_total{instance="a"}') >= 1
    assert "POST /v1/chat/completions: a cannot be reached" in here.output()


def test_one_that_dies_before_it_answers_is_replaced(here: Site) -> None:
    here.upstream("a", "--die", aliases=("m",))
    here.upstream("b", aliases=("m",))
    here.gateway()
    assert names(here, 3, "m") == {"b": 3}
    assert len(here.events("a", "request")) == 1


def test_a_request_that_kills_its_server_does_not_kill_all(here: Site) -> None:
    for name in "abc":
        here.upstream(name, aliases=("m",))
    here.gateway()
    answer = here.chat("m", die=True)
    assert answer.status_code == 502 and "ended without an answer" in answer.text
    # OpenAI's and Anthropic's clients send again, twice, after any other status from 500 on
    assert answer.headers["x-should-retry"] == "false"
    assert sum(len(here.events(name, "request")) for name in "abc") == 2
    assert here.chat("m").status_code == 200


def test_nothing_is_repeated_after_the_first_byte(here: Site) -> None:
    here.upstream("a", aliases=("m",))
    here.upstream("b", aliases=("m",))
    here.gateway()
    told = here.chat("m", chunks=5, die_after=2).text
    assert '"number": 1}' in told and '"number": 2}' not in told and "[DONE]" not in told
    assert 'data: {"error": {"message": "a broke off its answer"' in told
    events = here.post(
        "/v1/messages", {"model": "b", "do": {"chunks": 5, "die_after": 2, "pause": 0.01}}
    )
    assert 'event: error\ndata: {"type": "error"' in events.text
    assert len(here.events("b", "request")) == 1


def test_a_document_that_is_cut_short_breaks_the_connection(here: Site) -> None:
    here.upstream("chat")
    here.gateway()
    with pytest.raises(httpx2.RemoteProtocolError):
        here.chat(length=1000)
    assert "Traceback" not in here.output()
    assert here.chat().status_code == 200


def test_a_restart_is_waited_for(here: Site) -> None:
    """The file still says ready when the server is already gone."""
    here.upstream("chat")
    here.gateway()
    here.kill("chat")
    with ThreadPoolExecutor() as pool:
        held = later(pool, here, model="chat")
        here.says("chat", "pausing")
        here.run("chat")
        here.says("chat", "loading")
        assert not held.done()
        here.says("chat", "ready")
        assert held.result(30).json()["name"] == "chat"


def test_one_that_is_said_to_be_ready_and_is_not_is_no_endless_wait(here: Site) -> None:
    here.add("chat")
    here.gateway()
    answer = here.chat()
    assert answer.status_code == 503
    assert "no server answers: chat cannot be reached" in answer.json()["error"]["message"]


def test_a_server_that_comes_back_is_used_at_once(here: Site) -> None:
    here.add("chat")
    here.gateway()
    with ThreadPoolExecutor() as pool:
        held = later(pool, here, model="chat")
        here.run("chat")
        assert held.result(30).status_code == 200


# Keys and origins


def test_no_path_but_health_answers_without_the_key(here: Site) -> None:
    (here.path / "key").write_text("right-~\n")
    (here.path / "own").write_text("of-the-instance\n")
    here.upstream("chat", api_key_file=str(here.path / "own"))
    here.upstream("bare")
    here.gateway(api_key_file=here.path / "key")
    for method, path in (
        ("GET", "/v1/models"),
        ("GET", "/props"),
        ("GET", "/metrics"),
        ("GET", "/nothing"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/api/event_logging/batch"),
    ):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"x-api-key": "right"}):
            answer = httpx2.request(method, here.url + path, headers=headers)
            assert answer.status_code == 401, path
            assert answer.json()["error"]["type"] == "authentication_error"
    assert here.get("/health").json() == {"status": "ok"}
    assert here.get("/").json() == {"name": "llama-pipeline gateway"}
    bearer = {"Authorization": "Bearer right-~"}
    anthropic = {"x-api-key": "right-~"}
    assert "instances" in here.get("/health", headers=bearer).json()
    for model in ("chat", "bare"):
        for headers in (bearer, anthropic):
            assert here.post("/v1/messages", {"model": model}, headers=headers).status_code == 200
    for request in here.events("chat", "request"):
        assert request["headers"]["authorization"] == "Bearer of-the-instance"
        assert "x-api-key" not in request["headers"]
    for request in here.events("bare", "request"):
        assert not {"authorization", "x-api-key"} & set(request["headers"])
    assert "right" not in here.output()


def test_only_pages_of_this_machine_get_answers(here: Site) -> None:
    here.upstream("chat")
    here.gateway()
    path, allow = "/v1/models", "access-control-allow-origin"
    for origin in ("http://localhost", "https://localhost:3000", "http://[::1]:80"):
        assert here.get(path, headers={"Origin": origin}).headers[allow] == origin
    for origin in ("http://evil.example", "http://localhost.evil.example", "null"):
        assert allow not in here.get(path, headers={"Origin": origin}).headers
        answer = here.post("/v1/chat/completions", {"model": "chat"}, headers={"Origin": origin})
        assert answer.status_code == 403 and allow not in answer.headers
    assert not here.events("chat", "request"), "the model had no work of it"
    assert here.get(path, headers={"Host": "evil.example"}).status_code == 403, (
        "led to this machine"
    )
    assert here.get(path, headers={"Host": "localhost:1", "Origin": here.url}).status_code == 200
    asked = {"Origin": "http://localhost:1", "Access-Control-Request-Method": "POST"}
    answer = httpx2.options(f"{here.url}/v1/messages", headers=asked)
    assert answer.status_code == 200 and answer.headers[allow] == "http://localhost:1"


def test_a_server_elsewhere_brings_the_key(here: Site) -> None:
    """Its name and its origin do not matter then; a page still cannot read the answer."""
    (here.path / "key").write_text("right\n")
    here.upstream("chat")
    here.gateway(api_key_file=here.path / "key")
    headers = {"Origin": "http://a.example", "Host": "a.example", "Authorization": "Bearer right"}
    answer = here.post("/v1/chat/completions", {"model": "chat"}, headers=headers)
    assert answer.status_code == 200
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("path", ["/x.js%0A", "/v1/completions%0A", f"/{'a' * 60_000}.js"])
def test_odd_paths_are_no_paths(here: Site, path: str) -> None:
    here.upstream("chat")
    here.gateway()
    for method in ("GET", "POST"):
        assert httpx2.request(method, here.url + path).status_code == 404
    assert "Traceback" not in here.output()


def test_a_hung_instance_holds_no_file_of_the_page(here: Site) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=16) as hung:
        here.add("chat")
        here.change("chat", port=hung.getsockname()[1])
        here.gateway()
        began = time.monotonic()
        assert httpx2.get(f"{here.url}/bundle.js", timeout=30).status_code == 404
        assert time.monotonic() - began > 1, "it was asked"


@pytest.mark.parametrize(
    ("settings", "status", "text"),
    [
        ({"host": "0.0.0.0"}, 3, "there is no API key"),
        ({"api_key_file": "/nowhere/key"}, 3, "is not a file"),
    ],
)
def test_it_refuses_to_start(here: Site, settings: dict[str, str], status: int, text: str) -> None:
    with pytest.raises(AssertionError, match=text):
        here.gateway(**settings)
    assert here.processes["gateway"].wait() == status


def test_a_port_in_use_is_told(here: Site) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        here.port = taken.getsockname()[1]
        here.url = f"http://127.0.0.1:{free_port()}"
        with pytest.raises(AssertionError, match="is in use"):
            here.gateway()
    assert here.processes["gateway"].wait() == 1


# Its own answers


def test_its_own_paths(here: Site) -> None:
    here.upstream("chat", aliases=("org/alias",))
    here.add("search", kind="embedding", state="loading")
    here.gateway()
    assert here.get("/").json()["models"] == ["chat", "org/alias", "search"]
    assert here.get("/health").json() == {
        "status": "degraded",
        "instances": {"chat": {"state": "ready"}, "search": {"state": "loading"}},
    }
    assert here.get("/v1/models/org/alias").json()["instances"] == ["chat"]
    assert here.get("/v1/models/CHAT").json()["instances"] == ["chat"]
    assert "did you mean chat?" in here.get("/v1/models/chta").json()["error"]["message"]
    assert here.get("/v1/models/none").status_code == 404
    assert here.get("/nothing").json()["error"]["message"] == "there is no /nothing"
    for odd in ("//v1/models", "/v1/models/", "/V1/Models", "/v1/v1/models", "/api/v1/models"):
        assert f"no {odd}; did you mean /v1/models?" in here.get(odd).text
    assert here.get("/v1/messages").json()["type"] == "error"
    answer = here.get("/v1/chat/completions")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert answer.json()["error"]["message"] == "no GET for /v1/chat/completions"
    assert here.post("/api/event_logging/batch", {"events": []}).status_code == 200
    answer = httpx2.post(f"{here.url}/v1/embeddings", content=b'{"model": "\\ud800"}')
    assert answer.status_code == 400, "no valid text, and no failure"
    answer = here.post("/v1/embeddings", {"model": "searh"})
    assert answer.status_code == 404 and "did you mean search?" in answer.text


def test_metrics_of_all(here: Site) -> None:
    here.upstream("a")
    here.upstream("b")
    here.add("c")
    here.add("d", state="loading")
    here.gateway()
    assert here.chat("a").status_code == 200
    text = here.get("/metrics").text
    for line in (
        'llamacpp:tokens_total{instance="a"} 12345678',
        'llamacpp:tokens_total{instance="b"} 12345678',
        'latency_bucket{instance="a",le="0.5",exported_instance="inner"} 3',
        'llama_gateway_first_byte_seconds_count{instance="a"} 1',
        'llama_gateway_instance_ready{instance="d"} 0',
    ):
        assert f"\n{line}\n" in text
    heads = [line for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(heads) == len(set(heads))


def test_patterns_lead_to_a_model(here: Site) -> None:
    here.upstream("chat")
    here.upstream("other")
    here.gateway(models={"claude-*": "chat"})
    assert here.post("/v1/messages", {"model": "claude-opus-9"}).json()["name"] == "chat"
    (request,) = here.events("chat", "request")
    assert "claude-opus-9" in request["body"], "llama-server takes any name"


def test_instances_come_and_go_without_a_restart(here: Site) -> None:
    here.upstream("a")
    here.gateway()
    assert here.chat("b").status_code == 404
    here.upstream("b")
    assert here.chat("b").status_code == 200
    del here.instances["a"]
    here.write()
    assert here.chat("a").status_code == 404


# Its end


def test_it_ends_soon_even_amid_streams(here: Site) -> None:
    here.upstream("chat")
    here.add("slow", state="loading")
    here.gateway()
    body = {"model": "chat", "do": {"chunks": 100_000, "pause": 0.02}}
    came = threading.Event()

    def read() -> None:
        with httpx2.stream("POST", f"{here.url}/v1/chat/completions", json=body) as answer:
            for _ in answer.iter_lines():
                came.set()

    with ThreadPoolExecutor() as pool:
        stream = pool.submit(read)
        held = later(pool, here, model="slow")
        assert came.wait(30)
        begin = time.monotonic()
        assert stop(here.processes["gateway"]) == 0  # long before the stream would end
        assert time.monotonic() - begin < 5
        assert isinstance(stream.exception(30), httpx2.TransportError)
        assert (
            held.result(30).status_code == 503
            and "the gateway is shutting down" in held.result().text
        )
    assert "Traceback" not in here.output()
    wait_for(lambda: here.events("chat", "gone"))
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", here.port)) != 0


def test_many_at_once(here: Site) -> None:
    here.upstream("a", aliases=("m",))
    here.upstream("b", aliases=("m",))
    here.gateway()
    with ThreadPoolExecutor(32) as pool:
        told = list(pool.map(lambda n: here.chat("m", chunks=3, pause=0.05, n=n), range(96)))
    assert all(one.text.endswith("[DONE]\n\n") for one in told)
    assert {len(here.events(name, "request")) for name in "ab"} <= set(range(30, 67))
    assert here.metric('llama_gateway_in_flight{instance="a"}') == 0


# What only one instance has, and what llama-server says


def test_the_paths_of_one_instance_are_reached_under_its_name(here: Site) -> None:
    (here.path / "key").write_text("right\n")
    (here.path / "own").write_text("of-the-instance\n")
    here.upstream("chat", api_key_file=str(here.path / "own"), aliases=("both",))
    here.upstream("more", aliases=("both",))
    here.gateway(api_key_file=here.path / "key")
    bearer = {"Authorization": "Bearer right"}
    path, body = "/upstream/chat/slots/0?action=save", b'{"filename": [1]}'
    assert httpx2.post(here.url + path, content=body).status_code == 401
    answer = httpx2.post(here.url + path, content=body, headers=bearer)
    assert answer.status_code == 200 and answer.headers["x-upstream"] == "chat"
    (request,) = here.events("chat", "request")
    assert request["path"] == "/slots/0?action=save" and request["body"].encode() == body
    assert request["headers"]["authorization"] == "Bearer of-the-instance"
    answer = here.get("/upstream/more/metrics", headers=bearer)
    assert answer.text.startswith("# HELP llamacpp:")
    for query in ("", "?lang=de&q=%C3%BC+%26"):
        answer = here.get(f"/upstream/more{query}", headers=bearer)
        assert (answer.status_code, answer.headers["location"]) == (307, f"./more/{query}")
    answer = here.get("/upstream/chta/slots", headers=bearer)
    assert answer.status_code == 404
    assert "there is no instance chta; did you mean chat?" in answer.json()["error"]["message"]


def test_an_alias_leads_to_the_paths_of_its_instance_too(here: Site) -> None:
    """Clients take the names of the list of models, in which aliases stand."""
    here.upstream("chat", aliases=("both", "small", "org/Model"))
    here.upstream("more", aliases=("both",))
    here.gateway()
    for name in ("small", "org/Model", "org/model", "Chat", "chat"):
        answer = here.post(f"/upstream/{name}/slots/0", {})
        assert answer.status_code == 200 and answer.headers["x-upstream"] == "chat", name
    assert {event["path"] for event in here.events("chat", "request")} == {"/slots/0"}
    assert here.get("/scaling/small").json()["requests"] == 0
    answer = here.get("/upstream/both/slots")
    assert answer.status_code == 404 and "both means several: chat, more" in answer.text
    answer = here.get("/upstream/org/other/slots")
    assert answer.status_code == 404 and "there is no instance org" in answer.text


def test_an_answer_has_the_name_that_was_asked_for(here: Site) -> None:
    here.upstream("chat", aliases=("gpt-4o", "ä/b"))
    here.upstream("plain")
    here.gateway(models={"claude-*": "chat"})
    inner = '{"model":"gpt-4o"}'
    for asked, said in (
        ("claude-9", "ä/b"),
        ("CHAT", "gpt-4o"),
        ("gpt-4o", "chat"),
        ("ä/b", "chat"),
    ):
        reply = json.dumps({"model": said, "text": inner, "x": {"model": "other"}})
        answer = here.chat(asked, reply=reply)
        assert answer.json() == {"model": asked, "text": inner, "x": {"model": "other"}}
        events = here.chat(asked, chunks=3, pause=0.01, reply=reply).text
        assert events.count(f'"model": {json.dumps(asked)}') == 3 and events.endswith("[DONE]\n\n")
    answer = here.chat("plain", reply='{"model": "chat"}')
    assert answer.json() == {"model": "chat"} and "content-length" in answer.headers


def test_a_model_that_a_tool_is_called_with_keeps_its_name(here: Site) -> None:
    """Anthropic's API has the arguments of a call as an object, in the midst of the answer."""
    here.upstream("chat", aliases=("claude",))
    here.gateway()
    call = {"type": "tool_use", "name": "paint", "input": {"model": "chat"}}
    reply = json.dumps({"content": [call], "model": "chat"})
    answer = here.post("/v1/messages", {"model": "claude", "do": {"reply": reply}}).json()
    assert answer == {"content": [call], "model": "claude"}
    several = json.dumps([{"model": "chat", "x": {"model": "chat"}}, {"n": 1}])
    answer = here.post("/completion", {"model": "claude", "do": {"reply": several}}).json()
    assert answer == [{"model": "claude", "x": {"model": "chat"}}, {"n": 1}]
    for other in ("[ ]", '"model": "chat"', '{ "x": 1}'):
        answer = here.post("/completion", {"model": "claude", "do": {"reply": other}})
        assert answer.text == other


def test_a_trailing_slash_and_tools_are_answered_as_by_llama_server(here: Site) -> None:
    here.upstream("chat")
    here.gateway()
    for path in ("/v1/models/", "/health/", "/v1/chat/completions/"):
        assert here.get(path).status_code == 404
    assert here.post("/v1/chat/completions/", {"model": "chat"}).status_code == 404
    for method in ("GET", "POST"):
        answer = httpx2.request(method, f"{here.url}/tools")
        assert answer.status_code == 403
        assert answer.json()["error"]["type"] == "feature_disabled"


def test_the_list_of_models_has_what_llama_server_knows(here: Site) -> None:
    meta = {"n_ctx": 2048, "n_ctx_train": 8192, "size": 1}
    listed = {"data": [{"id": "chat", "meta": meta}], "models": [{"capabilities": ["completion"]}]}
    here.upstream("chat", "--models", json.dumps(listed), aliases=("gpt-4o",))
    here.upstream("odd", "--models", "[]")
    here.add("later", state="loading")
    here.gateway()
    entries = {entry["id"]: entry for entry in here.get("/v1/models").json()["data"]}
    for name, other in (("chat", "gpt-4o"), ("gpt-4o", "chat")):
        for entry in (entries[name], here.get(f"/v1/models/{name}").json()):
            assert entry["meta"] == meta and entry["capabilities"] == ["completion"]
            assert entry["aliases"] == [other]
    for name in ("odd", "later"):
        assert "meta" not in entries[name] and entries[name]["aliases"] == []
    here.kill("chat")
    entry = here.get("/v1/models/chat").json()
    assert entry["meta"] == meta, "it is asked once"
    here.says("chat", "loading")
    assert "meta" not in here.get("/v1/models/chat").json()
