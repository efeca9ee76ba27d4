"""A cluster of three nodes with real servers, while clients ask it all the time: everything on it
is killed, removed, added or changed."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
from conftest import REPOSITORY, wait_for, with_programs
from fakes import hub as hubs
from gateway_tools import NO_TLS
from msgspec.structs import replace
from ray_tools import (
    Cluster,
    Load,
    config,
    hub_folder,
    left,
    llama_servers,
    require_few_lost,
    server,
    stream,
)

from pipeline.core.paths import Home
from pipeline.core.store.hashing import sha256
from pipeline.deploy.ray import environment
from pipeline.deploy.ray.config import ClusterServer, Resources

pytestmark = [pytest.mark.build, pytest.mark.slow, pytest.mark.xdist_group("ray")]

CHAT = """[instance.chat.model]
ref = "org/chat"
[instance.chat.server]
ctx_size = 2048
parallel = 2
threads = 1
"""
SMALL = """[instance.{name}.model]
ref = "org/small"
[instance.{name}.server]
ctx_size = {ctx_size}
parallel = 2
threads = 1
"""


@pytest.fixture
def hub(built: Path, gguf: Path, tmp_path: Path) -> Iterator[hubs.Running]:
    """A hub with a real model and a tiny one."""
    with hubs.start(hub_folder(built, gguf, tmp_path)) as running:
        yield running


@pytest.fixture
def homes(built: Path, tmp_path: Path, hub: hubs.Running) -> dict[str, Path]:
    """The homes of the nodes, with programs and no model."""
    names = ("head", "a", "b", "c")
    return {name: with_programs(built, tmp_path / f"nöde {name}").home for name in names}


@pytest.fixture(scope="session")
def ray_python() -> Path:
    """Ray's environment, shared by all checkouts; its Python."""
    made = environment.installed(Home(REPOSITORY))
    made.make(why="tests of a cluster need it")
    return made.python


@contextmanager
def cluster_of(
    nodes: Mapping[str, Mapping[str, float]],
    ray_python: Path,
    homes: Mapping[str, Path],
    hub: hubs.Running | None,
    tmp_path: Path,
) -> Iterator[Cluster]:
    """A cluster of nodes with these resources."""
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # short: Ray's sockets lie below it
    made = Cluster(ray_python, folder, {"HF_ENDPOINT": hub.endpoint} if hub else {})
    try:
        for name, resources in nodes.items():
            made.add(name, homes[name], **resources)
        made.call("start", port=made.port)
        yield made
    finally:
        made.close()
        for logs in folder.glob("ray/session_2*/logs"):
            shutil.copytree(logs, tmp_path / "logs", ignore_dangling_symlinks=True)
        shutil.rmtree(folder, ignore_errors=True)
    assert wait_for(lambda: not any(map(left, homes.values())), 20)


@pytest.fixture
def cluster(
    ray_python: Path, homes: dict[str, Path], hub: hubs.Running, tmp_path: Path
) -> Iterator[Cluster]:
    """Three nodes: the head, which runs no server, and two others."""
    worker = {"CPU": 4.0, "worker": 100.0}
    nodes = {"head": {"CPU": 2.0}, "a": worker, "b": worker}
    with cluster_of(nodes, ray_python, homes, hub, tmp_path) as made:
        yield made


def locked(built: Path, hub: hubs.Running, folder: Path, *texts: str) -> str:
    """The pipeline.lock of the models in files of instances."""
    doit = with_programs(built, folder / "locking")
    doit.env |= {"HF_ENDPOINT": hub.endpoint, "LLAMA_PIPELINE_CWD": str(folder)}
    for text in texts:
        (folder / "one.toml").write_text(text)
        doit("lock", f"config={folder / 'one.toml'}")
    return (folder / "pipeline.lock").read_text()


WORKER = Resources(cpus=1, custom={"worker": 1})


def served(lock: str) -> list[ClusterServer]:
    """Two replicas of a model that talks slowly enough to be interrupted, a small one, and one that
    is there on demand."""
    small = partial(SMALL.format, ctx_size=512)
    return [
        server("chat", CHAT, lock, replicas=(2, 2), resources=WORKER),
        server("small", small(name="small"), lock, resources=WORKER),
        server("idle", small(name="idle"), lock, replicas=(0, 1), resources=WORKER),
    ]


def nodes_shown(cluster: Cluster, name: str) -> list[str]:
    """The addresses that the gateway's dashboard shows for a server."""
    data = httpx2.get(f"{cluster.url}/dashboard/data", timeout=60, verify=NO_TLS).json()
    return next(each["nodes"] for each in data["instances"] if each["name"] == name)


def test_a_chat_on_a_cluster_of_one_node(
    ray_python: Path, built: Path, gguf: Path, tmp_path: Path
) -> None:
    """A model from the hub, served by a replica and streamed through the gateway; a changed file
    leaves the server alone that did not change, and one with no replica is loaded by hand."""
    (tmp_path / "hub" / "org" / "small").mkdir(parents=True)
    os.link(gguf, tmp_path / "hub" / "org" / "small" / "small.gguf")
    homes = {"head": with_programs(built, tmp_path / "nöde").home}
    small = SMALL.format(name="small", ctx_size=512)
    with (
        hubs.start(tmp_path / "hub") as hub,
        cluster_of(
            {"head": {"CPU": 4.0, "worker": 9.0}}, ray_python, homes, hub, tmp_path
        ) as cluster,
        httpx2.Client(timeout=60, verify=NO_TLS) as client,
    ):
        lock = locked(built, hub, tmp_path, small)
        servers = [server("small", small, lock, resources=WORKER)]
        cluster.call("deploy", config=config(servers, cluster.port))
        (replica,) = cluster.wait_until_running("small", 1)
        assert stream(client, cluster.url, "small", "hello", 8)[0] == "done"
        text = SMALL.format(name="other", ctx_size=512)
        other = server("other", text, lock, resources=WORKER, replicas=(0, 1))
        cluster.call("deploy", config=config([*servers, other], cluster.port))
        load, named = f"{cluster.url}/models/load", {"model": "other"}
        assert wait_for(lambda: client.post(load, json=named).status_code == 200)
        cluster.wait_until_running("other", 1)
        refused = client.post(f"{cluster.url}/models/unload", json=named)
        assert refused.status_code == 400 and "without requests" in refused.text
        assert wait_for(lambda: stream(client, cluster.url, "other", "hello", 8)[0] == "done")
        assert pids(cluster.replicas("small")) == {replica["pid"]}


