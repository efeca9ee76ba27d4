"""What the gateway lets in: pages, names, and requests that would stall it or mislead it."""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import httpx2
import pytest
from conftest import wait_for
from gateway_tools import Site, reached, site

from pipeline.serve.gateway.guard import Origins
from pipeline.serve.gateway.request_body import MAX_BYTES, parse_body
from pipeline.serve.gateway.settings import GatewaySettings
from pipeline.serve.guard.refusal import Refused

ALLOW = "access-control-allow-origin"


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Site]:
    with site(tmp_path) as one:
        yield one


def refusal(settings: GatewaySettings, method: str = "GET", **headers: str) -> str:
    """Why a request is refused; empty where it is not."""
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "path": "/v1/models", "method": method, "headers": raw}
    refused = Origins(SimpleNamespace(), settings)._refusal(scope)  # type: ignore[arg-type]
    return refused.message if refused else ""


# Names


@pytest.mark.parametrize(
    "host",
    [
        *("localhost", "LOCALHOST:9000", "localhost.", "app.localhost:80", "127.0.0.1", "[::1]:1"),
        *("192.168.1.5:9000", "0.0.0.0:9000", "[fe80::1]", "gpu-box.local", "gpu-box.local.:9000"),
        *("host.docker.internal:9000", "metadata.x.internal", socket.gethostname(), ""),
    ],
)
def test_names_that_lead_to_this_machine_alone_are_its_own(host: str) -> None:
    assert refusal(GatewaySettings(), host=host) == ""
    assert refusal(GatewaySettings(), host=host, origin=f"http://{host or 'localhost'}") == ""


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "xlocal", "internal", "a:b:c", "a b"]
)
def test_any_other_name_is_refused_by_name(host: str) -> None:
    why = refusal(GatewaySettings(), host=host)
    assert f"the name {host}; add it to hosts in [gateway], or set an API key" in why
    assert refusal(GatewaySettings(api_key_file="/key"), host=host) == ""


def test_names_can_be_added() -> None:
    settings = GatewaySettings(hosts=("GPU-box.lan", "*.corp.example"))
    for host in ("gpu-box.lan:9000", "a.b.corp.example", "localhost"):
        assert refusal(settings, host=host) == ""
    for host in ("corp.example", "gpu-box.lan.evil.example", "gpu-boxxlan"):
        assert host in refusal(settings, host=host)
    assert refusal(GatewaySettings(hosts=("*",)), host="evil.example") == ""


def test_an_open_address_is_asked_by_any_name_unless_some_are_given() -> None:
    settings = GatewaySettings(host="0.0.0.0", without_key=True)
    assert refusal(settings, host="gpu.corp.example") == ""
    settings = GatewaySettings(host="0.0.0.0", without_key=True, hosts=("gpu.corp.example",))
    assert refusal(settings, host="gpu.corp.example") == ""
    assert "evil.example" in refusal(settings, host="evil.example")


# Origins

APPS = (
    *("app://obsidian.md", "vscode-webview://1f2e3d", "tauri://localhost", "null", "file://"),
    *("chrome-extension://abcdef", "https://chat.example:8443"),
)
PATTERNS = ("app://obsidian.md", "vscode-webview://*", "tauri://localhost", "null", "file://")
PATTERNS += ("chrome-extension://abcdef", "https://chat.example:*")


@pytest.mark.parametrize("origin", APPS)
def test_apps_and_pages_can_be_let_in(origin: str) -> None:
    why = refusal(GatewaySettings(), host="localhost", origin=origin)
    assert f"pages of {origin} may not ask the gateway; add it to origins in [gateway]" in why
    assert refusal(GatewaySettings(origins=PATTERNS), host="localhost", origin=origin) == ""
    assert refusal(GatewaySettings(origins=("*",)), host="localhost", origin=origin) == ""


def test_an_origin_like_an_allowed_one_is_another() -> None:
    settings = GatewaySettings(origins=PATTERNS)
    for origin in ("app://obsidian.md.evil", "https://xchat.example:1", "https://chat.example"):
        assert origin in refusal(settings, host="localhost", origin=origin)
    for origin in ("http://localhost.evil.example", "http://127.0.0.1.evil.example", "http://["):
        assert origin in refusal(GatewaySettings(), host="localhost", origin=origin)


