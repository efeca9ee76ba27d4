"""up, down, ps and the supervisor's own life: killed, hung, asked twice, and told lies."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from conftest import REPOSITORY, wait_for
from disks import disk
from fleet_tools import Fleet, changed, fleet_at, grandchild, lives, stand_in

from pipeline.commands import ps
from pipeline.core.errors import PipelineError, UsageError
from pipeline.core.paths import Home
from pipeline.serve.server import Server
from pipeline.serve.supervisor import control, liveness, marker, state, status
from pipeline.serve.supervisor.state import FAILED, LOADING, READY, STOPPED, DesiredState

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")

CLIENT = """
import sys
from pathlib import Path
from pipeline.core.errors import PipelineError
from pipeline.serve.supervisor import control
from pipeline.serve.supervisor.state import Folder, read_wanted

def report(instance, seen):
    print(instance.name, seen.state, flush=True)

at = Folder(Path(sys.argv[2]))
wanted = read_wanted(Folder(Path(sys.argv[3])))
try:
    print("done", getattr(control, sys.argv[1])(at, wanted, report=report), flush=True)
except PipelineError as error:
    print("error", error, flush=True)
"""


@contextmanager
def client(fleet: Fleet, what: str, *instances: Server) -> Iterator[subprocess.Popen[str]]:
    """`up` or `run_foreground` in a process of its own, as a terminal would start it."""
    fleet.instances = instances
    asked = state.Folder(fleet.at.path / f"asked {what} {time.monotonic()}")
    state.write_wanted(asked, DesiredState(config="c.toml", instances=instances))
    with subprocess.Popen(
        [sys.executable, "-c", CLIENT, what, str(fleet.at.path), str(asked.path)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_a_killed_supervisor_leaves_no_server(fleet: Fleet, tmp_path: Path) -> None:
    note = tmp_path / "grandchild"
    a = stand_in(tmp_path, "a", "--ignore-term", "--grandchild", str(note), "--setsid")
    a = replace(a, stop_timeout=0.5)
    b = stand_in(tmp_path, "b", "--never-ready")
    with client(fleet, "up", a, b) as up:
        fleet.until("a", READY)
        fleet.until("b", LOADING)
        up.kill()
    elsewhere = grandchild(note)
    assert len(fleet.servers()) == 3
    fleet.supervisor().kill()
    wait_for(lambda: not fleet.processes(), 2)
    assert not lives(elsewhere)
    fleet.nothing_left()
    assert {name: row.state for name, row in fleet.rows().items()} == {
        "a": status.LOST,
        "b": status.LOST,
    }
    b = replace(b, cmd=b.cmd[:-1])
    assert fleet.up(a, b) == {}
    assert {row.state for row in fleet.rows().values()} == {READY}
    fleet.down()
    fleet.nothing_left()


def test_killed_with_its_warden(fleet: Fleet, tmp_path: Path) -> None:
    """Then nobody is left to end what moved elsewhere: the next one does, or `down`."""
    note = tmp_path / "grandchild"
    a = stand_in(tmp_path, "a", "--grandchild", str(note), "--setsid")
    for end in (lambda: fleet.up(a), fleet.down):
        fleet.up(a)
        server, elsewhere = fleet.pids()["a"] or 0, grandchild(note)
        keepers = marker.marked(fleet.at)[fleet.at.marker]
        assert len(keepers) == 2
        for process in sorted(keepers, key=lambda one: one.pid, reverse=True):
            process.kill()  # the warden first
        wait_for(lambda pid=server: not lives(pid))
        assert [one.pid for one in fleet.servers()] == [elsewhere]
        end()
        assert not lives(elsewhere)
    fleet.nothing_left()


def test_a_killed_warden_is_replaced(fleet: Fleet, tmp_path: Path) -> None:
    fleet.up(stand_in(tmp_path, "a"))

    def warden() -> psutil.Process | None:
        keepers = marker.marked(fleet.at).get(fleet.at.marker, [])
        return next((one for one in keepers if one.pid != fleet.supervisor().pid), None)

    first = wait_for(warden)
    first.kill()
    wait_for(lambda: (second := warden()) and second.pid != first.pid)


def test_a_warden_that_hangs(fleet: Fleet, tmp_path: Path) -> None:
    """The supervisor ends all the same, and the warden with it."""
    fleet.up(stand_in(tmp_path, "a"))
    supervisor = fleet.supervisor()
    for one in marker.marked(fleet.at)[fleet.at.marker]:
        if one.pid != supervisor.pid:
            one.suspend()
    supervisor.terminate()
    wait_for(lambda: not lives(supervisor.pid))
    fleet.nothing_left()


def test_what_a_crash_left_is_listed_until_it_is_ended(tmp_path: Path) -> None:
    home = Home(tmp_path)
    many: Any = SimpleNamespace(source=None)
    steps: Any = SimpleNamespace(request=SimpleNamespace(many=many), home=home)
    with fleet_at(state.folder(home, "c.toml").path) as fleet:
        fleet.up(stand_in(tmp_path, "a"))
        assert ps.folders(steps) == [fleet.at]
        fleet.kill_supervisor()
        wait_for(lambda: not fleet.processes())
        assert ps.folders(steps) == [fleet.at]
        assert fleet.rows()["a"].state == status.LOST
        fleet.down()
        assert ps.folders(steps) == []


def test_only_what_changed_is_restarted(fleet: Fleet, tmp_path: Path) -> None:
    a, b, c, d = (stand_in(tmp_path, name) for name in "abcd")
    first = DesiredState(config="c", instances=(a, b, c))
    assert control.changes(fleet.at, first) == [("a", "start"), ("b", "start"), ("c", "start")]
    fleet.up(a, b, c)
    assert control.changes(fleet.at, first) == [("a", "keep"), ("b", "keep"), ("c", "keep")]
    before = fleet.pids()
    b = changed(b, "--lines", "1")
    second = DesiredState(config="c", instances=(d, a, b))
    asked = fleet.at.wanted.read_text()
    assert control.changes(fleet.at, second) == [
        ("d", "start"),
        ("a", "keep"),
        ("b", "restart"),
        ("c", "stop"),
    ]
    assert fleet.at.wanted.read_text() == asked
    assert fleet.up(d, a, b) == {}
    after = fleet.pids()
    assert after["a"] == before["a"] and after["b"] != before["b"] and after["d"]
    assert fleet.state()["c"].state == STOPPED
    assert list(fleet.rows()) == ["d", "a", "b"]
    assert fleet.up(d, a, b) == {} and fleet.pids() == after
    assert fleet.up() == {}
    fleet.nothing_left()


def test_one_takes_the_port_of_another(fleet: Fleet, tmp_path: Path) -> None:
    """It waits for the other to be gone."""
    a = stand_in(tmp_path, "a", "--ignore-term", stop_timeout=0.5)
    fleet.up(a)
    b = replace(a, name="b", cmd=a.cmd[:-1], restart="never")
    assert fleet.up(b) == {}


def test_what_had_failed_is_tried_anew(fleet: Fleet, tmp_path: Path) -> None:
    a, b = stand_in(tmp_path, "a"), stand_in(tmp_path, "b", "--exit", "1", max_restarts=0)
    fleet.up(a, b)
    before = fleet.pids()
    wanted = DesiredState(config="c", instances=(a, b))
    assert control.changes(fleet.at, wanted) == [("a", "keep"), ("b", "start")]
    assert "exit status 1" in fleet.up(a, b)["b"].reason
    logs = list(Path(b.log_file).parent.glob("b*.log"))
    assert [log.read_text().count("+ ") for log in logs] == [1, 1], "each run has its own"
    assert fleet.pids() == before


def test_down_by_name(fleet: Fleet, tmp_path: Path) -> None:
    a, b = stand_in(tmp_path, "alpha"), stand_in(tmp_path, "beta", "--exit", "1", max_restarts=0)
    fleet.up(a, b)
    with pytest.raises(UsageError, match=r"name=alpa: .*did you mean alpha") as error:
        fleet.down("alpa", "x")
    assert "name=x" in error.value.message and "alpha, beta" in error.value.hint
    assert fleet.down("beta") == ["beta"]
    assert fleet.state()["beta"].state == STOPPED
    assert fleet.state()["alpha"].state == READY
    assert fleet.down("alpha") == ["alpha"]
    fleet.nothing_left()
    assert fleet.down() == []
    assert fleet.down("alpha") == ["alpha"], "it is stopped, as asked for"


def test_down_tells_what_ran(fleet: Fleet, tmp_path: Path) -> None:
    """After a stop by a signal, nothing did."""
    a, b = stand_in(tmp_path, "a"), stand_in(tmp_path, "b")
    fleet.up(a, b)
    fleet.supervisor().terminate()
    wait_for(lambda: not liveness.is_running(fleet.at))
    wanted = DesiredState(config="c", instances=(a, b))
    assert control.merged(fleet.at, wanted, ["b"]).instances == (b,), "a is not started again"
    assert fleet.down() == []


def test_one_beside_the_others(fleet: Fleet, tmp_path: Path) -> None:
    a, b, c = (stand_in(tmp_path, name) for name in "abc")
    whole = DesiredState(config="c", instances=(a, b, c))

    def up(name: str) -> None:
        control.up(fleet.at, whole, report=fleet.report, pace=fleet.pace, names=[name])

    both = [threading.Thread(target=up, args=[name]) for name in "bc"]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert {name: row.state for name, row in fleet.rows().items()} == {"b": READY, "c": READY}
    merged = control.merged(fleet.at, whole, ["a"])
    assert sorted(control.changes(fleet.at, merged)) == [
        ("a", "start"),
        ("b", "keep"),
        ("c", "keep"),
    ]


def test_down_while_loading(fleet: Fleet, tmp_path: Path) -> None:
    with client(
        fleet, "up", stand_in(tmp_path, "a", "--never-ready"), stand_in(tmp_path, "b")
    ) as up:
        fleet.until("a", LOADING)
        fleet.until("b", READY)
        fleet.down()
        assert up.wait(timeout=20) == 0
        assert up.stdout and "a stopped" in up.stdout.read()
    fleet.nothing_left()


def test_down_of_nothing(fleet: Fleet) -> None:
    assert fleet.down() == []
    with pytest.raises(UsageError, match="name=a: there is no such instance"):
        fleet.down("a")
    assert fleet.rows() == {}


def test_two_at_once(fleet: Fleet, tmp_path: Path) -> None:
    """The second says so and waits; then it has nothing to do."""
    a = stand_in(tmp_path, "a", "--ready-after", "1")
    with client(fleet, "up", a) as one:
        fleet.until("a", LOADING)
        with client(fleet, "up", a) as two:
            assert two.stderr and "another `up`" in two.stderr.readline()
            assert two.poll() is None
            assert one.wait(timeout=30) == 0
            assert two.wait(timeout=30) == 0
            assert two.stdout and two.stdout.read() == "a ready\ndone []\n"
    assert Path(a.log_file).read_text().count("+ ") == 1


def test_up_and_down_over_and_over(fleet: Fleet, tmp_path: Path) -> None:
    """Whenever the old supervisor is about to end."""
    a = stand_in(tmp_path, "a")
    for _ in range(3):
        assert fleet.up(a) == {}
        down = threading.Thread(target=fleet.down)
        down.start()
        time.sleep(0.1)
        failed = fleet.up(a)
        assert not failed or failed["a"].state == STOPPED  # `down` may have been the later one
        down.join()
    fleet.down()
    fleet.nothing_left()


def test_an_interrupted_up_leaves_them_running(fleet: Fleet, tmp_path: Path) -> None:
    with client(fleet, "up", stand_in(tmp_path, "a", "--ready-after", "1.5")) as up:
        fleet.until("a", LOADING)
        os.killpg(up.pid, signal.SIGINT)
        up.wait(timeout=20)
        assert up.stderr and "`doit down` stops it" in up.stderr.read()
    fleet.until("a", READY)


def test_a_supervisor_killed_under_up_is_replaced(fleet: Fleet, tmp_path: Path) -> None:
    with client(fleet, "up", stand_in(tmp_path, "a", "--ready-after", "1.5")) as up:
        fleet.until("a", LOADING)
        fleet.kill_supervisor()
        assert up.wait(timeout=30) == 0
    assert fleet.rows()["a"].state == READY


def test_a_supervisor_that_is_asked_to_end(fleet: Fleet, tmp_path: Path) -> None:
    fleet.up(stand_in(tmp_path, "a"), stand_in(tmp_path, "b", "--exit", "1", max_restarts=0))
    fleet.supervisor().terminate()
    wait_for(lambda: not liveness.is_running(fleet.at))
    fleet.nothing_left()
    assert {row.state for row in fleet.rows().values()} == {STOPPED}


def test_asked_twice_it_kills(fleet: Fleet, tmp_path: Path) -> None:
    fleet.up(stand_in(tmp_path, "a", "--ignore-term", stop_timeout=60.0))
    supervisor = fleet.supervisor()
    supervisor.terminate()
    fleet.until("a", state.STOPPING)
    supervisor.terminate()
    wait_for(lambda: not liveness.is_running(fleet.at), 10)
    fleet.nothing_left()


def test_a_supervisor_that_hangs(
    fleet: Fleet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = stand_in(tmp_path, "a", stop_timeout=0.5), stand_in(tmp_path, "b", stop_timeout=0.5)
    fleet.up(a, b)
    fleet.supervisor().suspend()
    assert control.down(fleet.at, grace=0.5) == ["a", "b"]
    assert "did not stop them" in capsys.readouterr().err
    fleet.nothing_left()
    fleet.up(a, b)
    fleet.supervisor().suspend()
    assert control.down(fleet.at, ["a"], grace=0.5) == ["a"]
    wait_for(lambda: {name: row.state for name, row in fleet.rows().items()} == {"b": READY})


def test_up_does_not_wait_for_one_that_hangs(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "TAKEN_SECONDS", 1.0)
    a = stand_in(tmp_path, "a")
    fleet.up(a)
    fleet.supervisor().suspend()
    with pytest.raises(PipelineError, match="does not take it up"):
        fleet.up(changed(a, "--metrics"))


def test_fields_of_a_newer_version(fleet: Fleet, tmp_path: Path) -> None:
    fleet.up(stand_in(tmp_path, "a"))
    for path, read in ((fleet.at.wanted, state.read_wanted), (fleet.at.state, state.read_state)):
        before, told = read(fleet.at), json.loads(path.read_text())
        told |= {"newer": 1, "instances": [one | {"newer": 2} for one in told["instances"]]}
        path.write_text(json.dumps(told))
        assert before and read(fleet.at) == before


def test_a_supervisor_is_known_by_its_lock(fleet: Fleet, tmp_path: Path) -> None:
    """In the foreground it carries no marker, and a clock that was set moves its start time."""
    with client(fleet, "run_foreground", stand_in(tmp_path, "a")) as process:
        fleet.until("a", READY)
        told = state.read_state(fleet.at)
        assert told
        assert liveness.has_open(process.pid, fleet.at.lock)
        assert not liveness.has_open(os.getpid(), fleet.at.lock)
        fleet.down()
        assert process.wait(timeout=20) == 0
    assert not liveness.has_open(process.pid, fleet.at.lock)


def test_the_folder_of_another_user(fleet: Fleet, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder away")
    fleet.at.path.mkdir(parents=True)
    os.chown(fleet.at.path, 1, 1)
    with pytest.raises(PipelineError, match="belongs to "):
        fleet.up(stand_in(tmp_path, "a"))


def test_a_server_without_the_marker(fleet: Fleet, tmp_path: Path) -> None:
    """Such as one with rights that hide its environment: its number and its start are known."""
    fleet.up(stand_in(tmp_path, "a"))
    fleet.kill_supervisor()
    wait_for(lambda: not fleet.processes())
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as server:
        old = state.read_state(fleet.at)
        assert old
        seen = replace(old.instances[0], pid=server.pid, started=marker.start_time(server.pid))
        state.write_state(fleet.at, replace(old, instances=(seen,)))
        assert liveness.is_left(fleet.at)
        fleet.down()
        assert server.wait(timeout=10) == -signal.SIGKILL
    assert not liveness.is_left(fleet.at)


def test_a_step_that_goes_wrong(fleet: Fleet, tmp_path: Path) -> None:
    """Without a file to open, nothing is restarted; the others go on, and it then is."""
    if sys.platform != "linux":
        pytest.skip("limits of another process")
    a, b = stand_in(tmp_path, "a"), stand_in(tmp_path, "b")
    fleet.up(a, b)
    supervisor, before = fleet.supervisor(), fleet.pids()
    most = supervisor.rlimit(psutil.RLIMIT_NOFILE)
    assert most[0] == most[1], "as many as it may have"
    supervisor.rlimit(psutil.RLIMIT_NOFILE, (3, most[1]))
    os.kill(before["a"] or 0, signal.SIGKILL)
    time.sleep(1)
    assert lives(supervisor.pid) and lives(before["b"] or 0)
    supervisor.rlimit(psutil.RLIMIT_NOFILE, most)
    fleet.up(a, b)
    assert fleet.pids()["b"] == before["b"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}', "\0" * 100])
def test_damaged_files(fleet: Fleet, tmp_path: Path, text: str) -> None:
    a = stand_in(tmp_path, "a")
    fleet.up(a)
    pid = fleet.pids()["a"]
    fleet.at.wanted.write_text(text)
    wait_for(lambda: "missing or damaged" in fleet.log())
    fleet.at.state.write_text(text)
    assert fleet.rows() == {}
    assert lives(pid or 0), "what runs is kept"
    assert fleet.up(a) == {}
    assert fleet.pids()["a"] == pid
    fleet.at.state.write_text(text)
    fleet.at.wanted.write_text(text)
    wait_for(lambda: fleet.state())
    with pytest.raises(PipelineError, match=r"wanted\.json"):
        fleet.down("a")
    fleet.down()
    fleet.nothing_left()


def test_a_state_that_cannot_be_written(fleet: Fleet, tmp_path: Path) -> None:
    """The servers go on, and it is written as soon as it can be."""
    a = stand_in(tmp_path, "a")
    fleet.up(a)
    pid = fleet.pids()["a"] or 0
    fleet.at.state.unlink()
    fleet.at.state.mkdir()
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: "tried again" in fleet.log())
    wait_for(lambda: fleet.servers() and pid not in [one.pid for one in fleet.servers()])
    fleet.at.state.rmdir()
    assert fleet.until("a", READY).restarts == 1


def fill(stuff: Path) -> None:
    with suppress(OSError), stuff.open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 512)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB."""
    with disk(tmp_path / "disk", "size=256k"):
        yield tmp_path / "disk"


