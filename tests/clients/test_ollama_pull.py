"""Models that Ollama's own client has prepared: from a hub on this machine, by real steps."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import ollama
import psutil
import pytest
from conftest import Doit, free_port, wait_for
from fakes import hub

pytestmark = [pytest.mark.build, pytest.mark.slow]

REPO = "org/tiny"
HELLO = [{"role": "user", "content": "hello"}]
SLOW = {"repo": REPO, "path": "tiny.Q8_0.gguf", "kind": "slow", "bytes_per_second": 300_000}


class Site:
    """A hub, a home without any model, and a gateway that may fill it."""

    def __init__(self, doit: Doit, folder: Path, server: hub.Running) -> None:
        self.doit, self.folder, self.server = doit, folder, server
        self.url = f"http://127.0.0.1:{free_port()}"
        self.file = folder / "alle modelle.toml"
        doit.env |= {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(folder / "hf")}
        doit.env |= {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1,localhost"}

    def up(self, **gateway: Any) -> None:
        settings = {"enable": True, "port": int(self.url.rpartition(":")[2]), **gateway}
        lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items()]
        self.file.write_text(
            "\n".join(
                [
                    *('[master]\ninstances = "models"', "[gateway]", *lines),
                    *("[instance.server]", "ctx_size = 512", "parallel = 1"),
                ]
            ),
            encoding="utf-8",
        )
        self.doit("up", f"config={self.file}")


@pytest.fixture
def site(doit: Doit, gguf: Path, tmp_path: Path) -> Iterator[Site]:
    folder = tmp_path / "hub"
    (folder / REPO).mkdir(parents=True)
    (folder / REPO / "tiny.Q8_0.gguf").write_bytes(gguf.read_bytes())
    with hub.start(folder) as server:
        made = Site(doit, tmp_path, server)
        try:
            yield made
        finally:
            made.doit("down", f"config={made.file}", status=None)


def test_pull(site: Site) -> None:
    site.up(pull=True)
    with ollama.Client(site.url, timeout=120) as client:
        assert client.list().models == []
        steps = list(client.pull(REPO, stream=True))
        assert steps[0].status == "pulling manifest" and steps[-1].status == "success"
        loaded = [step for step in steps if step.total]
        assert loaded and loaded[-1].completed == loaded[-1].total
        assert {step.digest[:7] for step in loaded if step.digest} == {"sha256:"}
        (listed,) = client.list().models
        assert listed.model == "tiny" and f"sha256:{listed.digest}" == loaded[-1].digest
        for name in ("tiny", REPO, f"hf.co/{REPO}:Q8_0", f"{REPO}:latest"):
            answer = client.chat(name, HELLO, options={"num_predict": 2})
            assert answer.model == name and answer.eval_count == 2
        before = len(site.server.log())
        assert client.pull(REPO).status == "success"
        assert len(site.server.log()) == before, "it is here"
        with pytest.raises(ollama.ResponseError, match="nobody/nothing") as missing:
            client.pull("nobody/nothing")
        assert missing.value.status_code == 500
        with pytest.raises(ollama.ResponseError, match="nobody/nothing"):
            list(client.pull("nobody/nothing", stream=True))
        for path in (
            "../x",
            "/etc/passwd",
            str(site.file),
            "./org/tiny",
            "llama3",
            "x/y/z",
            "a b/c",
        ):
            with pytest.raises(ollama.ResponseError, match="cannot be pulled") as refused:
                client.pull(path)
            assert refused.value.status_code == 400, path


def test_a_pull_is_shared_and_goes_on_without_its_clients(site: Site) -> None:
    site.up(pull=True)
    site.server.control(faults=[SLOW])
    body = {"model": REPO}
    with httpx2.stream("POST", f"{site.url}/api/pull", json=body, timeout=60) as first:
        assert first.headers["content-type"] == "application/x-ndjson"
        next(line for line in first.iter_lines() if '"completed"' in line)
        with ThreadPoolExecutor() as pool, ollama.Client(site.url, timeout=120) as client:
            second = pool.submit(client.pull, REPO)
            time.sleep(0.5)
            first.close()
            site.server.control(reset=True)
            assert second.result().status == "success"
    assert len(list(site.doit.home.rglob("*.gguf"))) == 1
    log = next(site.doit.home.rglob("gateway.log"))
    assert log.read_text(encoding="utf-8").count("-m doit prepare") == 1
    wait_for(lambda: httpx2.get(f"{site.url}/v1/models").json()["data"])


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_a_gateway_that_is_stopped_ends_its_pulls(site: Site) -> None:
    site.up(pull=True)
    site.server.control(faults=[{**SLOW, "bytes_per_second": 2000}])
    rows = site.doit("ps", f"config={site.file}", "format=json").json()
    gateway = psutil.Process(next(row["pid"] for row in rows if row["name"] == "gateway"))
    with httpx2.stream("POST", f"{site.url}/api/pull", json={"model": REPO}, timeout=60):
        (child,) = wait_for(gateway.children)
        wait_for(lambda: site.server.log())
        gateway.terminate()
        psutil.wait_procs([gateway, child], timeout=30)
        assert not gateway.is_running() and not child.is_running()


def test_nobody_pulls_unless_it_is_allowed(site: Site, gguf: Path) -> None:
    (site.folder / "key").write_text("sesame\n")
    site.doit("prepare", f"model={REPO}")
    site.up(api_key_file=str(site.folder / "key"))
    with ollama.Client(site.url) as client, pytest.raises(ollama.ResponseError) as refused:
        client.pull("org/other")
    assert refused.value.status_code == 401
    headers = {"Authorization": "Bearer sesame"}
    with ollama.Client(site.url, headers=headers) as client:
        with pytest.raises(ollama.ResponseError, match="set pull = true") as refused:
            client.pull("org/other")
        assert refused.value.status_code == 403
