"""What Claude Code is started with: decided and written without any server."""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from pipeline.core.errors import PipelineError, UsageError
from pipeline.deploy.claude import (
    DROPPED,
    FAMILIES,
    base_of,
    chat_models,
    choose,
    context_of,
    environment,
    powershell,
    shell,
    too_small,
)

NAMES = ["chat", "small"]


def test_which_model() -> None:
    everything = dict.fromkeys(("", *FAMILIES), "chat")
    assert choose(NAMES, {}, "") == everything
    assert choose(NAMES, {"claude-haiku-*": "small"}, "") == {**everything, "haiku": "small"}
    patterns = {"gpt-*": "chat", "claude-*": "small"}
    assert set(choose(NAMES, patterns, "").values()) == {"small"}
    assert choose(NAMES, patterns, "chat") == everything, "what is asked for wins"
    with pytest.raises(UsageError, match="did you mean small"):
        choose(NAMES, {}, "smal")


@contextmanager
def answering(text: str) -> Iterator[str]:
    """The address of a server that answers every question with this text."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_the_models_that_a_server_lists() -> None:
    listed = '{"data": [{"id": "a"}, {"id": "b", "kind": "embedding"}, {"id": "c", "x": 1}]}'
    with answering(listed) as url:
        assert chat_models(url, "", "") == ["a", "c"]
        assert context_of(url, "", "a") is None
    with answering('{"default_generation_settings": {"n_ctx": 4096}, "x": 1}') as url:
        assert context_of(url, "", "a") == 4096


@pytest.mark.parametrize(
    "text", ["[]", "no", '{"data": null}', '{"data": [3]}', '{"default_generation_settings": null}']
)
def test_a_server_that_answers_something_else(text: str) -> None:
    with answering(text) as url:
        with pytest.raises(PipelineError, match=f"^{url}/v1/models: unexpected answer"):
            chat_models(url, "", "")
        assert context_of(url, "", "a") is None


@pytest.mark.parametrize(
    ("given", "base"),
    [
        ("localhost:8080", "http://localhost:8080"),
        (" HTTPS://[::1]:1/llm/v1/ ", "HTTPS://[::1]:1/llm"),
        ("gpu-box.lan", "http://gpu-box.lan"),
    ],
)
def test_the_address_of_a_server(given: str, base: str) -> None:
    assert base_of(given) == base


@pytest.mark.parametrize(
    "wrong",
    ["ftp://a", "a:99999", "a:0", "a:x", "http://", "http://:80", "a:1:2", "[::1", "a b", "/v1"],
)
def test_what_is_no_address(wrong: str) -> None:
    with pytest.raises(UsageError, match="is not an address of a server"):
        base_of(wrong)


def test_limits_fit_the_context() -> None:
    models = choose(NAMES, {}, "")
    env = environment("http://h:1", models, 40_000, {})
    assert env["CLAUDE_CODE_MAX_CONTEXT_TOKENS"] == "40000"
    assert env["CLAUDE_CODE_MAX_OUTPUT_TOKENS"] == "10000"
    assert "CLAUDE_CODE_MAX_CONTEXT_TOKENS" not in environment("http://h:1", models, None, {})
    mine = environment("http://h:1", models, 40_000, {"API_TIMEOUT_MS": "5", "OTHER": "x"})
    assert mine["API_TIMEOUT_MS"] == "5" and "OTHER" not in mine
    assert environment("http://h:1", models, None, {"NO_PROXY": "a"})["NO_PROXY"] == "a,h"
    assert mine["no_proxy"] == "h", "the key is for nobody else"
    assert too_small("chat", 16_384) and not too_small("chat", 32_768)
    assert not too_small("chat", None)


@pytest.mark.skipif(shutil.which("sh") is None, reason="needs a POSIX shell")
def test_the_lines_work_in_a_shell(tmp_path: Path) -> None:
    key_file = tmp_path / "it's a ü" / "gateway key"
    key_file.parent.mkdir()
    key_file.write_bytes(b"# one\r\n\r\n  secret key\t\r\nother\r\n")
    claude = tmp_path / "claude"
    claude.write_text('#!/bin/sh\nenv\nfor word in "$@"; do echo "word=$word"; done\n')
    claude.chmod(0o755)
    words = ["-p", "it's $HOME"]
    text = shell({"ANTHROPIC_BASE_URL": "http://h:1"}, str(key_file), words)
    assert "secret" not in text
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "ANTHROPIC_API_KEY": "of somebody else"}
    done = subprocess.run(["sh", "-c", text], env=env, capture_output=True, text=True, check=True)
    told = done.stdout.splitlines()
    assert "ANTHROPIC_AUTH_TOKEN=secret key" in told
    assert "ANTHROPIC_BASE_URL=http://h:1" in told
    assert told[-2:] == ["word=-p", "word=it's $HOME"]
    assert not any(line.startswith("ANTHROPIC_API_KEY=") for line in told)
    assert "export ANTHROPIC_AUTH_TOKEN=none" in shell({}, None, [])


def test_the_lines_for_powershell() -> None:
    text = powershell({"ANTHROPIC_MODEL": "it's"}, r"C:\a b\key", ["-p", "hello"])
    assert "$env:ANTHROPIC_MODEL = 'it''s'" in text
    assert r"Get-Content 'C:\a b\key'" in text
    assert text.endswith("claude '-p' 'hello'")
    assert all(f"Env:{name}" in text for name in DROPPED)
