"""A cluster of three nodes, each a container of the project's own image on a private network, while
clients ask it all the time."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Doit, wait_for, with_programs
from container_tools import PORT, Containers
from engines import Docker
from ray_tools import Load, hub_folder, require_few_lost

from pipeline.deploy.ray import environment

# Of minutes, so only by name: a node that is cut off is given up after half a minute, and twice a
# model is fetched and loaded.
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

# A node has two processors: of each server it holds one replica beside one of the gateway's.
SERVERS = f"""[gateway]
enable = true
host = "0.0.0.0"
port = {PORT}
api_key = "none"
[instance.chat.control]
gpu_ids = "none"
replicas = 3
[instance.chat.model]
ref = "org/chat"
[instance.chat.server]
ctx_size = 2048
parallel = 2
threads = 1
"""


@pytest.fixture
def nodes(
    docker: Docker, ray_image: str, built: Path, gguf: Path, tmp_path: Path
) -> Iterator[Containers]:
    """The head and two other nodes, and a hub that they reach."""
    made = Containers(docker, ray_image, tmp_path)
    try:
        with made.hub_of(hub_folder(built, gguf, tmp_path)):
            for name in ("head", "a", "b"):
                made.start(name)
            yield made
    finally:
        made.logs(tmp_path / "logs")
        made.close()


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
    assert all(len(each) == 1 for each in nodes.replicas("chat").values())

    load = Load(nodes.url)
    steps: list[tuple[float, str]] = []

    def step(name: str) -> None:
        steps.append((time.monotonic(), name))

    def serves(name: str) -> bool:
        return bool(nodes.replicas("chat")[name] and nodes.processes(name, "llama-server"))

    with load.running({"chat": 3}, tokens=24):
        wait_for(lambda: load.outcomes)

        step("a server is killed")
        before = nodes.processes("a", "llama-server")
        nodes.kill("a", "llama-server")
        wait_for(lambda: set(nodes.processes("a", "llama-server")) - {*before}, 30)

        step("a node is cut off")
        cut = time.monotonic()
        nodes.cut("b")
        wait_for(lambda: "b" not in nodes.alive(), GIVEN_UP)
        wait_for(lambda: not nodes.processes("b", "llama-server"), ENDED)

        step("it is connected again")
        nodes.connect("b")
        wait_for(lambda: serves("b"), BACK)

        step("a container is killed")
        nodes.remove("a")
        wait_for(lambda: len(nodes.cluster.nodes()) == 2)

        step("a node is added")
        nodes.start("c")

        # It may not be needed before: the one that came back had room for two.
        step("another container is killed")
        nodes.remove("b")
        wait_for(lambda: serves("c"), BACK)

        step("the end")
        count = len(load.outcomes)
        wait_for(lambda: len(load.outcomes) > count + 8)

    require_few_lost(load.outcomes, steps)
    waited = [each.ended - each.began for each in load.outcomes if each.began < cut < each.ended]
    assert waited and max(waited) < 2 * GIVEN_UP
