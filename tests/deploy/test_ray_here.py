"""Ray itself: its schema of what `ray` writes, and a Ray on this machine. It is installed into the
user's cache, once for all runs of the tests."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from cluster_tools import IMAGE
from conftest import Doit, free_port, get, wait_for
from test_ray import CHAT, DIVIDED, SECOND, Writer

from pipeline.core.errors import UsageError
from pipeline.core.paths import Home
from pipeline.deploy.ray import environment, local
from pipeline.deploy.ray.nodes import ClusterNode

SCHEMA = """
import sys, yaml
from ray.serve.schema import ServeDeploySchema
for text in sys.stdin.read().split("\\0"):
    print(len(ServeDeploySchema.model_validate(yaml.safe_load(text)).applications))
"""


@pytest.fixture
def write(bare: Doit, tmp_path: Path) -> Writer:
    return Writer(bare, tmp_path)


@pytest.fixture
def rays_python(tmp_path: Path) -> Path:
    made = environment.installed(Home(tmp_path / "home of ray"))
    made.make(why="once for all runs of the tests")
    return made.python


@pytest.mark.slow
def test_rays_own_schema_takes_what_is_written(write: Writer, rays_python: Path) -> None:
    text = CHAT + SECOND + 'api_key_file = "/etc/llama/key"\nmodels = { "gpt-*" = "chat" }\n'
    write(text + CHAT.replace("chat", "vision").replace('"none"', '"GPU-5f"') + DIVIDED, IMAGE)
    _, service = yaml.safe_load_all((write.out / "rayservice.yaml").read_text("utf-8"))
    texts = [(write.out / "serve.yaml").read_text("utf-8"), service["spec"]["serveConfigV2"]]
    done = subprocess.run(
        [rays_python, "-c", SCHEMA],
        input="\0".join(texts),
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["5", "5"]


# A Ray on this machine


def pids(folder: str) -> set[int]:
    """Processes of the Ray that keeps its sockets in this folder."""
    found = set()
    for process in psutil.process_iter():
        try:
            if any(folder in word for word in process.cmdline()):
                found.add(process.pid)
        except psutil.Error:
            continue
    return found


@pytest.fixture
def here(ready: Doit, gguf: Path, tmp_path: Path) -> Iterator[tuple[Writer, str, int]]:
    """Two servers of the tiny model, and the port of the gateway before them."""
    write, port = Writer(ready, tmp_path), free_port()
    server = f"[instance.NAME.control]\ngpu_ids = 'none'\n[instance.NAME.model]\nref = '{gguf}'\n"
    server += "[instance.NAME.server]\nthreads = 1\nctx_size = 256\nparallel = 1\n"
    gateway = f"[gateway]\nenable = true\nport = {port}\n"
    text = gateway + server.replace("NAME", "left")
    try:
        yield write, text + server.replace("NAME", "right").replace("threads = 1", ""), port
    finally:
        ready("down", f"config={write.file}", status=None)


@pytest.mark.build
@pytest.mark.long
def test_a_ray_on_this_machine(here: tuple[Writer, str, int]) -> None:
    """Started, asked, changed in one of two servers, and ended with all that it started."""
    write, text, port = here
    printed = write(text, "start=1")
    assert "starting Ray on this machine" in printed and "left: ready" in printed
    url = f"http://127.0.0.1:{port}"
    assert {model["id"] for model in get(f"{url}/v1/models")["data"]} == {"left", "right"}
    state = json.loads(next(write.doit.home.glob("run/instances/*/ray.json")).read_text())
    processes = pids(state["local"]["folder"])
    assert processes

    again = write(text, "start=1")
    assert "nothing to do" in again and "starting" not in again
    rows: list[dict[str, Any]] = json.loads(write.doit("ps", "format=json").out)
    states = {row["name"]: row["state"] for row in rows if "cluster" in row}
    assert states == {"left": "ready", "right": "ready", "gateway": "ready"}

    printed = write.doit("down", f"config={write.file}").err
    assert "ended Ray on this machine" in printed and "left" in printed
    wait_for(lambda: not any(map(psutil.pid_exists, processes)), 30)
    assert not Path(state["local"]["folder"]).exists()
    assert "nothing was up" in write.doit("down", f"config={write.file}").err


# Without Ray


def test_the_token_of_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "folder" / "token"
    named = {"RAY_AUTH_TOKEN_PATH": str(file)}
    assert environment.token(named) == ""
    assert environment.make_token(file) and not environment.make_token(file)
    made = environment.token(named)
    assert len(made) == 64 and (os.name == "nt" or file.stat().st_mode & 0o77 == 0)
    monkeypatch.setenv("LLAMA_PIPELINE_CWD", str(tmp_path))
    assert environment.token({"RAY_AUTH_TOKEN_PATH": "folder/token"}) == made, "the user's folder"
    assert environment.token({**named, "RAY_AUTH_TOKEN": "x"}) == "x"
    assert environment.token({**named, "RAY_AUTH_MODE": "disabled"}) == ""
    with pytest.raises(UsageError, match="no token"):
        environment.token({"RAY_AUTH_TOKEN_PATH": str(tmp_path)})


def test_the_users_own_times_of_a_node_that_is_cut_off(tmp_path: Path) -> None:
    name = "RAY_health_check_timeout_ms"
    assert environment.variables({}, Home(tmp_path))[name] == "3000"
    assert environment.variables({name: "9000"}, Home(tmp_path))[name] == "9000"


def test_the_words_of_a_node() -> None:
    node = ClusterNode(ip="10.0.0.2", resources={"CPU": 8, "GPU": 2, "memory": 1e9, "card:x": 1})
    words = local.join_words(node, "10.0.0.1:6379")
    assert {*words} >= {"--address=10.0.0.1:6379", "--num-cpus=8", "--num-gpus=2", "--block"}
    assert '--resources={"card:x": 1}' in words
    assert "--node-ip-address=10.0.0.2" in words
    head = local.head_words(node, 6379, 8265)
    assert {*head} >= {"--head", "--port=6379", "--dashboard-port=8265"}
    alone = ClusterNode(ip="", resources={"CPU": 1, "GPU": 0, "memory": 0})
    assert not any(word.startswith("--node-ip") for word in local.join_words(alone, "a:1"))


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("node=10.0.0.1",), "such as node=10.0.0.1:6379"),
        (("node=head", "config=a.toml"), "contradict each other"),
    ],
)
def test_a_node_that_cannot_be(bare: Doit, words: tuple[str, ...], error: str) -> None:
    assert error in bare("ray", *words, status=3).err


def test_a_node_needs_the_token_of_its_cluster(bare: Doit, tmp_path: Path) -> None:
    bare.env["RAY_AUTH_TOKEN_PATH"] = str(tmp_path / "none")
    bare.env.pop("RAY_AUTH_TOKEN", None)
    printed = bare("ray", "node=10.0.0.1:6379", status=3).err
    assert "copy it from the head" in printed
