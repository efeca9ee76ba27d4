"""Restarts without end: nothing grows, whoever is killed, stopped or dies at once."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import wait_for
from figures import Figure
from msgspec.structs import replace
from supervisor_tools import Servers, lives, stand_in

from pipeline.commands import ps
from pipeline.commands.request import request
from pipeline.core.errors import PipelineError
from pipeline.serve.logfile import KEPT
from pipeline.serve.server import Server
from pipeline.serve.supervisor import control, launch, liveness, marker, status
from pipeline.serve.supervisor.state import PAUSING, READY

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="counts what Linux shows")

PROMISE = 10.0  # seconds, beyond the stop_timeout and the grace of `down`


def held(process: psutil.Process) -> tuple[int, int]:
    """The files and threads of a process."""
    return process.num_fds(), process.num_threads()


def files(top: Path) -> set[str]:
    """All files; of the logs that are kept there are no more than there should be."""
    logs = [path for path in top.glob("logs/a.*") if path.name != "a.log"]
    assert len(logs) <= KEPT
    found = (path for path in top.rglob("*") if path.is_file() and path not in logs)
    return {str(path.relative_to(top)) for path in found}


Count = tuple[set[str], int, tuple[int, int]]


def killed(servers: Servers, server: Server, times: int, top: Path) -> list[Count]:
    """Kill the supervisor so often; each time, what there is: files, and what is held."""
    counts: list[Count] = []
    for _ in range(times):
        assert servers.up(server) == {}
        supervisor = servers.supervisor()
        counts.append((files(top), psutil.Process().num_fds(), held(supervisor)))
        supervisor.kill()
        wait_for(lambda: not servers.processes())
    servers.down()
    servers.nothing_left()
    return counts


def require_same(counts: list[Count]) -> None:
    first, last = counts[1], counts[-1]
    assert last[0] == first[0]
    assert last[1] <= first[1], "of this process"
    assert last[2][0] <= first[2][0] + 2, "of the supervisor"


@pytest.mark.parametrize("times", [4, pytest.param(50, marks=pytest.mark.trust)])
def test_a_supervisor_killed_over_and_over(
    servers: Servers, tmp_path: Path, figure: Figure, times: int
) -> None:
    a = stand_in(tmp_path, "a", "--setsid", "--grandchild", str(tmp_path / "note"))
    require_same(killed(servers, a, times, tmp_path))
    figure("supervisors killed", times)


def test_what_grows_is_seen(servers: Servers, tmp_path: Path) -> None:
    """A server that leaves a file at each start."""
    a = stand_in(tmp_path, "a")
    leaves = f"touch left.$$; exec {shlex.join(a.command)}"
    with pytest.raises(AssertionError, match=r"left\."):
        require_same(
            killed(servers, replace(a, executable="/bin/sh", cmd=("-c", leaves)), 3, tmp_path)
        )


@pytest.mark.parametrize("times", [8, pytest.param(60, marks=pytest.mark.trust)])
@pytest.mark.parametrize("how", ["at once", "once it is ready"])
def test_a_server_that_dies_over_and_over(
    servers: Servers, tmp_path: Path, figure: Figure, how: str, times: int
) -> None:
    servers.timing = replace(servers.timing, longest_pause=0.02)
    after = ["--after", "0.3"] if how == "once it is ready" else []
    a = stand_in(tmp_path, "a", "--exit", "1", *after, max_restarts=10**6, restart_pause=0.01)
    b = stand_in(tmp_path, "b")
    servers.instances = (a, b)
    control._publish(servers.at, control.DesiredState(config="c", instances=(a, b)), ())
    process = launch.start(servers.at, servers.timing)
    wait_for(lambda: servers.state().get("a") and servers.state()["a"].restarts >= 4)
    supervisor = servers.supervisor()
    wait_for(lambda: servers.state()["b"].state == READY)
    before, most, pid = files(tmp_path), [0, 0], servers.pids()["b"]
    end = servers.state()["a"].restarts + times

    def is_over() -> bool:
        for number, count in enumerate(held(supervisor)):
            most[number] = max(most[number], count)
        return servers.state()["a"].restarts >= end

    wait_for(is_over)
    assert files(tmp_path) == before
    assert most[0] < 40 and most[1] < 20, most
    assert servers.pids()["b"] == pid and lives(pid or 0)
    servers.down()
    assert process.wait(timeout=60) == 0
    servers.nothing_left()
    figure("restarts of servers that die", times)


@pytest.mark.parametrize("times", [3, pytest.param(20, marks=pytest.mark.trust)])
def test_a_reaper_killed_over_and_over(servers: Servers, tmp_path: Path, times: int) -> None:
    servers.up(stand_in(tmp_path, "a"))
    supervisor = servers.supervisor()

    def reaper() -> psutil.Process | None:
        processes = marker.marked(servers.at).get(servers.at.marker, [])
        return next((each for each in processes if each.pid != supervisor.pid), None)

    counts = []
    for _ in range(times):
        killed = wait_for(reaper)
        killed.kill()
        wait_for(lambda killed=killed: reaper() not in (None, killed))
        counts.append(held(supervisor)[0])
    assert counts[-1] <= counts[0], counts
    assert servers.state()["a"].restarts == 0
    servers.down()
    servers.nothing_left()


# What is suspended (SIGSTOP): it neither works nor ends on SIGTERM.


@pytest.mark.parametrize(("engine", "what"), [("llama.cpp", "token"), ("gateway", "answer")])
def test_a_suspended_server_is_stuck(
    servers: Servers, tmp_path: Path, engine: str, what: str
) -> None:
    more = {"engine": engine, "probe_timeout": 0.5, "stop_timeout": 600.0}
    servers.up(stand_in(tmp_path, "a", "--metrics", **more))
    before = servers.pids()["a"] or 0
    time.sleep(1)
    assert servers.pids()["a"] == before, "one that answers is left alone"
    os.kill(before, signal.SIGSTOP)
    servers.until("a", PAUSING, READY, reason=f"stuck: no {what} within 0.5 s")
    seen = wait_for(lambda: (s := servers.state()["a"]).state == READY and s.restarts == 1 and s)
    assert seen.pid != before and not lives(before)


def test_a_suspended_supervisor(
    servers: Servers,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`ps` says so, no command waits for it without end, and `down` ends it all the same."""
    a = stand_in(tmp_path, "a", stop_timeout=1.0, start="demand")
    b = stand_in(tmp_path, "b", stop_timeout=1.0)
    servers.up(a, b)
    assert liveness.suspended(servers.at) is None
    supervisor = servers.supervisor()
    supervisor.suspend()
    wait_for(lambda: liveness.suspended(servers.at) == supervisor.pid)
    assert servers.rows()["b"].state == READY, "it answers all the same"
    ps.show(request({}), [servers.at])
    told = capsys.readouterr()
    assert f"the supervisor (pid {supervisor.pid}) is suspended" in told.err
    assert "not answering" not in told.out
    monkeypatch.setattr(launch, "REACTION_SECONDS", 0.5)
    for act in (lambda: control.obey(servers.at, ["a"], loads=True), lambda: servers.up(b)):
        with pytest.raises(PipelineError, match="does not react"):
            act()
    began = time.monotonic()
    assert sorted(servers.down()) == ["a", "b"]
    assert time.monotonic() - began < b.stop_timeout + control.GRACE_SECONDS + PROMISE
    assert not lives(supervisor.pid)
    servers.nothing_left()


def test_a_suspended_server_is_ended_by_down(servers: Servers, tmp_path: Path) -> None:
    a = stand_in(tmp_path, "a", stop_timeout=0.5)
    servers.up(a)
    pid = servers.pids()["a"] or 0
    os.kill(pid, signal.SIGSTOP)
    wait_for(lambda: servers.rows()["a"].state == status.SILENT, 5)
    began = time.monotonic()
    assert servers.down() == ["a"]
    assert time.monotonic() - began < 0.5 + PROMISE
    assert not lives(pid)
    servers.nothing_left()
