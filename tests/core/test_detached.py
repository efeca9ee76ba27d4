"""Programs that outlive the one that started them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from conftest import wait_for
from core_tools import child
from supervisor_tools import lives

from pipeline.core import process
from pipeline.core.errors import PipelineError
from pipeline.core.process import stop

STARTER = """
import os, sys
from pathlib import Path
from pipeline.core.process import start_detached

script = "import sys, time; print(len(sys.stdin.read()), flush=True); time.sleep(60)"
words = [sys.executable, "-c", script]
log = Path(sys.argv[1])
begun = start_detached(words, log=log, env=dict(os.environ), cwd=log.parent, tied=True)
print(begun.pid, flush=True)
sys.stdin.readline()
"""


@pytest.mark.skipif(os.name == "nt", reason="sessions of POSIX")
def test_it_outlives_us_and_hears_of_our_end(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with child(STARTER, log, stdin=-1) as starter:
        assert starter.stdout
        pid = int(starter.stdout.readline())
        try:
            assert os.getsid(pid) == pid
            assert log.stat().st_mode & 0o777 == 0o600
            assert log.read_text() == ""
            starter.kill()
            starter.wait()
            wait_for(lambda: log.read_text() == "0\n")
            assert lives(pid)
        finally:
            os.kill(pid, 9)


def test_its_end_is_noticed_without_asking(tmp_path: Path) -> None:
    words = [sys.executable, "-c", "print('done')"]
    log, env = tmp_path / "log", dict(os.environ)
    begun = process.start_detached(words, log=log, env=env, cwd=tmp_path)
    wait_for(lambda: begun.poll() == 0)
    begun = process.start_detached(words, log=log, env=env, cwd=tmp_path)
    wait_for(lambda: begun.poll() == 0)
    assert log.read_text().split() == ["done", "done"]


@pytest.mark.skipif(os.name == "nt", reason="sessions of POSIX")
def test_who_holds_the_pipe_does_not_hold_us(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "LEFT_SECONDS", 0.2)
    words = "print('said', flush=True); import time; time.sleep(60)"
    script = "import subprocess, sys; print(subprocess.Popen(sys.argv[1:], "
    script += "start_new_session=True).pid, flush=True)"
    argv = [sys.executable, "-c", script, sys.executable, "-c", words]
    with stop.running(lambda: process.start(argv, own_group=True)) as begun:
        begun.wait()
        pid, *said = process.lines_of(begun)
        try:
            assert said in (["said"], [])
            assert lives(int(pid))
        finally:
            os.kill(int(pid), 9)


def test_what_cannot_be_started(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="cannot be started"):
        process.start_detached([tmp_path / "none"], log=tmp_path / "log", env={}, cwd=tmp_path)


@pytest.mark.parametrize("name", ["", "no/log"])
def test_a_log_that_cannot_be_written_is_named(tmp_path: Path, name: str) -> None:
    """Not the program, which is innocent."""
    log = tmp_path / name
    with pytest.raises(PipelineError, match="cannot be written") as caught:
        process.start_detached([sys.executable], log=log, env={}, cwd=tmp_path)
    assert caught.value.message.startswith(f"{log}: ") and "disk" in caught.value.hint
