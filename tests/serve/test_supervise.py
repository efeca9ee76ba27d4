"""The foreground server: a real stand-in, real signals, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from conftest import REPOSITORY, free_port, wait_for
from supervisor_tools import stand_in

from pipeline.serve.health import is_ready

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")

SERVER = REPOSITORY / "tests" / "fakes" / "server.py"
SUPERVISOR = """
import json, os, sys
from pathlib import Path
from pipeline.core.errors import PipelineError
from pipeline.serve.server import Server
from pipeline.serve.supervise import foreground

port, log, ready_timeout, stop_timeout, guard, arguments = json.loads(sys.argv[1])
server = Server(
    name="x", executable=sys.executable, cmd=tuple(arguments), port=port, sandbox="off",
    folder=str(Path(log).parents[1]), log_file=log, guard=guard,
    ready_timeout=ready_timeout, stop_timeout=stop_timeout,
)
try:
    foreground(
        server, env=dict(os.environ),
        ready=lambda seconds, output: print("ready", flush=True),
    )
except PipelineError as error:
    print(error)
    sys.exit(1)
"""


@dataclass
class Supervised:
    """A supervisor under way, its server, and where both write."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path
    folder: Path

    def out(self) -> str:
        return (self.folder / "out").read_text("utf-8", "replace")

    def err(self) -> str:
        return (self.folder / "err").read_text("utf-8", "replace")

    def until(self, text: str) -> None:
        wait_for(lambda: text in self.out() + self.err() or self.process.poll() is not None)
        assert text in self.out() + self.err(), self.out() + self.err()

    def ready(self) -> Supervised:
        self.until("ready\n")
        return self

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def ended(self, status: int = 0) -> str:
        """Wait for the end; both processes are gone and the port is free. What was printed."""
        assert self.process.wait(timeout=60) == status, self.out() + self.err()
        self.no_server()
        return self.out()

    def no_server(self) -> None:
        wait_for(lambda: not psutil.pid_exists(self.pid()))
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", self.port)) != 0

    def pid(self) -> int:
        """The server's own number, as it says it first of all."""
        line = wait_for(lambda: next((x for x in self.log_lines() if x.startswith("pid ")), ""))
        return int(line.split()[1])

    def log_lines(self) -> list[str]:
        return self.log.read_text("utf-8").splitlines() if self.log.exists() else []


Run = Callable[..., Supervised]


@contextmanager
def supervised(
    folder: Path,
    *switches: str,
    ready_timeout: float,
    stop_timeout: float,
    ignore: int,
    guard: bool,
) -> Iterator[Supervised]:
    port, log = free_port(), folder / "logs" / "server.log"
    arguments = [str(SERVER), "--host", "127.0.0.1", "--port", str(port), *switches]
    question = json.dumps([port, str(log), ready_timeout, stop_timeout, guard, arguments])
    before = signal.signal(ignore, signal.SIG_IGN) if ignore else None  # inherited, as by nohup
    try:
        with (folder / "out").open("wb") as out, (folder / "err").open("wb") as err:
            process = subprocess.Popen(
                [sys.executable, "-c", SUPERVISOR, question],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            )
    finally:
        if ignore:
            signal.signal(ignore, before)
    run = Supervised(process, port, log, folder)
    try:
        yield run
    finally:
        children = []
        with suppress(psutil.Error):
            children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        for child in children:
            with suppress(psutil.Error):
                child.kill()


@pytest.fixture(params=[False, True], ids=["own port", "guarded port"])
def run(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Run]:
    from contextlib import ExitStack

    with ExitStack() as stack:

        def start(
            *switches: str, ready_timeout: float = 60, stop_timeout: float = 60, ignore: int = 0
        ) -> Supervised:
            folder = Path(tempfile.mkdtemp(dir=tmp_path))
            return stack.enter_context(
                supervised(
                    folder,
                    *switches,
                    ready_timeout=ready_timeout,
                    stop_timeout=stop_timeout,
                    ignore=ignore,
                    guard=request.param,
                )
            )

        yield start


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ready_and_stopped_by_a_signal(run: Run, number: int) -> None:
    server = run().ready()
    server.send(number)
    assert server.ended() == "ready\n"
    assert "ending on SIGTERM" in server.log_lines()
    assert server.err().endswith("stopped\n")


