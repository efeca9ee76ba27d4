"""Claude Code, the npm package, in print mode against the gateway of a configuration."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
from client_tools import KEY
from conftest import Doit, free_port
from npm_clients import claude_code

pytestmark = [pytest.mark.build, pytest.mark.slow]
PRINT = ("-p", "hello", "--output-format", "json")
TOML = """\
[gateway]
enable = true
port = {gateway}
api_key_file = "gateway.key"

[gateway.models]
"claude-*" = "chat"

[instance.tiny.model]
ref = {ref}

[instance.tiny.server]
port = {port}
alias = "chat"
ctx_size = {ctx_size}
parallel = 1
threads = 1
logit_bias = "2+7"  # an end after some words: random weights seldom find one
"""


@dataclass
class Servers:
    doit: Doit
    file: Path
    port: int
    claude: Path  # the folder of the program

    def text(self, gguf: Path, ctx_size: int) -> None:
        text = TOML.format(
            gateway=self.port, ref=json.dumps(str(gguf)), port=free_port(), ctx_size=ctx_size
        )
        self.file.write_text(text, encoding="utf-8")

    def write(self, gguf: Path, ctx_size: int) -> None:
        self.text(gguf, ctx_size)
        self.doit("up", f"config={self.file}", timeout=120)

    def answered(self, status: int) -> int:
        """How many requests were answered so."""
        url = f"http://127.0.0.1:{self.port}/metrics"
        text = httpx2.get(url, headers={"Authorization": f"Bearer {KEY}"}).text
        line = rf'^llama_gateway_requests_total{{instance=".*",status="{status}"}} (\d+)$'
        return sum(map(int, re.findall(line, text, re.M)))


@pytest.fixture
def servers(doit: Doit, tmp_path: Path) -> Iterator[Servers]:
    (tmp_path / "gateway.key").write_text(f"# ours\n\n  {KEY}\n")
    home = tmp_path / "user's hôme"
    home.mkdir()
    claude = claude_code()
    kept = {n: v for n, v in doit.env.items() if not n.startswith(("ANTHROPIC_", "CLAUDE"))}
    doit.env = {
        **kept,
        "HOME": str(home),
        "LLAMA_PIPELINE_CWD": str(home),
        "PATH": f"{claude}{os.pathsep}{os.environ['PATH']}",
    }
    made = Servers(doit, tmp_path / "models ü.toml", free_port(), claude)
    yield made
    doit("down", f"config={made.file}", status=None)


def ended_well(out: str) -> str:
    """The end of an exchange, as it prints it: there was an answer."""
    told = json.loads(out)
    assert told["type"] == "result" and told["is_error"] is False, told
    assert told["usage"]["output_tokens"] > 0
    return str(told["result"])


def run(words: list[str], env: dict[str, str]) -> str:
    """What it prints, once it has ended well."""
    more: Any = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    done = subprocess.run(words, env=env, cwd=env["HOME"], timeout=300, **more)
    assert done.returncode == 0, done.stdout + done.stderr
    return str(done.stdout)


def test_the_whole_exchange(servers: Servers, gguf: Path) -> None:
    servers.write(gguf, 16_384)
    config = f"config={servers.file}"
    plain = servers.doit("claude", config, "format=json")
    told = plain.json()
    assert told["env"]["ANTHROPIC_BASE_URL"] == f"http://127.0.0.1:{servers.port}"
    assert told["env"]["ANTHROPIC_MODEL"] == told["env"]["ANTHROPIC_DEFAULT_HAIKU_MODEL"] == "chat"
    assert told["env"]["CLAUDE_CODE_MAX_CONTEXT_TOKENS"] == "16384"
    assert Path(told["key_file"]).read_text().split()[-1] == KEY
    assert "chat has a context of 16,384 tokens" in plain.err

    # what is printed, as a user would paste it
    shown = servers.doit("claude", config, "--", *PRINT)
    assert KEY not in plain.out + shown.out + plain.err + shown.err
    ended_well(run(["sh", "-c", shown.out], servers.doit.env))

    # started at once, in the user's folder
    started = servers.doit("claude", config, "start=1", "--", *PRINT)
    ended_well(started.out)
    assert KEY not in started.err and "claude -p hello" in started.err
    home = Path(servers.doit.env["HOME"])
    (session,) = home.rglob(f"{json.loads(started.out)['session_id']}.jsonl")
    assert json.dumps(str(home), ensure_ascii=False) in session.read_text("utf-8")

    # by Anthropic's own names, which a pattern leads to the model; telemetry is not turned off
    least = {"ANTHROPIC_BASE_URL": told["env"]["ANTHROPIC_BASE_URL"], "ANTHROPIC_AUTH_TOKEN": KEY}
    ended_well(
        run([str(next(servers.claude.glob("claude*"))), *PRINT], {**servers.doit.env, **least})
    )
    assert servers.answered(200) >= 3 and servers.answered(404) == servers.answered(401) == 0


def test_what_is_wrong_is_told(servers: Servers, gguf: Path) -> None:
    servers.text(gguf, 2048)
    config = f"config={servers.file}"
    nothing = servers.doit("claude", config, status=1)
    assert "nothing answers at" in nothing.err and "doit up" in nothing.err
    servers.doit("up", config, timeout=120)
    small = servers.doit("claude", config, "name=tiny")
    assert "ANTHROPIC_MODEL=tiny" in small.out
    assert "warning: tiny has a context of 2,048 tokens" in small.err
    assert "did you mean chat?" in servers.doit("claude", config, "name=chta", status=3).err
    both = servers.doit("claude", config, "start=1", "format=json", status=3)
    assert "contradict each other" in both.err
    servers.doit.env["PATH"] = os.defpath
    assert "npm install" in servers.doit("claude", config, "start=1", status=1).err


def test_a_single_server_too(servers: Servers, gguf: Path) -> None:
    with servers.doit.serving(f"model={gguf}", "alias=one", "server.logit_bias=2+7") as url:
        told = servers.doit("claude", f"url={url}/v1", "format=json").json()
        assert told["env"]["ANTHROPIC_BASE_URL"] == url and told["key_file"] is None
        assert told["env"]["ANTHROPIC_MODEL"] == "one"
        ended_well(servers.doit("claude", f"url={url}", "start=1", "--", *PRINT).out)
    assert "no servers given; pass config=…" in servers.doit("claude", status=3).err
