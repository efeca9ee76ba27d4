"""LiteLLM's proxy itself, in an environment of its own, with the configuration written for it."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from client_tools import KEY
from conftest import REPOSITORY, Doit, free_port, wait_for
from filelock import FileLock
from gateway_tools import reached

from pipeline.core.paths import Home, cache

pytestmark = [pytest.mark.build, pytest.mark.slow]
WANTED = "litellm[proxy]==1.106.2"
INSTALL = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check", WANTED)
TOML = """\
[gateway]
port = {gateway}
{key}

[gateway.models]
"claude-*" = "chat"

[instance.tiny.model]
ref = '{ref}'

[instance.tiny.server]
port = {port}
alias = "chat"
ctx_size = 2048
threads = 1
api_key = "of-the-instance"
"""


@pytest.fixture(scope="module")
def programs() -> Path:
    """The folder of the program `litellm`: 740 MB, installed once for all checkouts."""
    name = hashlib.sha256(f"{WANTED} {sys.version}".encode()).hexdigest()[:16]
    folder = cache(Home(REPOSITORY)) / "litellm" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    bin_folder = folder / ("Scripts" if os.name == "nt" else "bin")
    with FileLock(f"{folder}.lock"):
        if not (folder / "done").exists():
            subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
            words = [str(bin_folder / "python"), *INSTALL]
            done = subprocess.run(words, capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"LiteLLM could not be installed: {done.stderr.strip()[-300:]}")
            (folder / "done").touch()
    return bin_folder


KEYS = {"given": 'api_key_file = "gateway.key"', "made": "", "none": 'api_key = "none"'}


@pytest.fixture(
    params=["given", *(pytest.param(name, marks=pytest.mark.long) for name in ("made", "none"))]
)
def proxy(
    request: pytest.FixtureRequest, doit: Doit, gguf: Path, programs: Path, tmp_path: Path
) -> Iterator[tuple[str, str]]:
    """`doit gateway engine=litellm`, which is ready; its address and key."""
    key = KEYS[request.param]
    (tmp_path / "gateway.key").write_text(f"{KEY}\n")
    port, file = free_port(), tmp_path / "models ü.toml"
    text = TOML.format(gateway=port, key=key, port=free_port(), ref=gguf)
    file.write_text(text, encoding="utf-8")
    doit("up", f"config={file}", timeout=120)
    doit.env["PATH"] = f"{programs}{os.pathsep}{os.environ['PATH']}"
    doit.env["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks the network for prices
    log = tmp_path / "litellm.log"
    with (
        log.open("w") as out,
        doit.start("gateway", f"config={file}", "engine=litellm", stdout=out, stderr=out) as ours,
    ):
        url = f"http://127.0.0.1:{port}"
        try:
            wait_for(lambda: ours.poll() is not None or reached(f"{url}/health/liveliness"), 300)
            assert ours.poll() is None, log.read_text()
            made = [path.read_text().strip() for path in doit.home.rglob("keys/gateway.key")]
            assert len(made) == (request.param == "made")
            yield url, made[0] if made else KEY
        finally:
            os.killpg(ours.pid, signal.SIGINT)  # as a terminal does it
            ours.wait(timeout=60)
            doit("down", f"config={file}", status=None)


def test_requests_come_back(request: pytest.FixtureRequest, proxy: tuple[str, str]) -> None:
    import openai

    url, key = proxy
    with openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as client:
        assert {"tiny", "chat"} <= {one.id for one in client.models.list()}
        for model in ("tiny", "chat", "claude-sonnet-4-5"):
            answer = client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": "hello there"}], max_tokens=8
            )
            assert answer.usage and answer.usage.completion_tokens == 8, model
    if "none" in request.node.name:
        return
    with (
        openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as other,
        pytest.raises(openai.APIStatusError),
    ):
        other.models.list()