def test_a_full_disk(small: Path, tmp_path: Path) -> None:
    """The servers go on, and are restarted; the state is written once that can be done."""
    with fleet_at(small / "run") as fleet:
        a = replace(stand_in(tmp_path, "a"), log_file=str(small / "a.log"), max_restarts=9)
        fleet.up(a)
        pid, stuff = fleet.pids()["a"] or 0, small / "stuff"
        fill(stuff)
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: [one.pid for one in fleet.servers()] not in ([], [pid]))
        assert fleet.pids()["a"] == pid, "that is what was written last"
        assert fleet.rows()["a"].state in (status.LOST, READY)
        with pytest.raises(PipelineError, match="the disk is full"):
            fleet.up(a)
        stuff.unlink()
        wait_for(lambda: fleet.pids()["a"] not in (pid, None))
        fleet.until("a", READY)
        fill(stuff)
        assert fleet.down() == ["a"]
        fleet.nothing_left()


def test_a_disk_that_became_read_only(small: Path, tmp_path: Path) -> None:
    """As after an error of the disk: the servers go on, and can be stopped."""
    with fleet_at(small / "run") as fleet:
        a = replace(stand_in(tmp_path, "a"), log_file=str(small / "a.log"))
        fleet.up(a)
        pid = fleet.pids()["a"] or 0

        # Files that are open for writing forbid it for the one mount, not for a view of it.
        subprocess.run(["mount", "--bind", small, small], check=True)
        try:
            subprocess.run(["mount", "-o", "remount,bind,ro", small], check=True)
            with pytest.raises(PipelineError, match="ead-only"):
                fleet.up(changed(a, "--metrics"))
            assert fleet.rows()["a"].state == READY
            assert fleet.pids()["a"] == pid
            assert fleet.down() == ["a"]
            fleet.nothing_left()
        finally:
            subprocess.run(["umount", small], check=False)


