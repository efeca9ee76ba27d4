"""One stand-in under the supervisor: each way to start, to fail and to end."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import sys
import time
from pathlib import Path
from threading import Event

import psutil
import pytest
from conftest import wait_for
from msgspec.structs import replace
from supervisor_tools import Servers, changed, grandchild, lives, stand_in

from pipeline.core.process import LEFT_SECONDS
from pipeline.serve.guard.port import OwnPort
from pipeline.serve.logfile import KEPT
from pipeline.serve.supervisor import client, marker
from pipeline.serve.supervisor.child import Child
from pipeline.serve.supervisor.environment import environment
from pipeline.serve.supervisor.policy import Timing
from pipeline.serve.supervisor.state import (
    EXITED,
    FAILED,
    LOADING,
    PAUSING,
    READY,
    STOPPED,
    WAITING,
    Folder,
)

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")


def log_of(tmp_path: Path, name: str = "a") -> str:
    return (tmp_path / "logs" / f"{name}.log").read_text("utf-8")


def test_a_server_that_prints_is_checked_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not only after a share of the time that a large model takes."""
    monkeypatch.setattr(client, "PAUSE_SHARE", 1e9)
    monkeypatch.setattr(client, "LONGEST_PAUSE", 60.0)
    checks, go, ready = [], tmp_path / "go", tmp_path / "ready"

    def is_ready(_: object) -> bool:
        checks.append(ready.exists())
        return checks[-1]

    monkeypatch.setattr(client, "is_ready", is_ready)
    script = f"until [ -e '{go}' ]; do sleep 0.02; done; touch '{ready}'; echo; exec sleep 60"
    server = replace(stand_in(tmp_path, "a"), executable="/bin/sh", cmd=("-c", script))
    at, news = Folder(tmp_path / "at"), Event()
    at.path.mkdir()
    child = Child(OwnPort(server), at, Timing(), news)
    try:
        wait_for(lambda: checks)
        go.touch()
        assert news.wait(30) and child.observed == READY
        assert checks == [False, True]
    finally:
        child.kill()
        wait_for(lambda: child.exit_status() is not None)
        child.finish()


def test_up_ps_down(servers: Servers, tmp_path: Path) -> None:
    a = stand_in(tmp_path, "a", "--ready-after", "0.3", "--metrics", aliases=("small", "tiny"))
    b = stand_in(tmp_path, "b")
    assert servers.up(a, b) == {}
    assert [(n, s.state) for n, s in servers.told if s.state == READY and n == "a"] == [
        ("a", READY)
    ]
    rows = servers.rows()
    assert list(rows) == ["a", "b"]
    row = rows["a"]
    assert (row.state, row.model, row.engine, row.restarts) == (READY, "small", "llama.cpp", 0)
    assert (row.port, row.url) == (a.port, f"http://127.0.0.1:{a.port}")
    assert row.pid and psutil.Process(row.pid).cmdline()[1:] == list(a.cmd)
    assert row.ready_since and abs(time.time() - row.ready_since) < 60
    assert row.memory and row.memory > 5_000_000
    assert row.tokens_per_second == 12.5
    assert rows["b"].tokens_per_second is None
    assert sorted(servers.down()) == ["a", "b"]
    servers.nothing_left()
    assert {name: row.state for name, row in servers.rows().items()} == {}
    log = log_of(tmp_path).splitlines()
    assert log[0].endswith(f"+ {shlex.join(a.command)}")
    assert log[-1] == "ending on SIGTERM"


def test_files_are_private(servers: Servers, tmp_path: Path) -> None:
    servers.up(stand_in(tmp_path, "a"))
    for path in (servers.at.state, servers.at.wanted, servers.at.log, tmp_path / "logs" / "a.log"):
        assert path.stat().st_mode & 0o777 == 0o600, path
    for path in (servers.at.path, tmp_path / "logs"):
        assert path.stat().st_mode & 0o777 == 0o700, path


