"""The examples of README.md and docs/clients.md, run as they stand."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from client_tools import chat, serve
from conftest import REPOSITORY, Doit, free_port, wait_for
from gateway_tools import Site, site, status
from npm_clients import installed

pytestmark = [pytest.mark.build, pytest.mark.slow]
CLIENTS = (REPOSITORY / "docs" / "clients.md").read_text(encoding="utf-8")
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def curls(text: str) -> list[str]:
    return [line for block in blocks(text, "sh") for line in block.splitlines() if "curl " in line]


def at(port: int, text: str, shown: int) -> str:
    """With a port of the test's own: another program may serve on the one that is shown."""
    assert f":{shown}" in text
    return text.replace(f":{shown}", f":{port}")


def output(words: list[str], **more: Path) -> str:
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, **more)
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def asked(line: str) -> None:
    """It answers with JSON, and not with an error."""
    if not shutil.which("curl"):
        pytest.skip("needs curl")
    told = json.loads(output(["sh", "-c", line]))
    assert told and "error" not in told, f"{line}\n{told}"


def test_the_lines_of_the_readme(doit: Doit) -> None:
    """`serve model=demo`, then curl in another terminal."""
    lines = curls(README)
    assert len(lines) > 1
    port = free_port()
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with doit.start("serve", "model=demo", f"port={port}", **quiet) as server:
        try:

            def ready() -> bool:
                assert server.poll() is None
                return status(f"http://127.0.0.1:{port}/health") == 200

            wait_for(ready, 300)
            for line in lines:
                asked(at(port, line, 8080))
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(timeout=30)


@pytest.fixture(scope="module")
def shown(
    built: Path, gguf: Path, demo: Doit, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    """What docs/clients.md asks: `chat` and `embed` behind one port, no key."""
    minilm = next((demo.home / "models").rglob("*.q8_0.gguf"))
    program = next(built.glob("*/llama-server*"))
    with site(tmp_path_factory.mktemp("shown")) as one:
        # Random weights end a call or an answer in JSON seldom: else each fills the context.
        chat(one, program, "chat", gguf, "--threads", "1", "--predict", "400")
        serve(one, program, "embed", minilm, "--embeddings", kind="embedding")
        one.gateway()
        yield one


@pytest.mark.parametrize("line", curls(CLIENTS))
def test_curl(shown: Site, line: str) -> None:
    asked(at(shown.port, line, 9000))


@pytest.mark.parametrize("text", blocks(CLIENTS, "python"), ids=["openai", "anthropic"])
def test_python(shown: Site, text: str) -> None:
    assert output([sys.executable, "-c", at(shown.port, text, 9000)])


def test_javascript_example(shown: Site) -> None:
    (text,) = blocks(CLIENTS, "js")
    program = installed() / "example.mjs"
    program.write_text(at(shown.port, text, 9000), encoding="utf-8")
    assert output([str(shutil.which("node")), str(program)])