def test_ready_is_said_once_and_only_after_loading(run: Run) -> None:
    server = run("--ready-after", "2").ready()
    assert is_ready(stand_in(server.folder, "x", port=server.port)), "it answers 503 until then"
    wait_for(lambda: "model loaded" in server.log_lines())
    server.send(signal.SIGINT)
    assert server.ended() == "ready\n"


def test_stopped_while_loading(run: Run) -> None:
    server = run("--never-ready")
    server.until("still loading")
    server.send(signal.SIGTERM)
    assert server.ended() == ""


def test_a_second_signal_kills(run: Run) -> None:
    server = run("--ignore-term").ready()
    server.send(signal.SIGINT)
    server.until("SIGTERM is ignored")
    assert server.process.poll() is None
    server.send(signal.SIGINT)
    server.ended()
    assert "killing it" in server.err()


def test_the_end_of_the_grace_period_kills(run: Run) -> None:
    server = run("--ignore-term", stop_timeout=0.5).ready()
    server.send(signal.SIGTERM)
    server.ended()
    assert "SIGTERM is ignored" in server.log_lines()
    assert "killing it" in server.err()


def test_death_before_ready_shows_the_last_lines(run: Run) -> None:
    said = run("--exit", "7", "--lines", "100").ended(1)
    assert "ended before it was ready, exit status 7" in said
    assert "  | the last words\n" in said
    assert "  | line 99\n" in said
    assert "line 50\n" not in said
    assert "server.log" in said


def test_death_after_ready(run: Run) -> None:
    said = run("--exit", "3", "--after", "2").ended(1)
    assert said.startswith("ready\n")
    assert "ended after it was ready, exit status 3" in said


def test_a_normal_end_that_nobody_asked_for_is_an_error(run: Run) -> None:
    assert "exit status 0" in run("--exit", "0").ended(1)


def test_death_by_a_signal_is_named(run: Run) -> None:
    assert "killed by SIGABRT" in run("--die").ended(1)


def test_not_ready_in_time(run: Run) -> None:
    server = run("--never-ready", ready_timeout=1)
    said = server.ended(1)
    assert "not ready after 1 s" in said
    assert "| still loading" in said
    assert "ready_timeout=" in said


def test_a_program_that_cannot_be_started(tmp_path: Path) -> None:
    from pipeline.core.errors import PipelineError
    from pipeline.serve.server import Server
    from pipeline.serve.supervise import foreground

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    server = Server(
        name="none",
        executable=str(tmp_path / "none"),
        cmd=(),
        port=free_port(),
        log_file=str(tmp_path / "log"),
        folder=str(tmp_path),
    )
    with pytest.raises(PipelineError, match="cannot be started"):
        foreground(server, env={}, ready=print)
    assert {number: signal.getsignal(number) for number in before} == before


def test_many_lines_reach_the_log_whole(run: Run) -> None:
    server = run("--lines", "50000").ready()
    server.send(signal.SIGINT)
    server.ended()
    lines = [line for line in server.log_lines() if line.startswith("line ")]
    assert lines == [f"line {n}" for n in range(50_000)]


def test_output_without_a_newline_does_not_stop_the_server(run: Run) -> None:
    size = 4_000_000
    server = run("--no-newline", str(size)).ready()
    server.send(signal.SIGINT)
    server.ended()
    assert server.log.read_text("utf-8").count("x") == size


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's own guard")
def test_the_server_dies_with_a_killed_supervisor(run: Run) -> None:
    server = run("--ignore-term").ready()
    pid = server.pid()
    assert psutil.pid_exists(pid)
    server.send(signal.SIGKILL)
    assert server.process.wait(timeout=30) == -signal.SIGKILL
    server.no_server()


@pytest.mark.slow
def test_children_of_the_server_end_with_it(run: Run, tmp_path: Path) -> None:
    note = tmp_path / "grandchild"
    server = run("--grandchild", str(note)).ready()
    grandchild = psutil.Process(int(note.read_text()))
    try:
        server.send(signal.SIGINT)
        server.ended()
        gone, _ = psutil.wait_procs([grandchild], timeout=60)
        assert gone, "a child of the server is left behind"
    finally:
        with suppress(psutil.Error):
            grandchild.kill()


def test_nohup_is_respected(run: Run) -> None:
    """With SIGHUP ignored from the start, a closed terminal ends nothing."""
    server = run(ignore=signal.SIGHUP).ready()
    server.send(signal.SIGHUP)
    with suppress(subprocess.TimeoutExpired):
        server.process.wait(timeout=1)
    assert server.process.poll() is None, server.err()
    server.send(signal.SIGTERM)
    server.ended()
