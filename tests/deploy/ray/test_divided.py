"""A vLLM whose model is divided among nodes. What stands for vLLM takes its placement group and
starts its workers as vLLM does; the GPUs are only counted."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
import yaml
from conftest import REPOSITORY, wait_for, with_programs
from gateway_tools import NO_TLS
from ray_tools import config, server
from test_cluster import cluster_of, ray_python

from pipeline.deploy.ray import environment
from pipeline.deploy.ray.config import Resources

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray")]
__all__ = ["ray_python"]

FILE = """
[master]
python = "{python}"
[instance.big.control]
engine = "vllm"
probe_timeout = 0
[instance.big.server]
model = "org/big"
pipeline_parallel_size = 2
distributed_executor_backend = "ray"
"""


@pytest.fixture
def vllms_python(ray_python: Path, tmp_path: Path) -> Path:
    """vLLM's own environment, which has the cluster's version of Ray."""
    folder = tmp_path / "vLLM's ü"
    subprocess.run([ray_python, "-m", "venv", "--without-pip", folder], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (rays,) = ray_python.parent.parent.glob("lib/python*/site-packages")
    (packages / "ray.pth").write_text(f"{rays}\n")
    vllm = packages / "vllm" / "entrypoints" / "openai"
    vllm.mkdir(parents=True)
    stand_in = REPOSITORY / "tests" / "fakes" / "vllm_on_ray"
    shutil.copy(stand_in / "api_server.py", vllm)
    shutil.copy(stand_in / "engine.py", packages / "vllm")
    return folder / "bin" / "python"


@pytest.mark.build
def test_a_model_on_two_nodes(
    ray_python: Path,
    vllms_python: Path,
    built: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a cluster that wants a token."""
    environment.make_token(tmp_path / "token")
    for name, value in environment.with_token(tmp_path / "token").items():
        monkeypatch.setenv(name, value)
    homes = {name: with_programs(built, tmp_path / name).home for name in ("head", "a", "b")}
    (tmp_path / "big.toml").write_text(FILE.format(python=vllms_python), encoding="utf-8")
    doit = with_programs(built, tmp_path / "user")
    doit("ray", f"config={tmp_path / 'big.toml'}", f"out={tmp_path / 'out'}")
    (written, _) = yaml.safe_load((tmp_path / "out" / "serve.yaml").read_text())["applications"]
    big = server(
        "big",
        written["args"]["configuration"],
        resources=Resources(cpus=1, gpus=2, is_divided=True),
    )
    deployed = config([big], 0)["applications"][0]["deployments"][0]
    bundles = written["deployments"][0]["placement_group_bundles"]
    assert [x["GPU"] for x in bundles] == [x["GPU"] for x in deployed["placement_group_bundles"]]

    worker = {"CPU": 4.0, "GPU": 1.0}
    nodes = {"head": {"CPU": 2.0}, "a": worker, "b": worker}
    with cluster_of(nodes, ray_python, homes, None, tmp_path) as cluster:
        cluster.call("deploy", config=config([big], cluster.port))
        cluster.wait_until_running("big", 1)
        first = asked(cluster.url)
        places = first["workers"]
        assert {each["node"] for each in places} == {cluster.nodes[name].id for name in "ab"}
        assert all(each["gpus"] == 1 for each in places)
        assert {each["python"] for each in places} == {str(vllms_python)}

        psutil.Process(first["server"]).kill()
        wait_for(lambda: not alive(first), 30)
        cluster.wait_until_running("big", 1)
        second = asked(cluster.url)
        assert second["server"] != first["server"]

        cluster.call("deploy", config=config([], cluster.port))
        wait_for(lambda: not alive(second), 60)


def asked(url: str) -> Any:
    """Where the workers are."""
    body = {"model": "big", "messages": [{"role": "user", "content": "where?"}]}
    answer = httpx2.post(f"{url}/v1/chat/completions", json=body, timeout=90, verify=NO_TLS)
    assert answer.status_code == 200, answer.text
    return json.loads(answer.json()["choices"][0]["message"]["content"])


def alive(told: dict[str, Any]) -> list[int]:
    """Which of its processes are left."""
    pids = [told["server"], told["engine"], *(each["pid"] for each in told["workers"])]
    return [pid for pid in pids if psutil.pid_exists(pid)]
