"""The guard before the real llama-server."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from conftest import Doit, chat, get, wait_for

pytestmark = [
    pytest.mark.build,
    pytest.mark.skipif(os.name == "nt", reason="guards no ports"),
]
STREAM = {"prompt": "a", "n_predict": 100_000, "ignore_eos": True, "stream": True}


def asked(
    url: str, path: str, body: bytes | None = None, method: str = "", **headers: str
) -> tuple[int, str | None]:
    """The status of the answer, and whose pages may read it."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(url + path, body, named, method=method or None)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.headers["Access-Control-Allow-Origin"]
    except urllib.error.HTTPError as error:
        return error.code, error.headers["Access-Control-Allow-Origin"]


def metric(url: str, name: str) -> float:
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"llamacpp:{name} "))


def test_a_page_cannot_use_it_and_all_else_can(doit: Doit, gguf: Path) -> None:
    page = "https://chat.example"
    with doit.serving(f"gguf_path={gguf}", f"origins={page}", "hosts=*.lan") as url:
        assert doit.summary["guard"] == "pages of other sites cannot use the server"
        body = json.dumps({"prompt": "a", "n_predict": 1}).encode()
        evil = {"Origin": "https://evil.example", "Content_Type": "text/plain"}
        assert asked(url, "/completion", body, **evil) == (403, None)
        assert asked(url, "/slots", Host="evil.example") == (403, None)
        assert metric(url, "tokens_predicted_total") == 0

        assert asked(url, "/props", Host="gpu-box.lan")[0] == 200
        assert asked(url, "/completion", body, Origin=page) == (200, page)
        preflight = {"Origin": page, "Access_Control_Request_Method": "POST"}
        assert asked(url, "/completion", method="OPTIONS", **preflight) == (200, page)
        assert len(chat(url)) > 0

        # a client that leaves ends its request
        request = urllib.request.Request(f"{url}/completion", json.dumps(STREAM).encode())
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert answer.readline().startswith(b"data: ")
            assert metric(url, "requests_processing") == 1
        wait_for(lambda: metric(url, "requests_processing") == 0)


def test_without_the_guard_a_page_can_use_it(doit: Doit, gguf: Path) -> None:
    """Or the test above would show nothing."""
    with doit.serving(f"gguf_path={gguf}", "guard=0") as url:
        assert doit.summary["guard"] == "none (guard=0): any page in a browser can use the server"
        assert asked(url, "/slots", Host="evil.example")[0] == 200
        assert get(f"{url}/health") == {"status": "ok"}


def test_with_a_key_it_is_not_needed(doit: Doit, gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("right\n")
    with doit.serving(f"gguf_path={gguf}", f"api_key_file={tmp_path / 'key'}") as url:
        assert doit.summary["guard"] == "not needed: clients send a key"
        assert asked(url, "/slots")[0] == 401
