from __future__ import annotations

import subprocess
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from core_tools import child, finish, line

from pipeline.core.store.locks import only_one

HOLD = """
import sys, time
from pathlib import Path
from pipeline.core.store.locks import only_one
with only_one(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


def held(target: Path) -> AbstractContextManager[subprocess.Popen[str]]:
    return child(HOLD, target, stdin=subprocess.PIPE)


def test_the_second_waits_and_says_so_once(tmp_path: Path) -> None:
    target = tmp_path / "new" / "größe"
    with held(target) as first:
        assert line(first) == "held"
        with held(target) as second:
            assert second.stderr is not None
            assert second.stderr.readline() == "another run is making größe; waiting for it\n"
            assert first.stdin is not None
            assert second.stdin is not None
            first.stdin.write("go\n")
            first.stdin.flush()
            assert line(second) == "held"
            assert finish(second) == ""


def test_a_lock_dies_with_its_holder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with held(tmp_path / "a") as process:
        assert line(process) == "held"
        process.kill()
        process.wait()
        with only_one(tmp_path / "a"):
            assert capsys.readouterr().err == ""


def test_a_lock_is_free_after_an_error_and_others_are_not_held(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RuntimeError), only_one(tmp_path / "a"), only_one(tmp_path / "b"):
        raise RuntimeError
    with only_one(tmp_path / "a"):
        pass
    assert capsys.readouterr().err == ""