def test_the_environment(servers: Servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(marker.VARIABLE, "another/one")
    monkeypatch.setenv("LLAMA_ARG_CTX_SIZE", "7")
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("OF_ANOTHER_PROGRAM", "secret")
    (tmp_path / "key").write_text("the-key\nanother\n")
    notes = {name: tmp_path / f"{name}.json" for name in ("a", "b")}
    a = stand_in(tmp_path, "a", "--environment", str(notes["a"]), env={"CUDA_VISIBLE_DEVICES": "1"})
    b = stand_in(tmp_path, "b", "--environment", str(notes["b"]), engine="vllm", api_key_file="key")
    b = replace(b, downloads=True)
    assert servers.up(a, b) == {}
    env = json.loads(notes["a"].read_text())
    unwanted = {"LLAMA_ARG_CTX_SIZE", "HF_TOKEN", "VLLM_API_KEY", "OF_ANOTHER_PROGRAM"}
    assert unwanted.isdisjoint(env)
    assert (env["OMP_NUM_THREADS"], env["CUDA_VISIBLE_DEVICES"]) == ("3", "1")
    assert env[marker.VARIABLE] == f"{servers.at.marker}/a"
    assert marker.VARIABLE not in environment(a, servers.at), "in the foreground it has none"
    assert list(Path(env["XDG_CONFIG_HOME"]).iterdir()) == []
    env = json.loads(notes["b"].read_text())
    assert (env["VLLM_API_KEY"], env["HF_TOKEN"]) == ("the-key", "secret")
    assert "the-key" not in servers.at.state.read_text() + servers.at.wanted.read_text()


def test_never_ready(servers: Servers, tmp_path: Path) -> None:
    a = stand_in(tmp_path, "a", "--never-ready", ready_timeout=0.5, max_restarts=1)
    reason = servers.up(a)["a"].reason
    assert reason.startswith("failed start: not ready after 0.5 s; given up after 1 restarts")
    assert "  | still loading" in reason
    assert log_of(tmp_path).count("+ ") == 2
    servers.down()
    servers.nothing_left()


def test_a_broken_one_does_not_touch_the_others(servers: Servers, tmp_path: Path) -> None:
    good, bad = stand_in(tmp_path, "good"), stand_in(tmp_path, "bad", "--exit", "7")
    failed = servers.up(good, bad)
    assert list(failed) == ["bad"]
    seen = failed["bad"]
    assert (seen.state, seen.restarts, seen.pid) == (FAILED, 2, None)
    assert "exit status 7 before it was ready; given up after 2 restarts" in seen.reason
    assert "  | the last words" in seen.reason
    assert [s.state for n, s in servers.told if n == "bad" and s.state == PAUSING]
    assert servers.state()["good"].state == READY


@pytest.mark.parametrize(
    ("switches", "text"),
    [(["--exit", "3"], "crash: exit status 3"), (["--die"], "failed start: killed by SIGABRT")],
)
def test_never_restarted(servers: Servers, tmp_path: Path, switches: list[str], text: str) -> None:
    servers.up(stand_in(tmp_path, "a", *switches, "--after", "1.5", restart="never"))
    failed = servers.until("a", FAILED, reason=text)
    assert failed.restarts == 0
    assert "  | the last words" in failed.reason and "ggml_abort" not in failed.reason


def test_a_good_end_is_no_failure(servers: Servers, tmp_path: Path) -> None:
    assert servers.up(stand_in(tmp_path, "a", "--exit", "0", "--after", "1.5")) == {}
    assert servers.until("a", EXITED).reason.startswith("ended: exit status 0")
    assert servers.rows()["a"].state == EXITED
    servers.down()
    servers.nothing_left()


def test_always_restarted(servers: Servers, tmp_path: Path) -> None:
    servers.up(stand_in(tmp_path, "a", "--exit", "0", "--after", "1", restart="always"))
    wait_for(lambda: servers.state()["a"].restarts >= 1)


def test_a_killed_server_comes_back_and_the_others_stay(servers: Servers, tmp_path: Path) -> None:
    a, b = stand_in(tmp_path, "a"), stand_in(tmp_path, "b")
    servers.up(a, b)
    before = servers.pids()
    os.kill(before["a"] or 0, signal.SIGKILL)
    seen = wait_for(lambda: (s := servers.state()["a"]).restarts and s.state == READY and s)
    assert seen.pid != before["a"]
    assert "crash: killed by SIGKILL after it was ready" in seen.reason
    assert servers.pids()["b"] == before["b"]
    assert servers.rows()["a"].restarts == 1


def test_a_steady_server_has_its_whole_budget(servers: Servers, tmp_path: Path) -> None:
    """Each is ready for long enough here, so it is started more often than the budget says."""
    servers.timing = replace(servers.timing, steady_after=0.0)
    servers.up(stand_in(tmp_path, "a", "--exit", "3", "--after", "0.7", max_restarts=1))
    wait_for(lambda: servers.state()["a"].restarts >= 3)


@pytest.mark.parametrize("more", [[], ["--metrics"]], ids=["blind", "more and more wait"])
def test_stuck(servers: Servers, tmp_path: Path, more: list[str]) -> None:
    a = stand_in(tmp_path, "a", "--wedge-after", "0", "--ignore-term", *more, probe_timeout=0.5)
    servers.up(a, b := stand_in(tmp_path, "b", probe_timeout=5.0))
    seen = servers.until(
        "a", PAUSING, LOADING, READY, FAILED, reason="stuck: no token within 0.5 s"
    )
    assert "asked /completion" in seen.reason
    assert servers.until("a", FAILED).restarts == 2
    assert servers.state()["b"].restarts == 0
    assert "asked /completion" in Path(b.log_file).read_text()


def test_the_time_it_may_have_been_stuck_is_not_steady(servers: Servers, tmp_path: Path) -> None:
    """With equal times, as they are by default, the budget ends all the same."""
    servers.timing = replace(servers.timing, probe_every=0.5, steady_after=0.5)
    servers.up(stand_in(tmp_path, "a", "--wedge-after", "0", probe_timeout=0.3, max_restarts=1))
    assert servers.until("a", FAILED, reason="given up").restarts == 1


@pytest.mark.parametrize("engine", ["vllm", "llama.cpp"])
def test_behind_a_launcher(servers: Servers, tmp_path: Path, engine: str) -> None:
    """It is asked itself, and has its time although the launcher is gone at once; what it says
    after a long silence is still heard."""
    silence = str(LEFT_SECONDS + 1)
    a = stand_in(tmp_path, "a", "--stop-after", silence, engine=engine, stop_timeout=30.0)
    words = shlex.join(a.command)
    servers.up(replace(a, executable="/bin/sh", cmd=("-c", f"{words}; exit 0")))
    servers.down()
    assert log_of(tmp_path).splitlines()[-1] == "ending on SIGTERM"
    servers.nothing_left()


@pytest.mark.parametrize("switches", [["--metrics", "--working"], []], ids=["works", "is off"])
def test_not_asked(servers: Servers, tmp_path: Path, switches: list[str]) -> None:
    """One whose counters move is left alone, and one that is not to be probed."""
    timeout = 5.0 if switches else 0.0
    servers.up(stand_in(tmp_path, "a", "--wedge-after", "0", *switches, probe_timeout=timeout))
    time.sleep(2)
    assert servers.state()["a"].restarts == 0
    assert "asked" not in log_of(tmp_path)


def test_an_idle_server_is_asked_once(servers: Servers, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("k1\nk2\n")
    a = stand_in(tmp_path, "a", "--metrics", probe_timeout=5.0, api_key_file=str(tmp_path / "key"))
    servers.up(a)
    wait_for(lambda: "asked" in log_of(tmp_path))
    time.sleep(1.5)
    (line,) = [line for line in log_of(tmp_path).splitlines() if line.startswith("asked")]
    assert line.endswith("Bearer k1")


@pytest.mark.parametrize(
    ("engine", "kind", "path"),
    [
        ("llama.cpp", "chat", "/completion"),
        ("llama.cpp", "embedding", "/v1/embeddings"),
        ("llama.cpp", "rerank", "/v1/rerank"),
        ("vllm", "chat", "/v1/completions"),
        ("vllm", "embedding", "/v1/embeddings"),
    ],
)
def test_the_smallest_request(tmp_path: Path, engine: str, kind: str, path: str) -> None:
    one = stand_in(tmp_path, "a", engine=engine, kind=kind, aliases=("m",))
    told, body = client.smallest_request(one)
    assert told == path
    assert body.get("model", "m") == "m" and ("model" in body or path == "/completion")
    assert body.get("cache_prompt", False) is False


def test_a_port_that_is_taken(servers: Servers, tmp_path: Path) -> None:
    a = stand_in(tmp_path, "a", max_restarts=1)
    with socket.create_server(("127.0.0.1", a.port)):
        reason = servers.up(a)["a"].reason
    assert reason.startswith(f"failed start: port {a.port} on 127.0.0.1 is in use by ")
    assert f"(pid {os.getpid()})" in reason
    assert servers.up(a) == {}, "what had failed is tried anew"


def test_a_port_of_another_configuration_is_not_tried_again(
    servers: Servers, other: Servers, tmp_path: Path
) -> None:
    """Until that one is down: then the same `up` starts it."""
    a = stand_in(tmp_path, "a", max_restarts=5)
    assert other.up(replace(a, name="b", log_file=str(tmp_path / "b.log"))) == {}
    failed = servers.up(a)["a"]
    assert f"port {a.port} is taken by b of " in failed.reason
    assert (failed.state, failed.restarts) == (FAILED, 0)
    assert other.down() == ["b"]
    assert servers.up(a) == {}


@pytest.mark.parametrize("wrong", ["executable", "folder", "key", "log"])
def test_what_cannot_be_started(servers: Servers, tmp_path: Path, wrong: str) -> None:
    a, missing = stand_in(tmp_path, "a", max_restarts=1), str(tmp_path / "missing")
    (tmp_path / "file").write_text("")
    a = {
        "executable": replace(a, executable=missing),
        "folder": replace(a, folder=missing),
        "key": replace(a, engine="vllm", api_key_file=missing),
        "log": replace(a, log_file=str(tmp_path / "file" / "a.log")),
    }[wrong]
    failed = servers.up(a)
    if wrong == "log":  # a server is worth more than its log
        assert failed == {}
    else:
        assert "failed start: " in failed["a"].reason and "missing" in failed["a"].reason
    if wrong == "executable":
        assert (failed["a"].state, failed["a"].restarts) == (FAILED, 0)


def test_a_wrong_argument_is_not_tried_again(servers: Servers, tmp_path: Path) -> None:
    status = servers.up(stand_in(tmp_path, "a", "--no-such-switch"))["a"]
    assert (status.state, status.restarts) == (FAILED, 0)
    assert "not tried again" in status.reason and "unrecognized arguments" in status.reason


def test_a_log_is_begun_anew_when_it_is_long(servers: Servers, tmp_path: Path) -> None:
    servers.timing = replace(servers.timing, log_bytes=100_000)
    servers.up(stand_in(tmp_path, "a", "--lines", "50000", "--rate", "5000"))
    wait_for(lambda: len(list((tmp_path / "logs").glob("a.*.log"))) == KEPT)
    servers.down()  # no file is renamed any more
    sizes = [path.stat().st_size for path in (tmp_path / "logs").iterdir()]
    assert len(sizes) == KEPT + 1 and max(sizes) <= 100_000
    numbers = [int(x.split()[1]) for x in log_of(tmp_path).splitlines() if x.startswith("talk")]
    assert numbers == list(range(numbers[0], numbers[-1] + 1)), "no line is lost"


def test_each_run_has_its_own_log(servers: Servers, tmp_path: Path) -> None:
    a = stand_in(tmp_path, "a")
    servers.up(a)
    psutil.Process(servers.pids()["a"] or 0).kill()
    wait_for(lambda: (s := servers.state()["a"]).restarts == 1 and s.state == READY)
    servers.down()
    first = log_of(tmp_path)
    assert first.count("] + ") == 2, "a restart goes on in the same log"
    servers.up(a)
    servers.down()
    assert log_of(tmp_path).count("] + ") == 1
    (before,) = (tmp_path / "logs").glob("a.*.log")
    assert before.read_text("utf-8") == first


def test_huge_output_stops_nothing(servers: Servers, tmp_path: Path) -> None:
    size = 12_000_000
    assert servers.up(stand_in(tmp_path, "a", "--no-newline", str(size))) == {}
    servers.down()
    told = "".join(path.read_text() for path in (tmp_path / "logs").iterdir())
    assert told.count("x") == size
    assert len(servers.log()) < 100_000


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full")
@pytest.mark.parametrize("kind", ["full", "pipe"])
def test_a_log_that_takes_nothing_stops_nothing(
    servers: Servers, tmp_path: Path, kind: str
) -> None:
    (tmp_path / "logs").mkdir()
    path = tmp_path / "logs" / "a.log"
    path.symlink_to("/dev/full") if kind == "full" else os.mkfifo(path)
    assert servers.up(stand_in(tmp_path, "a", "--lines", "50000", "--rate", "1000")) == {}
    servers.down()
    servers.nothing_left()
    assert "its lines are lost meanwhile" in servers.log()
    assert re.search(r"\d+ lines could not be written", servers.log())


def test_stopping_takes_its_time_and_no_more(servers: Servers, tmp_path: Path) -> None:
    """Those that ignore SIGTERM are killed together, with what they have started elsewhere."""
    notes = [tmp_path / f"grandchild-{n}" for n in range(4)]
    elsewhere = ["--ignore-term", "--setsid", "--grandchild"]
    servers.up(
        *(
            stand_in(tmp_path, f"s{n}", *elsewhere, str(note), stop_timeout=1.0)
            for n, note in enumerate(notes)
        )
    )
    grandchildren = [grandchild(note) for note in notes]
    assert all(lives(pid) for pid in grandchildren)
    began = time.monotonic()
    servers.down()
    assert 1 <= time.monotonic() - began < 60  # one after the other would take 4 s, and 2 s each
    servers.nothing_left()
    assert not any(lives(pid) for pid in grandchildren)
    assert "SIGTERM is ignored" in log_of(tmp_path, "s0")


def test_what_a_crashed_server_left_elsewhere_is_ended(servers: Servers, tmp_path: Path) -> None:
    note = tmp_path / "grandchild"
    servers.up(stand_in(tmp_path, "a", "--grandchild", str(note), "--setsid"))
    first = grandchild(note)
    os.kill(servers.pids()["a"] or 0, signal.SIGKILL)
    wait_for(lambda: servers.state()["a"].restarts == 1 and servers.state()["a"].state == READY)
    assert not lives(first)
    assert lives(grandchild(note))


def test_so_many_load_at_once(servers: Servers, tmp_path: Path) -> None:
    many = [stand_in(tmp_path, f"s{n}", "--ready-after", "0.4") for n in range(5)]
    servers.up(*many, max_loading=2)
    loading: set[str] = set()
    most, order = 0, list[str]()
    for line in servers.log().splitlines():
        for one in many:
            if line.endswith(f" {one.name}: {LOADING}"):
                loading.add(one.name)
                order.append(one.name)
            elif line.endswith(f" {one.name}: {READY}"):
                loading.discard(one.name)
        most = max(most, len(loading))
    assert most == 2
    assert order == [one.name for one in many], "in the order of the file"
    assert any(seen.state == WAITING for _, seen in servers.told)


def test_up_again_ends_a_pause(servers: Servers, tmp_path: Path) -> None:
    """A port that is taken, then free: nobody waits for the minute to be over."""
    servers.timing = Timing(longest_pause=60)
    a = stand_in(tmp_path, "a", restart_pause=60.0)
    servers.up(a)
    os.kill(servers.pids()["a"] or 0, signal.SIGKILL)
    servers.until("a", PAUSING)
    assert servers.up(a) == {}


def test_a_changed_one_is_stopped_while_it_loads(servers: Servers, tmp_path: Path) -> None:
    a = stand_in(tmp_path, "a")
    servers.up(a)
    servers.up(slow := changed(a, "--ready-after", "0.5"))
    assert psutil.Process(servers.pids()["a"] or 0).cmdline()[1:] == list(slow.cmd)
    assert servers.down("a") == ["a"]
    servers.nothing_left()
    assert servers.state()["a"].state == STOPPED