def test_numbers_that_are_used_again(fleet: Fleet, tmp_path: Path) -> None:
    """A state that names processes of somebody else: they are not shown, and never signalled."""
    a = stand_in(tmp_path, "a")
    fleet.up(a)
    fleet.kill_supervisor()
    wait_for(lambda: not fleet.processes())
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as stranger:
        try:
            old = state.read_state(fleet.at)
            assert old is not None
            long_ago = old.started - 60
            seen = replace(old.instances[0], pid=stranger.pid, started=long_ago)
            lie = replace(old, pid=stranger.pid, started=long_ago, instances=(seen,))
            state.write_state(fleet.at, lie)
            row = fleet.rows()["a"]
            assert (row.state, row.pid, row.memory) == (status.LOST, None, None)
            fleet.down()
            assert stranger.poll() is None
            assert fleet.up(a) == {}
            assert stranger.poll() is None
        finally:
            stranger.kill()


def test_ps_sees_who_does_not_answer(fleet: Fleet, tmp_path: Path) -> None:
    a, b = stand_in(tmp_path, "a"), stand_in(tmp_path, "b")
    fleet.up(a, b)
    process = psutil.Process(fleet.pids()["a"] or 0)
    process.suspend()
    began = time.monotonic()
    rows = fleet.rows()
    assert time.monotonic() - began < 10
    assert (rows["a"].state, rows["a"].ready_since) == (status.SILENT, None)
    assert rows["b"].state == READY
    process.resume()
    assert fleet.rows()["a"].state == READY


