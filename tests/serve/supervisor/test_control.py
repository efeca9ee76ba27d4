"""up, down, ps and the supervisor's own life: killed, hung, asked twice, and told lies."""

from __future__ import annotations

import errno
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
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from conftest import REPOSITORY, wait_for
from disks import disk
from disks import locks_that_do_not_work as locks_that_do_not_work
from msgspec.structs import asdict, replace
from supervisor_tools import Servers, changed, grandchild, lives, servers_at, stand_in

from pipeline.bins.hardware import nvidia
from pipeline.commands import ps
from pipeline.core.errors import PipelineError, UsageError
from pipeline.core.paths import Home
from pipeline.serve.server import Server
from pipeline.serve.supervisor import control, launch, liveness, marker, state, status
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
def client(servers: Servers, what: str, *instances: Server) -> Iterator[subprocess.Popen[str]]:
    """`up` or `run_foreground` in a process of its own, as a terminal would start it."""
    servers.instances = instances
    asked = state.Folder(servers.at.path / f"asked {what} {time.monotonic()}")
    state.write_wanted(asked, DesiredState(config="c.toml", instances=instances))
    with subprocess.Popen(
        [sys.executable, "-c", CLIENT, what, str(servers.at.path), str(asked.path)],
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


def test_a_killed_supervisor_leaves_no_server(servers: Servers, tmp_path: Path) -> None:
    note = tmp_path / "grandchild"
    a = stand_in(tmp_path, "a", "--ignore-term", "--grandchild", str(note), "--setsid")
    a = replace(a, stop_timeout=0.5)
    b = stand_in(tmp_path, "b", "--never-ready")
    with client(servers, "up", a, b) as up:
        servers.until("a", READY)
        servers.until("b", LOADING)
        up.kill()
    elsewhere = grandchild(note)
    assert len(servers.running()) == 3
    servers.supervisor().kill()
    wait_for(lambda: not servers.processes())
    assert not lives(elsewhere)
    servers.nothing_left()
    assert {name: row.state for name, row in servers.rows().items()} == {
        "a": status.LOST,
        "b": status.LOST,
    }
    b = replace(b, cmd=b.cmd[:-1])
    assert servers.up(a, b) == {}
    assert {row.state for row in servers.rows().values()} == {READY}
    servers.down()
    servers.nothing_left()


def test_killed_with_its_reaper(servers: Servers, tmp_path: Path) -> None:
    """Then nobody is left to end what moved elsewhere: the next one does, or `down`."""
    note = tmp_path / "grandchild"
    a = stand_in(tmp_path, "a", "--grandchild", str(note), "--setsid")
    for end in (lambda: servers.up(a), servers.down):
        servers.up(a)
        server, elsewhere = servers.pids()["a"] or 0, grandchild(note)
        processes = marker.marked(servers.at)[servers.at.marker]
        assert len(processes) == 2
        for process in sorted(processes, key=lambda one: one.pid, reverse=True):
            process.kill()  # the reaper first
        wait_for(lambda pid=server: not lives(pid))
        assert [one.pid for one in servers.running()] == [elsewhere]
        end()
        assert not lives(elsewhere)
    servers.nothing_left()


def test_a_killed_reaper_is_replaced(servers: Servers, tmp_path: Path) -> None:
    servers.up(stand_in(tmp_path, "a"))

    def reaper() -> psutil.Process | None:
        processes = marker.marked(servers.at).get(servers.at.marker, [])
        return next((one for one in processes if one.pid != servers.supervisor().pid), None)

    first = wait_for(reaper)
    first.kill()
    wait_for(lambda: (second := reaper()) and second.pid != first.pid)


def test_a_reaper_that_hangs(servers: Servers, tmp_path: Path) -> None:
    """The supervisor ends all the same, and the reaper with it."""
    servers.up(stand_in(tmp_path, "a"))
    supervisor = servers.supervisor()
    for one in marker.marked(servers.at)[servers.at.marker]:
        if one.pid != supervisor.pid:
            one.suspend()
    supervisor.terminate()
    wait_for(lambda: not lives(supervisor.pid))
    servers.nothing_left()


def test_what_a_crash_left_is_listed_until_it_is_ended(tmp_path: Path) -> None:
    home = Home(tmp_path)
    servers: Any = SimpleNamespace(source=None)
    steps: Any = SimpleNamespace(request=SimpleNamespace(servers=servers), home=home)
    with servers_at(state.folder(home, "c.toml").path) as servers:
        servers.up(stand_in(tmp_path, "a"))
        assert ps.folders(steps) == [servers.at]
        servers.kill_supervisor()
        wait_for(lambda: not servers.processes())
        assert ps.folders(steps) == [servers.at]
        assert servers.rows()["a"].state == status.LOST
        servers.down()
        assert ps.folders(steps) == []


def test_only_what_changed_is_restarted(servers: Servers, tmp_path: Path) -> None:
    a, b, c, d = (stand_in(tmp_path, name) for name in "abcd")
    first = DesiredState(config="c", instances=(a, b, c))
    assert control.changes(servers.at, first) == [("a", "start"), ("b", "start"), ("c", "start")]
    servers.up(a, b, c)
    assert control.changes(servers.at, first) == [("a", "keep"), ("b", "keep"), ("c", "keep")]
    before = servers.pids()
    b = changed(b, "--lines", "1")
    second = DesiredState(config="c", instances=(d, a, b))
    asked = servers.at.wanted.read_text()
    assert control.changes(servers.at, second) == [
        ("d", "start"),
        ("a", "keep"),
        ("b", "restart"),
        ("c", "stop"),
    ]
    assert servers.at.wanted.read_text() == asked
    assert servers.up(d, a, b) == {}
    after = servers.pids()
    assert after["a"] == before["a"] and after["b"] != before["b"] and after["d"]
    assert servers.state()["c"].state == STOPPED
    assert list(servers.rows()) == ["d", "a", "b"]
    assert servers.up(d, a, b) == {} and servers.pids() == after
    assert servers.up() == {}
    servers.nothing_left()


def test_one_takes_the_port_of_another(servers: Servers, tmp_path: Path) -> None:
    """It waits for the other to be gone."""
    a = stand_in(tmp_path, "a", "--ignore-term", stop_timeout=0.5)
    servers.up(a)
    b = replace(a, name="b", cmd=a.cmd[:-1], restart="never")
    assert servers.up(b) == {}


def test_what_had_failed_is_tried_anew(servers: Servers, tmp_path: Path) -> None:
    a, b = stand_in(tmp_path, "a"), stand_in(tmp_path, "b", "--exit", "1", max_restarts=0)
    servers.up(a, b)
    before = servers.pids()
    wanted = DesiredState(config="c", instances=(a, b))
    assert control.changes(servers.at, wanted) == [("a", "keep"), ("b", "start")]
    assert "exit status 1" in servers.up(a, b)["b"].reason
    logs = list(Path(b.log_file).parent.glob("b*.log"))
    assert [log.read_text().count("+ ") for log in logs] == [1, 1], "each run has its own"
    assert servers.pids() == before


def test_down_by_name(servers: Servers, tmp_path: Path) -> None:
    a, b = stand_in(tmp_path, "alpha"), stand_in(tmp_path, "beta", "--exit", "1", max_restarts=0)
    servers.up(a, b)
    with pytest.raises(UsageError, match=r"name=alpa: .*did you mean alpha") as error:
        servers.down("alpa", "x")
    assert "name=x" in error.value.message and "alpha, beta" in error.value.hint
    assert servers.down("beta") == ["beta"]
    assert servers.state()["beta"].state == STOPPED
    assert servers.state()["alpha"].state == READY
    assert servers.down("alpha") == ["alpha"]
    servers.nothing_left()
    assert servers.down() == []
    assert servers.down("alpha") == ["alpha"], "it is stopped, as asked for"


def test_down_tells_what_ran(servers: Servers, tmp_path: Path) -> None:
    """After a stop by a signal, nothing did."""
    a, b = stand_in(tmp_path, "a"), stand_in(tmp_path, "b")
    servers.up(a, b)
    servers.supervisor().terminate()
    wait_for(lambda: not liveness.is_running(servers.at))
    wanted = DesiredState(config="c", instances=(a, b))
    assert control.merged(servers.at, wanted, ["b"]).instances == (b,), "a is not started again"
    assert servers.down() == []


def test_one_beside_the_others(servers: Servers, tmp_path: Path) -> None:
    a, b, c = (stand_in(tmp_path, name) for name in "abc")
    whole = DesiredState(config="c", instances=(a, b, c))

    def up(name: str) -> None:
        control.up(servers.at, whole, report=servers.report, timing=servers.timing, names=[name])

    both = [threading.Thread(target=up, args=[name]) for name in "bc"]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert {name: row.state for name, row in servers.rows().items()} == {"b": READY, "c": READY}
    merged = control.merged(servers.at, whole, ["a"])
    assert sorted(control.changes(servers.at, merged)) == [
        ("a", "start"),
        ("b", "keep"),
        ("c", "keep"),
    ]


def test_down_while_loading(servers: Servers, tmp_path: Path) -> None:
    with client(
        servers, "up", stand_in(tmp_path, "a", "--never-ready"), stand_in(tmp_path, "b")
    ) as up:
        servers.until("a", LOADING)
        servers.until("b", READY)
        servers.down()
        assert up.wait(timeout=120) == 0
        assert up.stdout and "a stopped" in up.stdout.read()
    servers.nothing_left()


def test_down_of_nothing(servers: Servers) -> None:
    assert servers.down() == []
    with pytest.raises(UsageError, match="name=a: there is no such instance"):
        servers.down("a")
    assert servers.rows() == {}


def test_two_at_once(servers: Servers, tmp_path: Path) -> None:
    """The second says so and waits; then it has nothing to do."""
    a = stand_in(tmp_path, "a", "--ready-after", "1")
    with client(servers, "up", a) as one:
        servers.until("a", LOADING)
        with client(servers, "up", a) as two:
            assert two.stderr and "another `up`" in two.stderr.readline()
            assert two.poll() is None
            assert one.wait(timeout=120) == 0
            assert two.wait(timeout=120) == 0
            assert two.stdout and two.stdout.read() == "a ready\ndone []\n"
    assert Path(a.log_file).read_text().count("+ ") == 1


def test_an_older_up_that_wrote_later(servers: Servers, tmp_path: Path) -> None:
    """As two do at once where locks do not work: the newer one writes again."""
    with client(servers, "up", stand_in(tmp_path, "a", "--ready-after", "1")) as up:
        servers.until("a", LOADING)
        newer = state.read_wanted(servers.at)
        assert newer
        state.write_wanted(servers.at, replace(newer, asked=1))
        assert up.wait(timeout=120) == 0
        assert up.stdout and up.stdout.read().endswith("done []\n")
    assert state.read_wanted(servers.at) == newer


def test_up_and_down_over_and_over(servers: Servers, tmp_path: Path) -> None:
    """Whenever the old supervisor is about to end."""
    a = stand_in(tmp_path, "a")
    for _ in range(3):
        assert servers.up(a) == {}
        down = threading.Thread(target=servers.down)
        down.start()
        time.sleep(0.1)
        failed = servers.up(a)
        assert not failed or failed["a"].state == STOPPED  # `down` may have been the later one
        down.join()
    servers.down()
    servers.nothing_left()


def test_an_interrupted_up_leaves_them_running(servers: Servers, tmp_path: Path) -> None:
    with client(servers, "up", stand_in(tmp_path, "a", "--ready-after", "1.5")) as up:
        servers.until("a", LOADING)
        os.killpg(up.pid, signal.SIGINT)
        up.wait(timeout=120)
        assert up.stderr and "./doitw down stops it" in up.stderr.read()
    servers.until("a", READY)


def test_a_supervisor_killed_under_up_is_replaced(servers: Servers, tmp_path: Path) -> None:
    with client(servers, "up", stand_in(tmp_path, "a", "--ready-after", "1.5")) as up:
        servers.until("a", LOADING)
        servers.kill_supervisor()
        assert up.wait(timeout=120) == 0
    assert servers.rows()["a"].state == READY


def test_a_supervisor_that_is_asked_to_end(servers: Servers, tmp_path: Path) -> None:
    servers.up(stand_in(tmp_path, "a"), stand_in(tmp_path, "b", "--exit", "1", max_restarts=0))
    servers.supervisor().terminate()
    wait_for(lambda: not liveness.is_running(servers.at))
    servers.nothing_left()
    assert {row.state for row in servers.rows().values()} == {STOPPED}


def test_asked_twice_it_kills(servers: Servers, tmp_path: Path) -> None:
    servers.up(stand_in(tmp_path, "a", "--ignore-term", stop_timeout=600.0))
    supervisor = servers.supervisor()
    supervisor.terminate()
    servers.until("a", state.STOPPING)
    supervisor.terminate()
    wait_for(lambda: not liveness.is_running(servers.at))
    servers.nothing_left()


def test_a_supervisor_that_hangs(
    servers: Servers, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = stand_in(tmp_path, "a", stop_timeout=0.5), stand_in(tmp_path, "b", stop_timeout=0.5)
    servers.up(a, b)
    servers.supervisor().suspend()
    assert control.down(servers.at, grace=0.5) == ["a", "b"]
    assert "did not stop them" in capsys.readouterr().err
    servers.nothing_left()
    servers.up(a, b)
    servers.supervisor().suspend()
    assert control.down(servers.at, ["a"], grace=0.5) == ["a"]
    wait_for(lambda: {name: row.state for name, row in servers.rows().items()} == {"b": READY})


def test_up_does_not_wait_for_one_that_hangs(
    servers: Servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = stand_in(tmp_path, "a")
    servers.up(a)
    servers.supervisor().suspend()
    monkeypatch.setattr(launch, "REACTION_SECONDS", 1.0)
    with pytest.raises(PipelineError, match="does not react"):
        servers.up(changed(a, "--metrics"))


def test_fields_of_a_newer_version(servers: Servers, tmp_path: Path) -> None:
    servers.up(stand_in(tmp_path, "a"))
    for path, read in (
        (servers.at.wanted, state.read_wanted),
        (servers.at.state, state.read_state),
    ):
        before, told = read(servers.at), json.loads(path.read_text())
        told |= {"newer": 1, "instances": [one | {"newer": 2} for one in told["instances"]]}
        path.write_text(json.dumps(told))
        assert before and read(servers.at) == before


def test_a_supervisor_is_known_by_its_lock(servers: Servers, tmp_path: Path) -> None:
    """In the foreground it carries no marker, and a clock that was set moves its start time."""
    with client(servers, "run_foreground", stand_in(tmp_path, "a")) as process:
        servers.until("a", READY)
        told = state.read_state(servers.at)
        assert told
        assert liveness.has_open(process.pid, servers.at.lock)
        assert not liveness.has_open(os.getpid(), servers.at.lock)
        servers.down()
        assert process.wait(timeout=120) == 0
    assert not liveness.has_open(process.pid, servers.at.lock)


def test_the_folder_of_another_user(servers: Servers, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder away")
    servers.at.path.mkdir(parents=True)
    os.chown(servers.at.path, 1, 1)
    with pytest.raises(PipelineError, match="belongs to "):
        servers.up(stand_in(tmp_path, "a"))


def test_a_server_without_the_marker(servers: Servers, tmp_path: Path) -> None:
    """Such as one with rights that hide its environment: its number and its start are known."""
    servers.up(stand_in(tmp_path, "a"))
    servers.kill_supervisor()
    wait_for(lambda: not servers.processes())
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as server:
        old = state.read_state(servers.at)
        assert old
        seen = replace(old.instances[0], pid=server.pid, started=marker.start_time(server.pid))
        state.write_state(servers.at, replace(old, instances=(seen,)))
        assert liveness.is_left(servers.at)
        servers.down()
        assert server.wait(timeout=120) == -signal.SIGKILL
    assert not liveness.is_left(servers.at)


def test_a_step_that_goes_wrong(servers: Servers, tmp_path: Path) -> None:
    """Without a file to open, nothing is restarted; the others go on, and it then is."""
    if sys.platform != "linux":
        pytest.skip("limits of another process")
    a, b = stand_in(tmp_path, "a"), stand_in(tmp_path, "b")
    servers.up(a, b)
    supervisor, before = servers.supervisor(), servers.pids()
    most = supervisor.rlimit(psutil.RLIMIT_NOFILE)
    assert most[0] == most[1], "as many as it may have"
    supervisor.rlimit(psutil.RLIMIT_NOFILE, (3, most[1]))
    os.kill(before["a"] or 0, signal.SIGKILL)
    time.sleep(1)
    assert lives(supervisor.pid) and lives(before["b"] or 0)
    supervisor.rlimit(psutil.RLIMIT_NOFILE, most)
    servers.up(a, b)
    assert servers.pids()["b"] == before["b"]


def test_a_disk_that_fills_up_while_a_server_loads(
    servers: Servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The supervisor cannot write that it is ready: `up` does not wait for that for ever."""
    if sys.platform != "linux":
        pytest.skip("limits of another process")
    a = stand_in(tmp_path, "a", "--ready-after", "1")
    limits = psutil.RLIMIT_FSIZE

    def full(folder: Path) -> None:
        raise PipelineError(f"{folder}: cannot be written to: No space left on device")

    def report(server: Server, now: state.ServerStatus) -> None:
        servers.supervisor().rlimit(limits, (0, most[1]))

    most = psutil.Process().rlimit(limits)
    monkeypatch.setattr(servers, "report", report)
    monkeypatch.setattr(launch, "REACTION_SECONDS", 2.0)
    monkeypatch.setattr(launch, "require_writable", full)
    with pytest.raises(PipelineError, match="No space left"):
        servers.up(a)
    servers.supervisor().rlimit(limits, most)
    monkeypatch.undo()
    pid = servers.pids()["a"]
    assert servers.up(a) == {} and servers.pids()["a"] == pid


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}', "\0" * 100])
def test_damaged_files(servers: Servers, tmp_path: Path, text: str) -> None:
    a = stand_in(tmp_path, "a")
    servers.up(a)
    pid = servers.pids()["a"]
    servers.at.wanted.write_text(text)
    wait_for(lambda: "missing or damaged" in servers.log())
    servers.at.state.write_text(text)
    assert servers.rows() == {}
    assert lives(pid or 0), "what runs is kept"
    assert servers.up(a) == {}
    assert servers.pids()["a"] == pid
    servers.at.state.write_text(text)
    servers.at.wanted.write_text(text)
    wait_for(lambda: servers.state())
    with pytest.raises(PipelineError, match=r"wanted\.json"):
        servers.down("a")
    servers.down()
    servers.nothing_left()


def test_a_state_that_cannot_be_written(servers: Servers, tmp_path: Path) -> None:
    """The servers go on, and it is written as soon as it can be."""
    a = stand_in(tmp_path, "a")
    servers.up(a)
    pid = servers.pids()["a"] or 0
    servers.at.state.unlink()
    servers.at.state.mkdir()
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: "trying again" in servers.log())
    wait_for(lambda: servers.running() and pid not in [one.pid for one in servers.running()])
    servers.at.state.rmdir()
    assert servers.until("a", READY).restarts == 1


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
    with servers_at(small / "run") as servers:
        a = replace(stand_in(tmp_path, "a"), log_file=str(small / "a.log"), max_restarts=9)
        servers.up(a)
        pid, stuff = servers.pids()["a"] or 0, small / "stuff"
        fill(stuff)
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: [one.pid for one in servers.running()] not in ([], [pid]))
        assert servers.pids()["a"] == pid, "that is what was written last"
        assert servers.rows()["a"].state in (status.LOST, READY)
        with pytest.raises(PipelineError, match="disk full; the unfinished"):
            servers.up(a)
        stuff.unlink()
        wait_for(lambda: servers.pids()["a"] not in (pid, None))
        servers.until("a", READY)
        fill(stuff)
        assert servers.down() == ["a"]
        servers.nothing_left()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_lock_that_finds_no_room_keeps_nobody_from_stopping(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    at, opened = state.Folder(tmp_path / "instances" / "a"), os.open
    at.path.mkdir(parents=True)
    at.lock.touch()

    def full(path: object, *more: Any, **options: Any) -> int:
        if str(path) == str(at.lock):
            raise OSError(number, os.strerror(number), str(at.lock))
        return opened(path, *more, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", full)
    assert not liveness.is_running(at)
    with control.alone(at.lock, needed=False):
        pass


def test_a_supervisor_has_its_time_from_its_start(
    servers: Servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a busy machine its first state is late, and behind: that is no supervisor that hangs."""
    servers.up(stand_in(tmp_path, "a"))
    wanted, began, patience = state.read_wanted(servers.at), time.monotonic(), 2.5

    def late(at: state.Folder) -> state.State | None:
        """Nothing, then what an earlier `up` asked for, then what it is."""
        seconds, now = time.monotonic() - began, state.read_state(at)
        assert now
        if seconds < 1.4 * patience:
            now = replace(now, asked=0, instances=())
        return None if seconds < 0.6 * patience else now

    monkeypatch.setattr(launch, "REACTION_SECONDS", patience)
    monkeypatch.setattr(control, "living", late)
    monkeypatch.setattr(launch, "is_running", lambda at: time.monotonic() - began >= 0.6 * patience)
    seen: list[str] = []
    assert wanted
    failed = control._wait_until_settled(
        servers.at, wanted, lambda server, now: seen.append(now.state), control.Timing()
    )
    assert (failed, seen) == ([], [READY])


@pytest.mark.usefixtures("locks_that_do_not_work")
def test_two_supervisors_at_once_on_a_disk_without_locks(servers: Servers, tmp_path: Path) -> None:
    """The older one stays, even before its first state: they do not kill each other."""
    servers.instances = (stand_in(tmp_path, "a"),)
    servers.at.path.mkdir(parents=True)
    state.write_wanted(servers.at, DesiredState(config="c.toml", instances=servers.instances))
    older = launch.start(servers.at, control.Timing())
    os.kill(older.pid, signal.SIGSTOP)
    younger = launch.start(servers.at, control.Timing())
    wait_for(lambda: younger.poll() is not None)
    assert not liveness.living(servers.at)
    with client(servers, "up", *servers.instances) as up:  # starts no other one meanwhile
        wait_for(lambda: (read := state.read_wanted(servers.at)) and read.asked)
        os.kill(older.pid, signal.SIGCONT)
        assert "done []" in up.communicate(timeout=60)[0]
    assert older.poll() is None and servers.pids()["a"]


@pytest.mark.usefixtures("locks_that_do_not_work")
def test_a_disk_without_locks(servers: Servers, tmp_path: Path) -> None:
    """There is one supervisor; after it was killed another one takes over."""
    a = stand_in(tmp_path, "a")
    servers.at.path.mkdir(parents=True)
    for name in (servers.at.lock.name, "up.lock", "wanted.lock"):
        (servers.at.path / name).touch()  # of a killed run
    for _ in range(2):
        with client(servers, "up", a) as first, client(servers, "up", a) as second:
            for up in (first, second):
                out, err = up.communicate(timeout=60)
                assert "done []" in out, out + err
                assert "locks do not work on this disk" in err
        # One supervisor and its reaper: the other one sees that it is not alone, and ends.
        wait_for(lambda: len(marker.marked(servers.at)[servers.at.marker]) == 2)
        servers.supervisor().kill()
        wait_for(lambda: not servers.processes())
    with client(servers, "run_foreground", a) as foreground:
        wait_for(lambda: (now := state.read_state(servers.at)) and now.pid == foreground.pid)
        with client(servers, "run_foreground", a) as other:
            assert "already up" in other.communicate(timeout=60)[0]
        foreground.terminate()
        assert foreground.wait(timeout=60) == 0
    servers.nothing_left()


def test_a_disk_that_became_read_only(small: Path, tmp_path: Path) -> None:
    """As after an error of the disk: the servers go on, and can be stopped."""
    with servers_at(small / "run") as servers:
        a = replace(stand_in(tmp_path, "a"), log_file=str(small / "a.log"))
        servers.up(a)
        pid = servers.pids()["a"] or 0

        # Files that are open for writing forbid it for the one mount, not for a view of it.
        subprocess.run(["mount", "--bind", small, small], check=True)
        try:
            subprocess.run(["mount", "-o", "remount,bind,ro", small], check=True)
            with pytest.raises(PipelineError, match="ead-only"):
                servers.up(changed(a, "--metrics"))
            assert servers.rows()["a"].state == READY
            assert servers.pids()["a"] == pid
            assert servers.down() == ["a"]
            servers.nothing_left()
        finally:
            subprocess.run(["umount", small], check=False)


def test_numbers_that_are_used_again(servers: Servers, tmp_path: Path) -> None:
    """A state that names processes of somebody else: they are not shown, and never signalled."""
    a = stand_in(tmp_path, "a")
    servers.up(a)
    servers.kill_supervisor()
    wait_for(lambda: not servers.processes())
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as stranger:
        try:
            old = state.read_state(servers.at)
            assert old is not None
            long_ago = old.started - 60
            seen = replace(old.instances[0], pid=stranger.pid, started=long_ago)
            lie = replace(old, pid=stranger.pid, started=long_ago, instances=(seen,))
            state.write_state(servers.at, lie)
            row = servers.rows()["a"]
            assert (row.state, row.pid, row.memory) == (status.LOST, None, None)
            servers.down()
            assert stranger.poll() is None
            assert servers.up(a) == {}
            assert stranger.poll() is None
        finally:
            stranger.kill()


def test_ps_sees_who_does_not_answer(servers: Servers, tmp_path: Path) -> None:
    a, b = stand_in(tmp_path, "a"), stand_in(tmp_path, "b")
    servers.up(a, b)
    process = psutil.Process(servers.pids()["a"] or 0)
    process.suspend()
    began = time.monotonic()
    rows = servers.rows()
    assert time.monotonic() - began < 60
    assert (rows["a"].state, rows["a"].ready_since) == (status.SILENT, None)
    assert rows["b"].state == READY
    process.resume()
    assert servers.rows()["a"].state == READY


def test_ps_shows_the_memory_on_cards(
    servers: Servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for nvidia-smi, as it answers for a server on two cards and for a stranger."""
    servers.up(stand_in(tmp_path, "a"), stand_in(tmp_path, "b"))
    pid = servers.pids()["a"]
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    told = f"{pid}, GPU-0, 1024\n{pid}, GPU-1, 512\n1, GPU-1, 7\n"
    told += f"{servers.pids()['b']}, GPU-0, [N/A]\n"
    program.write_text(
        f"#!/bin/sh\ncase $1 in {nvidia.USED_QUERY[0]}) printf {told!r} ;;\n"
        "--query-gpu=uuid) echo GPU-0; echo GPU-1 ;; esac\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    rows = servers.rows()
    assert rows["a"].gpu_memory == 1536 * 1024 * 1024
    assert rows["b"].gpu_memory is None


def test_other_configurations_are_left_alone(
    servers: Servers, other: Servers, tmp_path: Path
) -> None:
    a, b = stand_in(tmp_path, "a"), stand_in(tmp_path, "b")
    servers.up(a)
    other.up(b)
    before = [one.pid for one in other.processes()]
    servers.kill_supervisor()
    wait_for(lambda: not servers.processes())
    servers.up(a)
    servers.down()
    assert [one.pid for one in other.processes()] == before
    assert other.rows()["b"].state == READY


def test_a_folder_that_was_removed(servers: Servers, tmp_path: Path) -> None:
    """What runs is stopped: no `down` could name it. An `up` that is quicker takes over."""
    a = stand_in(tmp_path, "a")
    servers.up(a)
    supervisor = servers.supervisor()
    shutil.rmtree(servers.at.path)
    wait_for(lambda: not lives(supervisor.pid))
    servers.nothing_left()
    servers.up(a)
    shutil.rmtree(servers.at.path)
    assert servers.up(a) == {}
    assert len(servers.running()) == 1
    servers.down()
    servers.nothing_left()


def test_a_supervisor_that_cannot_begin(servers: Servers, tmp_path: Path) -> None:
    servers.at.path.mkdir(parents=True)
    servers.at.lock.mkdir()
    with pytest.raises(PipelineError):
        servers.up(stand_in(tmp_path, "a"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_in_the_foreground(servers: Servers, tmp_path: Path, number: int) -> None:
    a, b = stand_in(tmp_path, "a"), stand_in(tmp_path, "b", "--exit", "1", max_restarts=0)
    with client(servers, "run_foreground", a, b) as process:
        wait_for(lambda: servers.state().get("a") and servers.state()["a"].state == READY)
        servers.until("b", FAILED)
        assert servers.supervisor().pid == process.pid
        assert servers.rows()["a"].state == READY
        with client(servers, "run_foreground", a) as second:
            assert "already up" in line(second)
        process.send_signal(number)
        assert process.wait(timeout=120) == 0
        assert process.stdout and "done" in process.stdout.read()
    servers.nothing_left()


def test_the_foreground_killed_or_taken_down(servers: Servers, tmp_path: Path) -> None:
    note = tmp_path / "grandchild"
    a = stand_in(tmp_path, "a", "--setsid", "--grandchild", str(note))
    for end in ("kill", "down"):
        with client(servers, "run_foreground", a) as process:
            servers.until("a", READY)
            if end == "kill":
                process.kill()
            else:
                servers.down()
            process.wait(timeout=120)
            wait_for(lambda: not servers.processes())
        servers.nothing_left()
        servers.at.state.unlink()


def test_the_state_is_what_the_contract_says(servers: Servers, tmp_path: Path) -> None:
    servers.up(stand_in(tmp_path, "a"))
    told = json.loads(servers.at.state.read_text())
    assert set(told) == {"pid", "started", "asked", "instances", "reads"}
    assert told["instances"] == [asdict(servers.state()["a"])]
    servers.up(*servers.instances)
    assert json.loads(servers.at.state.read_text())["asked"] > told["asked"]


@pytest.mark.slow
def test_fifty(servers: Servers, tmp_path: Path) -> None:
    """All at once; figures are in benchmarks/supervisor.py, here is only a wide bound."""
    many = [stand_in(tmp_path, f"s{n:02}", "--metrics", probe_timeout=10.0) for n in range(50)]
    failed = servers.up(*many)
    assert not failed, [seen.reason for seen in failed.values()]
    rows = servers.rows()
    assert len(rows) == 50 and {row.state for row in rows.values()} == {READY}
    supervisor = servers.supervisor()
    held = sum(
        one.memory_info().rss
        for one in (supervisor, *marker.marked(servers.at)[servers.at.marker])
        if one.pid != supervisor.pid or one is supervisor
    )
    assert held < 60_000_000
    servers.down()
    servers.nothing_left()
