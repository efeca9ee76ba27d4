"""A program on our terminal that is asked to stop: it ends in its own time, within bounds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY, wait_for

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM")

# Takes a second to end, longer than the quarter of one that subprocess.run leaves it.
PROGRAM = """
import os, pathlib, signal, sys, time

def end(number, frame):
    time.sleep(1)
    pathlib.Path("ended").touch()
    sys.exit(int(sys.argv[2]))

if sys.argv[1] == "alone":
    os.setpgrp()  # as Ray does on macOS
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN if sys.argv[1] == "deaf" else end)
pathlib.Path("begun").touch()
time.sleep(60)
"""
RUN = """
import os, sys
from pipeline.core.errors import PipelineError
from pipeline.serve import stopping
from pipeline.tasks.doit import interrupt_on_termination

interrupt_on_termination()
try:
    stopping.run_attached([sys.executable, "-c", *sys.argv[1:]], env=os.environ, patience=2)
except PipelineError as error:
    sys.exit(error.message)
"""


def begin(folder: Path, *words: str, stdin: int | None = None) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", RUN, PROGRAM, *words]
    process = subprocess.Popen(
        command, cwd=folder, env=env, stdin=stdin, stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: (folder / "begun").exists() or process.poll() is not None)
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("way", ["together", "alone"])
def test_it_ends_in_its_own_time(tmp_path: Path, number: int, way: str) -> None:
    with begin(tmp_path, way, "0") as process:
        process.send_signal(number)
        assert process.wait(timeout=60) == 0
    assert (tmp_path / "ended").exists()


def test_ctrl_c_of_a_terminal_reaches_one_that_left_our_group(tmp_path: Path) -> None:
    master, slave = os.openpty()
    with begin(tmp_path, "alone", "0", stdin=slave) as process:
        process.send_signal(signal.SIGINT)  # the terminal sends it to our group
        assert process.wait(timeout=60) == 0
    for end in (master, slave):
        os.close(end)
    assert (tmp_path / "ended").exists()


def test_one_that_does_not_is_killed(tmp_path: Path) -> None:
    with begin(tmp_path, "deaf", "0") as process:
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
    assert time.monotonic() - began < 50
    assert not (tmp_path / "ended").exists()


def test_one_that_fails_by_itself_is_an_error(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", RUN, "import sys; sys.exit(3)"]
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 1 and "ended with 3" in run.stderr
