"""What a killed run has left is gone once another one begins."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY
from disks import disk

from pipeline.commands import leftovers
from pipeline.core.paths import Home
from pipeline.core.store import active
from pipeline.core.store.locks import only_one
from pipeline.models import on_disk

FILES = (
    "models/gguf/a/..state.json.part",
    "models/gguf/a/.m.gguf.part",
    "models/gguf/a/.m.gguf.part.in/input",
    "models/gguf/a/.gone.gguf.part.pieces",
    "bins/.package.part/file",
    "bins/.source/.llama.cpp-0123456789ab.part.tar",
    "run/.sha256.json.part",
    "run/active/.1.json.part",
)
STAY = (
    "models/gguf/a/.d.gguf.part",  # a download that goes on
    "models/gguf/a/.d.gguf.part.pieces",
    "bins/.mine.old/file",  # the only one there is
    "models/gguf/a/.notes",
)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setenv("LLAMA_PIPELINE_CACHE", str(tmp_path / "cache"))
    home = Home(tmp_path / "hôme")
    for name in (*FILES, *STAY):
        (home.root / name).parent.mkdir(parents=True, exist_ok=True)
        (home.root / name).write_text("x")
    return home


def leave_record(home: Home) -> Path:
    """As a killed run does."""
    record = home.run / "active" / "1.json"
    record.write_text('{"command": "prepare"}')
    os.utime(record, (0, 0))  # before the process of that number began
    os.utime(home.run / "active" / ".1.json.part", (0, 0))
    return record


def there(home: Home) -> set[str]:
    paths = (path for path in home.root.rglob("*") if path.is_file())
    return {str(path.relative_to(home.root)) for path in paths if path.suffix != ".lock"}


def test_on_another_disk_too(home: Home, tmp_path: Path) -> None:
    far = tmp_path / "far"
    (home.models / "gguf" / "a").rename(far)
    (home.models / "gguf" / "a").symlink_to(far, target_is_directory=True)
    leave_record(home)
    leftovers.begin(home)
    left = {path.name for path in far.iterdir() if path.suffix != ".lock"}
    assert left == {Path(name).name for name in STAY if "gguf/a" in name}


def test_it_is_cleared_once(home: Home) -> None:
    (home.run / "active" / ".1.json.part").unlink()
    leftovers.clear(home)
    assert there(home) >= {*STAY, *FILES[:-1]}, "no run was killed"
    (home.run / "active" / ".1.json.part").write_text("x")
    leave_record(home)
    leftovers.clear(home)
    assert there(home) == {*STAY[:2], "bins/mine/file", STAY[3]}


def test_what_another_run_makes_stays(home: Home) -> None:
    record = leave_record(home)
    code = (
        "import sys; from pathlib import Path; from pipeline.core.store.locks import only_one\n"
        "with only_one(Path(sys.argv[1])):\n    print('held', flush=True); sys.stdin.read()"
    )
    words = [sys.executable, "-c", code, home.models / "gguf" / "a" / "m.gguf"]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, cwd=REPOSITORY, stdin=pipe, stdout=pipe) as other:
        assert other.stdout and other.stdout.readline()
        leftovers.clear(home)
        other.communicate()
    assert there(home) >= {"models/gguf/a/.m.gguf.part", "models/gguf/a/.m.gguf.part.in/input"}
    assert not record.exists()
    with only_one(home.models / "gguf" / "a" / "m.gguf"):
        pass


def test_a_living_run_is_no_killed_one(home: Home) -> None:
    leave_record(home).unlink()
    (home.run / "active" / ".1.json.part").unlink()
    (home.run / "active" / f"{os.getppid()}.json").write_text("{}")
    assert active.killed(home.run) == []


def test_a_folder_without_its_model(home: Home) -> None:
    empty = home.models / "source" / "b"
    empty.mkdir(parents=True)
    (empty / ".m.lock").touch()
    assert list(on_disk.empty(home)) == [empty]


def test_a_run_on_a_disk_that_became_read_only_ends_quietly(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from pipeline.core.store import active\n"
        "active.begin(Path(sys.argv[1])); print('begun', flush=True); sys.stdin.read()"
    )
    with disk(tmp_path / "disk", "size=1m") as remount:
        words = [sys.executable, "-c", code, tmp_path / "disk"]
        pipe = subprocess.PIPE
        with subprocess.Popen(words, cwd=REPOSITORY, stdin=pipe, stdout=pipe, stderr=pipe) as run:
            assert run.stdout and run.stdout.readline()
            remount("ro")
            assert run.communicate()[1] == b""
