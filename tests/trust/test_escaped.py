"""What a server started and that has left its session, its parent and its environment behind, and
whose supervisor and reaper were both killed: it is found all the same, and ended."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, wait_for
from figures import Figure
from supervisor_tools import Servers, grandchild, lives, stand_in

from pipeline.core.process import Process, cgroup, start_detached
from pipeline.serve.server import Server
from pipeline.serve.supervisor import launch, marker, status
from pipeline.serve.supervisor.policy import Timing
from pipeline.serve.supervisor.state import READY, Folder

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="groups and files of Linux")

HAS_GROUPS = sys.platform == "linux" and cgroup.own() is not None
needs_groups = pytest.mark.skipif(not HAS_GROUPS, reason="no control groups can be made here")

# A supervisor on a system where no control group can be made.
NO_GROUPS = """
import sys
from pipeline.core.process import cgroup
cgroup.own = lambda: None
from pipeline.serve.supervisor import supervisor
supervisor.main()
"""
CLOSED = ["--closed"]  # it holds none of the files that it was started with


@pytest.fixture
def no_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(at: Folder, timing: Timing) -> Process:
        env = {**os.environ, marker.VARIABLE: at.marker}
        words = [sys.executable, "-c", NO_GROUPS, str(at.path), "{}"]
        return start_detached(words, log=at.log, env=env, cwd=REPOSITORY)

    monkeypatch.setattr(launch, "start", start)


def orphaned(servers: Servers, tmp_path: Path, *more: str) -> tuple[int, Server]:
    """The pid of one that escaped; its supervisor and its reaper were killed, the reaper first."""
    note = tmp_path / "escaped"
    note.unlink(missing_ok=True)
    a = stand_in(tmp_path, "a", "--escaped", str(note), *more)
    assert servers.up(a) == {}
    escaped, server = grandchild(note), servers.pids()["a"] or 0
    processes = marker.marked(servers.at)[servers.at.marker]
    assert len(processes) == 2
    for process in sorted(processes, key=lambda each: each.pid, reverse=True):
        process.kill()
    wait_for(lambda: not lives(server))
    assert lives(escaped)
    return escaped, a


def is_found(servers: Servers, tmp_path: Path, *more: str) -> None:
    """`ps` shows it; `down` ends it, and so does the next `up`."""
    escaped, a = orphaned(servers, tmp_path, *more)
    row = servers.rows()["a"]
    assert row.state == status.LOST and f"left {escaped} running" in row.reason
    assert row.memory and row.memory > 1_000_000
    assert servers.down() == ["a"]
    assert not lives(escaped)
    servers.nothing_left()

    escaped, a = orphaned(servers, tmp_path, *more)
    assert servers.up(a) == {}
    assert not lives(escaped)
    assert servers.rows()["a"].state == READY
    servers.down()
    servers.nothing_left()


@needs_groups
@pytest.mark.parametrize("more", [[], CLOSED], ids=["holds its files", "holds none"])
def test_found_by_its_group(
    servers: Servers, tmp_path: Path, figure: Figure, more: list[str]
) -> None:
    is_found(servers, tmp_path, *more)
    figure("processes that had escaped, ended", 2)
    top = cgroup.own()
    assert top and not list(top.glob(f"*{servers.at.marker}*")), "no group is left"


@pytest.mark.usefixtures("no_groups")
def test_found_by_the_file_that_it_was_started_with(
    servers: Servers, tmp_path: Path, figure: Figure
) -> None:
    is_found(servers, tmp_path)
    figure("processes that had escaped, ended", 2)


@pytest.mark.usefixtures("no_groups")
def test_with_neither_it_would_not_be_found(servers: Servers, tmp_path: Path) -> None:
    """What these tests look for can fail: this is what the documentation says stays."""
    escaped, _ = orphaned(servers, tmp_path, *CLOSED)
    try:
        assert "running" not in servers.rows()["a"].reason
        servers.down()
        assert lives(escaped)
    finally:
        os.kill(escaped, 9)


@pytest.mark.parametrize("end", ["crash", "down"])
def test_of_a_server_that_ended(servers: Servers, tmp_path: Path, end: str) -> None:
    """The supervisor lives: it ends what is left as soon as the server has ended."""
    note = tmp_path / "escaped"
    servers.up(stand_in(tmp_path, "a", "--escaped", str(note)))
    escaped = grandchild(note)
    if end == "down":
        servers.down()
    else:
        note.unlink()
        os.kill(servers.pids()["a"] or 0, 9)
        wait_for(lambda: servers.state()["a"].restarts == 1 and servers.state()["a"].state == READY)
        assert lives(grandchild(note))
    assert not lives(escaped)


def test_who_reads_the_file_is_not_taken_for_a_server(servers: Servers, tmp_path: Path) -> None:
    """Such as a backup of the home, or `cat`."""
    servers.up(stand_in(tmp_path, "a"))
    (path,) = servers.at.path.glob(f"*{servers.at.marker}/a")
    with path.open("rb"), path.open("ab"):
        assert [each.pid for each in servers.running()] == [servers.pids()["a"]]