@pytest.mark.parametrize("origin", ["", "my-client", "localhost:3000", "https://a.example/chat"])
def test_what_no_browser_sends_is_not_refused_as_a_page(origin: str) -> None:
    assert refusal(GatewaySettings(), "POST", host="localhost", origin=origin) == ""


@pytest.mark.parametrize("key", [False, True])
def test_an_app_that_is_let_in_gets_its_preflight_and_its_answers(here: Site, key: bool) -> None:
    (here.path / "key").write_text("right\n")
    here.upstream("chat")
    here.gateway(origins=PATTERNS, api_key_file=here.path / "key" if key else None)
    preflight = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
        "Access-Control-Request-Private-Network": "true",
    }
    bearer = {"Authorization": "Bearer right"}
    url = f"{here.url}/v1/chat/completions"
    for origin in (*APPS, "http://localhost:3000"):
        answer = httpx2.options(url, headers={"Origin": origin, **preflight})
        assert answer.status_code == 200 and answer.headers[ALLOW] == origin
        assert "x-stainless-os" in answer.headers["access-control-allow-headers"]
        assert answer.headers["access-control-allow-private-network"] == "true"
        body = {"model": "chat"}
        answer = httpx2.post(url, json=body, headers={"Origin": origin, **bearer})
        assert answer.status_code == 200 and answer.headers[ALLOW] == origin
        if key:  # a page reads why
            answer = httpx2.post(url, json=body, headers={"Origin": origin})
            assert answer.status_code == 401 and answer.headers[ALLOW] == origin
    answer = httpx2.options(url, headers={"Origin": "http://evil.example", **preflight})
    assert answer.status_code == 403 and ALLOW not in answer.headers
    assert "pages of http://evil.example may not ask" in answer.json()["error"]["message"]


# Requests that would stall it


def raw(here: Site, request: bytes, seconds: float = 30) -> bytes:
    """All that comes back until the connection is closed."""
    with socket.create_connection(("127.0.0.1", here.port), timeout=seconds) as connection:
        connection.sendall(request)
        answer = b""
        while block := connection.recv(65536):
            answer += block
    return answer


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"


def test_two_lengths_are_refused_and_end_the_connection(here: Site) -> None:
    here.upstream("chat")
    here.gateway()
    lengths = b"Content-Length: 17\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer = raw(here, HEAD + lengths + b'11\r\n{"model": "chat"}\r\n0\r\n\r\n' + HEAD)
    assert answer.startswith(b"HTTP/1.1 400 ") and answer.count(b"HTTP/1.1") == 1
    assert b"Content-Length and Transfer-Encoding" in answer
    assert b"connection: close" in answer.lower()
    assert not here.events("chat", "request")


def test_a_request_without_a_host_is_answered(here: Site) -> None:
    here.upstream("chat")
    here.gateway()
    assert raw(here, b"GET /v1/models HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200 ")


def test_a_whole_address_is_asked_for_by_its_path(here: Site) -> None:
    """As clients do that take the gateway for a proxy; the name in it is the one that counts."""
    here.upstream("chat")
    here.gateway()
    rest = b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}"
    path = b"/v1/chat/completions?a=%20"
    assert raw(here, b"POST http://127.0.0.1:9" + path + rest).startswith(b"HTTP/1.1 200 ")
    assert here.events("chat", "request")[0]["path"] == path.decode()
    assert b"the name evil.example" in raw(here, b"POST http://evil.example" + path + rest)


QUICK = """
import sys
from pipeline.serve.gateway import guard, request_body
guard.IDLE_SECONDS = request_body.IDLE_SECONDS = 1
from pipeline.serve.gateway.__main__ import main
sys.exit(main())
"""