def test_ps_shows_the_memory_on_cards(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for nvidia-smi, as it answers for a server on two cards and for a stranger."""
    fleet.up(stand_in(tmp_path, "a"), stand_in(tmp_path, "b"))
    pid = fleet.pids()["a"]
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    told = f"{pid}, 1024\n{pid}, 512\n1, 7\n{fleet.pids()['b']}, [N/A]\n"
    program.write_text(f'#!/bin/sh\n[ "$1" = {status.QUERY} ] && printf {told!r}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    rows = fleet.rows()
    assert rows["a"].gpu_memory == 1536 * 1024 * 1024
    assert rows["b"].gpu_memory is None


def test_other_configurations_are_left_alone(fleet: Fleet, other: Fleet, tmp_path: Path) -> None:
    a, b = stand_in(tmp_path, "a"), stand_in(tmp_path, "b")
    fleet.up(a)
    other.up(b)
    before = [one.pid for one in other.processes()]
    fleet.kill_supervisor()
    wait_for(lambda: not fleet.processes())
    fleet.up(a)
    fleet.down()
    assert [one.pid for one in other.processes()] == before
    assert other.rows()["b"].state == READY


def test_a_folder_that_was_removed(fleet: Fleet, tmp_path: Path) -> None:
    """What runs is stopped: no `down` could name it. An `up` that is quicker takes over."""
    a = stand_in(tmp_path, "a")
    fleet.up(a)
    supervisor = fleet.supervisor()
    shutil.rmtree(fleet.at.path)
    wait_for(lambda: not lives(supervisor.pid))
    fleet.nothing_left()
    fleet.up(a)
    shutil.rmtree(fleet.at.path)
    assert fleet.up(a) == {}
    assert len(fleet.servers()) == 1
    fleet.down()
    fleet.nothing_left()


def test_a_supervisor_that_cannot_begin(fleet: Fleet, tmp_path: Path) -> None:
    fleet.at.path.mkdir(parents=True)
    fleet.at.lock.mkdir()
    with pytest.raises(PipelineError):
        fleet.up(stand_in(tmp_path, "a"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_in_the_foreground(fleet: Fleet, tmp_path: Path, number: int) -> None:
    a, b = stand_in(tmp_path, "a"), stand_in(tmp_path, "b", "--exit", "1", max_restarts=0)
    with client(fleet, "run_foreground", a, b) as process:
        wait_for(lambda: fleet.state().get("a") and fleet.state()["a"].state == READY)
        fleet.until("b", FAILED)
        assert fleet.supervisor().pid == process.pid
        assert fleet.rows()["a"].state == READY
        with client(fleet, "run_foreground", a) as second:
            assert "already up" in line(second)
        process.send_signal(number)
        assert process.wait(timeout=20) == 0
        assert process.stdout and "done" in process.stdout.read()
    fleet.nothing_left()


def test_the_foreground_killed_or_taken_down(fleet: Fleet, tmp_path: Path) -> None:
    note = tmp_path / "grandchild"
    a = stand_in(tmp_path, "a", "--setsid", "--grandchild", str(note))
    for end in ("kill", "down"):
        with client(fleet, "run_foreground", a) as process:
            fleet.until("a", READY)
            if end == "kill":
                process.kill()
            else:
                fleet.down()
            process.wait(timeout=20)
            wait_for(lambda: not fleet.processes(), 2)
        fleet.nothing_left()
        fleet.at.state.unlink()


def test_the_state_is_what_the_contract_says(fleet: Fleet, tmp_path: Path) -> None:
    fleet.up(stand_in(tmp_path, "a"))
    told = json.loads(fleet.at.state.read_text())
    assert set(told) == {"pid", "started", "asked", "instances"}
    assert told["instances"] == [asdict(fleet.state()["a"])]
    fleet.up(*fleet.instances)
    assert json.loads(fleet.at.state.read_text())["asked"] > told["asked"]


@pytest.mark.slow
def test_fifty(fleet: Fleet, tmp_path: Path) -> None:
    """All at once; figures are in benchmarks/fleet.py, here is only a wide bound."""
    many = [stand_in(tmp_path, f"s{n:02}", "--metrics", probe_timeout=10.0) for n in range(50)]
    failed = fleet.up(*many)
    assert not failed, [seen.reason for seen in failed.values()]
    rows = fleet.rows()
    assert len(rows) == 50 and {row.state for row in rows.values()} == {READY}
    supervisor = fleet.supervisor()
    held = sum(
        one.memory_info().rss
        for one in (supervisor, *marker.marked(fleet.at)[fleet.at.marker])
        if one.pid != supervisor.pid or one is supervisor
    )
    assert held < 60_000_000
    fleet.down()
    fleet.nothing_left()
