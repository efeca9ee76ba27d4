from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys

import pytest
from conftest import REPOSITORY

from pipeline.core.progress import AS_JSON, TransferRate, bar, duration, transfer


def test_a_line_at_every_tenth_where_nobody_watches(capsys: pytest.CaptureFixture[str]) -> None:
    with bar("building") as update:
        for done in range(201):
            update(done, 200)
    assert capsys.readouterr().err.splitlines() == [
        f"building: {percent} %" for percent in range(10, 101, 10)
    ]


def test_an_unknown_total_and_a_step_back_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with bar("building") as update:
        update(1, 0)
        update(95, 100)
        update(10, 100)
        update(96, 100)
    assert capsys.readouterr().err == "building: 90 %\n"


def test_a_transfer_tells_speed_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    with transfer("fetching", 1000, patience=0) as count:
        count(200, arrived=False)
        count(150)
        count(-150, arrived=False)  # it proved wrong
        count(150)
        count(650)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "fetching: 20 %"
    assert lines[1].startswith("fetching: 30 %, ")
    assert lines[1].endswith(" left")
    assert lines[2].startswith("fetching: 100 %, ")
    assert lines[2].endswith("/s")
    assert len(lines) == 3


def test_a_transfer_that_is_over_in_a_moment_says_so_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with transfer("fetching", 1000) as count:
        for _ in range(10):
            count(100)
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("fetching: 100 %")


def test_a_program_reads_the_figures_of_a_transfer(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(AS_JSON, "1")
    with transfer("fetching", 1000, digest="ab") as count:
        for _ in range(10):
            count(100)
    first, *_, last = map(json.loads, capsys.readouterr().err.splitlines())
    assert first == {"done": 100, "total": 1000, "digest": "ab"}
    assert last == {"done": 1000, "total": 1000, "digest": "ab"}


def test_the_speed_is_that_of_what_arrived_lately() -> None:
    now = 0.0
    pace = TransferRate(100_000, clock=lambda: now)
    assert pace.summary("0 %") == "0 %"
    pace.count(40_000, arrived=False)
    for _ in range(30):
        now += 1
        pace.count(1000, arrived=True)
    assert pace.summary("70 %") == "70 %, 1.0 kB/s, 30 s left"
    for _ in range(30):
        now += 1
        pace.count(100, arrived=True)
    assert pace.summary("73 %") == "73 %, 100 B/s, 4 min 30 s left"
    now += 10_000  # nothing came
    assert pace.summary("73 %") == "73 %"


def test_how_long_is_written() -> None:
    output = [duration(seconds) for seconds in (0.4, 45, 59.6, 130, 3600, 11_100)]
    assert output == ["0 s", "45 s", "1 min 0 s", "2 min 10 s", "1 h 0 min", "3 h 5 min"]


@pytest.mark.skipif(sys.platform != "linux", reason="ptys end with an error on Linux only")
def test_a_bar_on_a_terminal() -> None:
    output = on_a_terminal("""
import time
from pipeline.core.progress import bar
with bar("building") as update:
    update(30, 60)
    time.sleep(0.3)
""")
    assert b"building" in output
    assert re.search(rb"50 %, \d+ s", output)


@pytest.mark.skipif(sys.platform != "linux", reason="ptys end with an error on Linux only")
def test_a_transfer_on_a_terminal() -> None:
    output = on_a_terminal("""
import time
from pipeline.core.progress import transfer
with transfer("fetching", 10_000_000) as count:
    time.sleep(0.1)
    count(5_000_000)
    time.sleep(0.3)
""")
    assert b"fetching" in output
    assert b"5.0 MB of 10.0 MB, " in output
    assert b"MB/s, " in output
    assert b" s left" in output


@pytest.mark.skipif(sys.platform != "linux", reason="ptys end with an error on Linux only")
def test_two_bars_at_once_on_a_terminal() -> None:
    output = on_a_terminal("""
import time
from pipeline.core.parallel import Background
from pipeline.core.progress import bar, transfer
def fetch():
    with transfer("fetching", 10_000_000) as count:
        count(5_000_000)
        time.sleep(0.6)
with bar("building") as update:
    background = Background(fetch)
    update(30, 60)
    time.sleep(0.4)
    background.wait()
print("after", file=__import__("sys").stderr)
""")
    screen = output.replace(b"\r", b"").split(b"\n")
    assert any(b"building" in line for line in screen)
    assert any(b"5.0 MB of 10.0 MB" in line for line in screen)
    assert b"after" in screen[-2]


def on_a_terminal(script: str) -> bytes:
    """What a Python script writes to its terminal."""
    master, slave = os.openpty()
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TERM": "xterm", "COLUMNS": "80"}
    with subprocess.Popen([sys.executable, "-c", script], stderr=slave, env=env) as process:
        os.close(slave)
        output = b""
        with contextlib.suppress(OSError):  # at the end
            while chunk := os.read(master, 4096):
                output += chunk
        os.close(master)
    assert process.returncode == 0
    return output