def test_half_a_request_is_dropped(here: Site) -> None:
    here.upstream("chat")
    here.write()
    command = [sys.executable, "-c", QUICK, str(here.at.path), f'{{"port": {here.port}}}']
    here.start("gateway", command)
    wait_for(lambda: reached(f"{here.url}/health"))
    assert raw(here, b"POST /v1/chat/comp") == b""
    assert raw(here, b"") == b""
    answer = raw(here, HEAD + b'Content-Length: 100\r\n\r\n{"model": ')
    assert answer.startswith(b"HTTP/1.1 408 ") and b"did not come within 1 s" in answer
    body = b'{"model": "chat", "do": {"slow": 2}}'
    request = HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    assert raw(here, request).startswith(b"HTTP/1.1 200 "), "an answer has no limit"
    assert "Traceback" not in here.output()


@pytest.mark.parametrize("piece", [b"[", b"[],", b'{"a":', b'[""],'])
def test_a_large_document_stalls_nobody(here: Site, piece: bytes) -> None:
    here.upstream("chat")
    here.gateway()
    body = b'{"model": "chat", "a": [' + piece * ((MAX_BYTES - 100) // len(piece))
    longest = 0.0
    with ThreadPoolExecutor() as pool:
        sent = pool.submit(httpx2.post, f"{here.url}/v1/completions", content=body, timeout=120)
        while not sent.done():
            began = time.monotonic()
            assert here.get("/health").status_code == 200
            longest = max(longest, time.monotonic() - began)
            time.sleep(0.01)
    assert sent.result().status_code == 400
    assert longest < 5


def model(body: bytes) -> str | None:
    return parse_body("application/json", body).model


def test_the_model_is_found_in_any_document() -> None:
    values = ["x" * 300_000, '"\\[{' * 50_000, [["]", {"model": "inner"}]] * 1000, "\\", None, 1e9]
    for value in values:
        for model_first in (True, False):
            pairs = [("model", 'a"ü\\'), ("messages", value)]
            document = dict(pairs if model_first else pairs[::-1])
            for text in (json.dumps(document), json.dumps(document, ensure_ascii=False, indent=2)):
                parsed = parse_body("", text.encode())
                assert parsed.model == 'a"ü\\'
                assert parsed.renamed
                assert json.loads(parsed.renamed("b")) == {**document, "model": "b"}
    assert model(b'\xef\xbb\xbf {"x": "model", "model" : "a"} \n') == "a"
    assert model(b'{"model": "a", "model": "b"}') == "b"
    assert model(b'{"model": "a", "mod\\u0065l": "b"}') == "b", "as a server reads it"
    assert model(b'{"model": "a", "model": null}') is None


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b'{"model": "a"', "not valid JSON: Input data was truncated"),
        (b'{"model": "a', "not valid JSON: Input data was truncated"),
        (b'{"model": "a\\', "not valid JSON: Input data was truncated"),
        (b'{"model": "a"} {}', "trailing characters"),
        (b'{"model": "\\x"}', "not valid JSON: .*escape"),
        (b'{"model": "\xff"}', "not valid JSON: its text is not UTF-8"),
        (b'{"model": ["a"]}', "must be a string"),
    ],
)
def test_what_is_no_document_is_refused(body: bytes, text: str) -> None:
    with pytest.raises(Refused, match=text):
        model(body)


def test_a_form_of_many_parts_is_refused_soon() -> None:
    form = b"--B\r\n" + b"\r\n--B" * 1_000_000 + b"\r\n\r\n"
    with pytest.raises(Refused, match="more than 1,000 parts"):
        parse_body("multipart/form-data; boundary=B", form)


def test_an_upgrade_that_is_offered_keeps_its_body(here: Site) -> None:
    """uvicorn's other parser, httptools, loses it."""
    here.upstream("chat")
    here.gateway()
    upgrade = b"Connection: Upgrade, HTTP2-Settings, close\r\nUpgrade: h2c\r\n"
    upgrade += b"HTTP2-Settings: AAEAAEAA\r\n"
    body = b'{"model": "chat"}'
    request = HEAD + upgrade + b"Content-Length: %d\r\n\r\n" % len(body) + body
    assert raw(here, request).startswith(b"HTTP/1.1 200 ")
    assert here.events("chat", "request")[0]["body"].encode() == body
