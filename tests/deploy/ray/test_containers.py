"""A cluster of three nodes, each a container of the project's own image on a private network, while
clients ask it all the time."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import psutil
import pytest
from conftest import Doit, wait_for, with_programs
from container_tools import PORT, Containers, containers
from engines import Docker
from gateway_tools import NO_TLS
from ray_tools import Load, hub_folder, require_few_lost, stream

from pipeline.core.store.hashing import sha256
from pipeline.deploy.ray import environment

# Of minutes, so only by name: a node that is cut off is given up after half a minute, and Ray's
# nodes are started five times.
pytestmark = [
    pytest.mark.build,
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.xdist_group("images"),
]

GIVEN_UP = 60.0  # seconds until the cluster has given up a node that is cut off: 30, and some more
ENDED = 150.0  # until that node has ended by itself: 80, and some more
# Until a node serves. On a busy machine Ray's own start may give up several times: its agent has to
# be there within 15 s.
BACK = 480.0

IDLE = 10  # seconds without a request until the server on demand goes
# A node has two processors, and a gateway's replica beside one server: the server on demand waits
# for a fourth node.
SERVERS = f"""[gateway]
enable = true
host = "0.0.0.0"
port = {PORT}
api_key = "none"
[instance.control]
gpu_ids = "none"
[instance.server]
parallel = 2
threads = 1
[instance.chat.control]
replicas = 2
[instance.chat.model]
ref = "org/chat"
[instance.chat.server]
ctx_size = 2048
[instance.small.model]
ref = "org/small"
[instance.small.server]
port = 8081
ctx_size = 512
[instance.idle.control]
replicas = "0-1"
idle_timeout = {IDLE}
[instance.idle.model]
ref = "org/small"
[instance.idle.server]
port = 8082
ctx_size = 512
"""


@pytest.fixture
def nodes(
    docker: Docker, ray_image: str, built: Path, gguf: Path, tmp_path: Path
) -> Iterator[Containers]:
    """The head and two other nodes, and a hub that they reach."""
    with containers(docker, ray_image, hub_folder(built, gguf, tmp_path), tmp_path) as made:
        for name in ("head", "a", "b"):
            made.start(name)
        yield made


@pytest.fixture
def deployer(nodes: Containers, built: Path, tmp_path: Path) -> Doit:
    """doit as it is run on a machine outside of the cluster."""
    doit = with_programs(built, tmp_path / "hôme")
    doit.env |= {"HF_ENDPOINT": nodes.hub, "RAY_AUTH_TOKEN": nodes.token}
    return doit


def test_the_image_of_a_node(docker: Docker, ray_image: str) -> None:
    run = ("run", "--rm", "--network=none")
    assert environment.version() in docker(*run, "--entrypoint=ray", ray_image, "--version")
    bill = docker(*run, "--entrypoint=cat", ray_image, "/opt/llama-pipeline/bom.json")
    assert {"ray", "msgspec", "llama.cpp"} <= {
        each["name"] for each in json.loads(bill)["components"]
    }
    assert docker.config(ray_image)["User"] == "10001:10001"


def test_a_cluster_of_containers_under_load(
    nodes: Containers, deployer: Doit, tmp_path: Path
) -> None:
    file = tmp_path / "servers.toml"
    file.write_text(SERVERS)
    deployer("prepare", f"config={file}")
    words = ("start=1", f"address={nodes.dashboard}", "gateway_replicas=3")
    deployer("ray", f"config={file}", *words)
    servers = ["chat", "chat", "small"]
    assert sorted(app for name in nodes.addresses for app in nodes.serves(name)) == servers

    load = Load(nodes.url)
    steps: list[tuple[float, str]] = []

    def step(name: str) -> None:
        steps.append((time.monotonic(), name))

    def has_chat(name: str) -> bool:
        return "chat" in nodes.serves(name) and bool(nodes.processes(name, "llama-server"))

    first = next(name for name in ("a", "b") if has_chat(name))
    with load.running({"chat": 3, "small": 1}, tokens=24):
        wait_for(lambda: len({each.model for each in load.outcomes}) == 2)

        step("a server is killed")
        before = nodes.processes(first, "llama-server")
        replica = dict(nodes.pids("chat"))[first]
        nodes.kill(first, "llama-server")
        wait_for(lambda: set(nodes.processes(first, "llama-server")) - {*before}, 30)
        assert (first, replica) in nodes.pids("chat")  # its supervisor started it again

        step("a replica is killed")
        before = nodes.processes(first, "llama-server")
        nodes.kill_within(first, replica)
        wait_for(lambda: not {*before} & {*nodes.processes(first, "llama-server")}, 10)
        wait_for(lambda: (first, replica) not in nodes.pids("chat"), 30)
        wait_for(lambda: has_chat(first), BACK)

        step("a raylet is killed")
        before = nodes.processes(first)
        nodes.kill(first, "raylet")
        wait_for(lambda: not any(map(psutil.pid_exists, before)), 60)
        wait_for(lambda: has_chat(first), BACK)

        step("a node is cut off")
        cut = time.monotonic()
        nodes.cut(first)
        wait_for(lambda: first not in nodes.alive(), GIVEN_UP)
        wait_for(lambda: not nodes.processes(first, "llama-server"), ENDED)

        step("it is connected again")
        nodes.connect(first)
        wait_for(lambda: has_chat(first), BACK)

        step("one server of three is changed")
        others = {app: nodes.pids(app) for app in ("chat", "gateway")}
        small = nodes.pids("small")
        file.write_text(SERVERS.replace("ctx_size = 512", "ctx_size = 1024", 1))
        deployer("ray", f"config={file}", *words)
        wait_for(lambda: (now := nodes.pids("small")) and not now & small, BACK)
        assert {app: nodes.pids(app) for app in others} == others

        step("a node is added")
        nodes.start("c")

        step("from no replica to one, and back")
        assert not nodes.pids("idle")
        with httpx2.Client(verify=NO_TLS, trust_env=False, timeout=BACK) as client:
            assert stream(client, nodes.url, "idle", "hello", 8)[0] == "done"
        assert len(nodes.pids("idle")) == 1
        wait_for(lambda: not nodes.pids("idle"), 12 * IDLE)

        step("a container is killed")
        nodes.remove(first)
        wait_for(lambda: nodes.serves("c"), BACK)  # nowhere else is room for what ran there
        wait_for(lambda: len(nodes.pids("chat")) == 2 and nodes.pids("small"), BACK)

        step("the end")
        count = len(load.outcomes)
        wait_for(lambda: len(load.outcomes) > count + 8)

    require_few_lost(load.outcomes, steps)
    waited = [each.ended - each.began for each in load.outcomes if each.began < cut < each.ended]
    assert waited and max(waited) < 2 * GIVEN_UP

    right = {f.name: sha256(f) for f in (tmp_path / "hub").rglob("*.gguf")}
    for name in nodes.addresses:
        models = nodes.models(name)
        assert models.items() <= right.items()
        assert "chat.gguf" in models or not has_chat(name)
    deployer("down", f"config={file}")
    wait_for(lambda: not any(nodes.processes(name, "llama-server") for name in nodes.addresses), 60)
