"""The project's files are updated, as by `git pull`, while a gateway and a supervisor run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from conftest import REPOSITORY, free_port, wait_for
from supervisor_tools import SERVER

from pipeline.core.paths import Home
from pipeline.serve.server import DEMAND, Server
from pipeline.serve.supervisor import state
from pipeline.serve.supervisor.state import READY, DesiredState, Order

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A checkout of its own."""
    shutil.copytree(
        REPOSITORY / "pipeline",
        tmp_path / "checkout" / "pipeline",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    return tmp_path / "checkout"


def update(tree: Path) -> None:
    """Replace every module by one that fits none of those that are loaded."""
    for path in tree.rglob("*.py"):
        path.write_text(f"raise ImportError('{path.stem} is of another version')\n")


def status_of(url: str, body: bytes | None = None) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body), timeout=60) as answer:
            answer.read()
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_a_gateway_goes_on_as_it_was_started(tree: Path, tmp_path: Path) -> None:
    at, port = state.folder(Home(tmp_path), "c.toml"), free_port()
    at.path.mkdir(parents=True, mode=0o700)
    server = Server(name="a", executable="none", cmd=(), folder=str(tmp_path), log_file="")
    state.write_wanted(at, DesiredState(config="c.toml", instances=(server,)))
    words = [sys.executable, "-m", "pipeline.serve.gateway", str(at.path)]
    settings = json.dumps({"host": "127.0.0.1", "port": port, "pull": True})
    gateway = subprocess.Popen([*words, settings], cwd=tree)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(lambda: _answers(f"{url}/running"))
        update(tree)
        paths = ("/api/tags", "/api/ps", "/v1/models", "/metrics", "/dashboard")
        assert {path: status_of(url + path) for path in paths} == dict.fromkeys(paths, 200)
        body = b'{"model": "a"}'
        asked = {path: status_of(url + path, body) for path in ("/api/show", "/models/load")}
        assert 500 not in asked.values(), asked
    finally:
        gateway.terminate()
        gateway.wait(30)


def _answers(url: str) -> bool:
    try:
        return status_of(url) == 200
    except OSError:
        return False


def test_a_supervisor_goes_on_as_it_was_started(tree: Path, tmp_path: Path) -> None:
    at, port = state.folder(Home(tmp_path), "c.toml"), free_port()
    at.path.mkdir(parents=True, mode=0o700)
    server = Server(
        name="a",
        executable=sys.executable,
        cmd=(SERVER, "--host", "127.0.0.1", "--port", str(port)),
        folder=str(tmp_path),
        log_file=str(tmp_path / "a.log"),
        port=port,
        start=DEMAND,
        probe_timeout=0,
        guard=True,
    )
    wanted = DesiredState(config="c.toml", instances=(server,), needs={"a": {"ram": 1}})
    state.write_wanted(at, wanted)
    words = [sys.executable, "-m", "pipeline.serve.supervisor.supervisor", str(at.path), "{}"]
    supervisor = subprocess.Popen(words, cwd=tree)
    try:
        wait_for(lambda: state.read_state(at))
        update(tree)
        orders = {"a": Order(loads=True, number=1)}
        state.write_wanted(at, DesiredState(config="c.toml", instances=(server,), orders=orders))
        wait_for(lambda: state.statuses_of(state.read_state(at))["a"].state == READY, 30)
    finally:
        supervisor.terminate()
        supervisor.wait(30)
    assert "internal error" not in at.log.read_text()
