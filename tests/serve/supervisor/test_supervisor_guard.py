"""Guarded ports under the supervisor: they outlive a crash of their server, and nothing else."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from conftest import free_port, wait_for
from supervisor_tools import Servers, changed, stand_in

from pipeline.serve.supervisor.state import FAILED, PAUSING, READY, read_state

pytestmark = pytest.mark.skipif(os.name == "nt", reason="guards no ports")


def status(port: int, **headers: str) -> int:
    """What /health is answered with."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}/health", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_pages_of_other_sites_are_refused(servers: Servers, tmp_path: Path) -> None:
    guarded, own = (stand_in(tmp_path, name, guard=name == "a") for name in ("a", "b"))
    assert servers.up(guarded, own) == {}
    assert status(guarded.port) == 200
    assert status(guarded.port, Host="evil.example") == 403
    assert status(guarded.port, Origin="https://evil.example") == 403
    assert status(own.port, Host="evil.example") == 200
    assert servers.rows()["a"].state == READY
    state = read_state(servers.at)
    assert state
    sockets = {seen.name: seen.socket for seen in state.instances}
    assert Path(sockets["a"]).is_socket() and not sockets["b"]
    assert f"--port {guarded.port}" in Path(guarded.log_file).read_text()
    servers.down()
    servers.nothing_left()


def test_the_port_stays_while_the_server_is_started_again(servers: Servers, tmp_path: Path) -> None:
    note = tmp_path / "crash"
    a = stand_in(tmp_path, "a", "--exit", "1", "--after", "1.5", guard=True, restart_pause=1.5)
    assert servers.up(a) == {} and not note.exists()
    servers.until("a", PAUSING)
    assert status(a.port) == 503
    servers.until("a", READY)
    assert status(a.port) == 200
    assert servers.state()["a"].restarts == 1


def test_a_server_that_is_given_up_frees_its_port(servers: Servers, tmp_path: Path) -> None:
    port = free_port()
    bad = stand_in(tmp_path, "bad", "--exit", "1", port=port, guard=True, max_restarts=1)
    assert servers.up(bad)["bad"].state == FAILED
    good = stand_in(tmp_path, "good", port=port, guard=True)
    assert servers.up(good) == {}
    assert servers.up(changed(good, "--metrics")) == {}
    assert status(port) == 200


def test_a_killed_supervisor_leaves_no_port(servers: Servers, tmp_path: Path) -> None:
    a = stand_in(tmp_path, "a", guard=True)
    assert servers.up(a) == {}
    servers.kill_supervisor()
    wait_for(lambda: not servers.running())
    assert servers.up(a) == {}
    assert status(a.port) == 200
    servers.down()
    servers.nothing_left()


def test_a_port_of_another_configuration(servers: Servers, other: Servers, tmp_path: Path) -> None:
    a = stand_in(tmp_path, "a", guard=True)
    assert servers.up(a) == {}
    b = stand_in(tmp_path, "b", port=a.port, guard=True)
    reason = other.up(b)["b"].reason
    assert f"port {a.port} is taken by a of {servers.at.path}, which is up" in reason
    assert status(a.port) == 200
