"""Runs under way, seen by those who remove files."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest
from core_tools import child, line

from pipeline.core.store import active, json_file

RUN = """
import sys
from pathlib import Path
from pipeline.core.store import active
active.begin(Path(sys.argv[1]))
print("begun", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run ü"


@pytest.mark.parametrize("seconds", [0, 86400, -86400])
def test_a_run_is_seen_whatever_the_clock_says(
    folder: Path, monkeypatch: pytest.MonkeyPatch, seconds: int
) -> None:
    """Linux reckons when a process began from the present clock."""
    began = psutil.Process.create_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: began(self) + seconds)
    with child(RUN, folder, stdin=subprocess.PIPE) as run:
        assert line(run) == "begun"
        assert len(active.others(folder)) == 1
        run.kill()
        run.wait()
        assert active.others(folder) == []


def test_one_that_has_only_the_number_is_another(folder: Path) -> None:
    """As after a restart of the machine, or in a container."""
    file = folder / "active" / f"{os.getppid()}.json"
    json_file.write_private(file, {"command": "prepare", "files": None, "began": "1"})
    if Path("/proc/self/stat").exists():
        assert active.others(folder) == []


def test_one_that_ends_while_it_is_read_is_not_listed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = folder / "active" / f"{os.getppid()}.json"
    json_file.write_private(file, {"command": "prepare", "files": None})
    assert [run.command for run in active.others(folder)] == ["prepare"]
    file.write_text("{")
    assert [run.command for run in active.others(folder)] == ["a run that cannot be read"]
    read = json_file.read

    def ends(path: Path, parse: Any) -> Any:
        path.unlink(missing_ok=True)
        return read(path, parse)

    monkeypatch.setattr(active, "_is_alive", lambda file: True)
    monkeypatch.setattr(json_file, "read", ends)
    assert active.others(folder) == []


def test_a_removal_leaves_what_a_run_is_writing(folder: Path) -> None:
    (folder / "active").mkdir(parents=True)
    mine, dead = (folder / "active" / f".{pid}.json.part" for pid in (os.getppid(), 2**22 - 7))
    for path in (mine, dead):
        path.touch()
    with active.removing(folder):
        assert mine.exists() and not dead.exists()
