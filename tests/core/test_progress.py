from __future__ import annotations

import contextlib
import os
import subprocess
import sys

import pytest
from core_tools import REPOSITORY

from pipeline.core.progress import bar


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


@pytest.mark.skipif(sys.platform != "linux", reason="ptys end with an error on Linux only")
def test_a_bar_on_a_terminal() -> None:
    script = """
import time
from pipeline.core.progress import bar
with bar("building") as update:
    update(30, 60)
    time.sleep(0.3)
"""
    master, slave = os.openpty()
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TERM": "xterm", "COLUMNS": "80"}
    with subprocess.Popen([sys.executable, "-c", script], stderr=slave, env=env) as process:
        os.close(slave)
        told = b""
        with contextlib.suppress(OSError):  # at the end
            while chunk := os.read(master, 4096):
                told += chunk
        os.close(master)
    assert process.returncode == 0
    assert b"building" in told
    assert b"50%" in told