@pytest.mark.trust
def test_a_cluster_under_load(
    cluster: Cluster, homes: dict[str, Path], built: Path, hub: hubs.Running, tmp_path: Path
) -> None:
    small = SMALL.format(name="small", ctx_size=512)
    servers = served(locked(built, hub, tmp_path, CHAT, small))
    hub.control(clear_log=True)
    cluster.call("deploy", config=config(servers, cluster.port))
    cluster.wait_until_running("chat", 2)
    cluster.wait_until_running("small", 1)
    first = cluster.replicas("chat")
    assert {replica["node"] for replica in first} == {cluster.nodes[name].id for name in "ab"}
    require_models(homes, hub, tmp_path / "hub")
    assert wait_for(lambda: nodes_shown(cluster, "chat")) == [each["host"] for each in first]

    load = Load(cluster.url)
    steps: list[tuple[float, str]] = []

    def step(name: str) -> None:
        steps.append((time.monotonic(), name))

    with load.running({"chat": 3, "small": 1}, tokens=24):
        wait_for(lambda: len({each.model for each in load.outcomes}) == 2)

        step("a server is killed")
        (victim,) = llama_servers(first[0]["pid"])
        victim.kill()
        again = wait_for(
            lambda: [each for each in llama_servers(first[0]["pid"]) if each != victim], 30
        )
        assert pids(cluster.replicas("chat")) == pids(first)  # its supervisor started it again

        step("a replica is killed")
        psutil.Process(first[0]["pid"]).kill()
        wait_for(lambda: not again[0].is_running(), 10)
        wait_for(lambda: first[0]["pid"] not in pids(cluster.replicas("chat")), 30)
        second = cluster.wait_until_running("chat", 2)

        step("a node is added, and one is removed")
        cluster.add("c", homes["c"], CPU=4, worker=100)
        gone = cluster.node_of(second[0])
        cluster.call("remove", name=gone.name)
        del cluster.nodes[gone.name]
        wait_for(lambda: not left(gone.home), 20)
        wait_for(lambda: second[0]["pid"] not in pids(cluster.replicas("chat")), 60)
        third = cluster.wait_until_running("chat", 2)
        cluster.wait_until_running("small", 1)

        step("one server of three is changed")
        before = {name: pids(cluster.replicas(name)) for name in ("chat", "small", "gateway")}
        text = SMALL.format(name="small", ctx_size=1024)
        servers[1] = replace(servers[1], text=text)
        cluster.call("deploy", config=config(servers, cluster.port))
        wait_for(lambda: pids(cluster.replicas("small")).isdisjoint(before["small"]), 90)
        cluster.wait_until_running("small", 1)
        assert pids(cluster.replicas("chat")) == before["chat"]
        assert pids(cluster.replicas("gateway")) == before["gateway"]

        step("from no replica to one, and back")
        assert cluster.replicas("idle") == []
        with httpx2.Client(verify=NO_TLS, trust_env=False, timeout=90) as client:
            assert stream(client, cluster.url, "idle", "hello", 8)[0] == "done"
        wait_for(lambda: cluster.replicas("idle") == [], 60)

        step("a raylet is killed")
        lost = cluster.node_of(third[0])
        cluster.call("kill_raylet", name=lost.name)
        wait_for(lambda: not llama_servers(lost.home), 30)
        cluster.call("forget", name=lost.name)
        del cluster.nodes[lost.name]
        wait_for(lambda: not left(lost.home), 20)
        wait_for(lambda: third[0]["pid"] not in pids(cluster.replicas("chat")), 60)
        cluster.add("d", homes["head"].parent / lost.home.name, CPU=4, worker=100)
        cluster.wait_until_running("chat", 2)
        cluster.wait_until_running("small", 1)
        step("the end")
        count = len(load.outcomes)
        wait_for(lambda: len(load.outcomes) > count + 8)

    require_few_lost(load.outcomes, steps)


def pids(replicas: list[dict[str, Any]]) -> set[int]:
    return {replica["pid"] for replica in replicas}


def require_models(homes: dict[str, Path], hub: hubs.Running, root: Path) -> None:
    """Each node has the right bytes, and the hub sent each file once."""
    wanted = {file.name: file for file in root.rglob("*.gguf")}
    for name in "ab":
        files = [*(homes[name] / "models").rglob("*.gguf")]
        assert "chat.gguf" in {file.name for file in files}
        assert all(sha256(file) == sha256(wanted[file.name]) for file in files)
    gets = [entry for entry in hub.log() if entry["method"] == "GET" and entry["server"] == "cdn"]
    ranges = [entry["range"] for entry in gets if entry["path"].endswith("/chat.gguf")]
    assert ranges
    assert len(set(ranges)) == len(ranges)  # no piece was sent twice
