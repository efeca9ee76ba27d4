from __future__ import annotations

import errno
import os
import subprocess
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import pytest
from core_tools import NO_RENAMEAT2, child, finish, line
from disks import locks_that_do_not_work as locks_that_do_not_work

from pipeline.core.store.locks import alone_with, only_one, trouble

HOLD = """
import sys, time
from pathlib import Path
from pipeline.core.store.locks import alone_with, only_one, trouble
with only_one(Path(sys.argv[1]), *sys.argv[2:]):
    print("held", flush=True)
    sys.stdin.readline()
"""


def held(target: Path, *waiting: str) -> AbstractContextManager[subprocess.Popen[str]]:
    return child(HOLD, target, *waiting, stdin=subprocess.PIPE)


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


def test_the_second_says_what_it_waits_for(tmp_path: Path) -> None:
    with held(tmp_path / "a") as first:
        assert line(first) == "held"
        with held(tmp_path / "a", "another run measures; waiting") as second:
            assert second.stderr is not None
            assert second.stderr.readline() == "another run measures; waiting\n"
            second.kill()


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


MAKE = """
import sys, time
from pathlib import Path
from pipeline.core.store import artifacts, receipts
target, folder = Path(sys.argv[1]), Path(sys.argv[2])

def maker(made):
    with made.open("xb") as file:
        for _ in range(50):
            file.write(b"x" * 1000)
            file.flush()
            time.sleep(0.01)

print("ready", flush=True)
sys.stdin.readline()
artifacts.make(target, {"step": "test"}, maker)
with artifacts.locked_folder(folder):
    with artifacts.new_folder(folder) as made:
        made.mkdir()
        time.sleep(0.2)
        (made / "file").write_text("whole")
print(receipts.status(target, {"step": "test"}).name)
"""


TWO = """
import sys
from pathlib import Path
from pipeline.core.errors import PipelineError
from pipeline.core.store import artifacts, receipts
target = Path(sys.argv[1])

def other(made):
    made.write_text("other's")

def maker(made):
    if sys.argv[2] == "made":
        artifacts.make(target, {"step": "test"}, other)
    raise PipelineError("its input is gone")

force = sys.argv[2] == "force"
if force:
    artifacts.make(target, {"step": "test"}, other)
print(artifacts.make(target, {"step": "test"}, maker, force=force).size)
"""


@pytest.mark.usefixtures("locks_that_do_not_work")
def test_what_another_run_has_made_meanwhile_is_taken(tmp_path: Path) -> None:
    with child(TWO, tmp_path / "a", "made") as run:
        assert line(run) == "7"
    for how in ("not made", "force"):
        with child(TWO, tmp_path / how, how) as run:
            assert "its input is gone" in run.communicate()[1]
            assert run.returncode == 1


@pytest.mark.usefixtures("locks_that_do_not_work")
@pytest.mark.parametrize("kernel", ["", NO_RENAMEAT2])
def test_where_locks_do_not_work_each_run_makes_its_own_and_one_stays(
    tmp_path: Path, kernel: str
) -> None:
    target, folder = tmp_path / "a.gguf", tmp_path / "folder"
    left = tmp_path / ".a.gguf.0badcafe.part"
    left.touch()
    os.utime(left, (0, 0))
    (tmp_path / ".a.gguf.lock").touch()  # of a killed run
    with ExitStack() as runs:
        makers = [
            runs.enter_context(child(kernel + MAKE, target, folder, stdin=subprocess.PIPE))
            for _ in range(4)
        ]
        for maker in makers:
            assert line(maker) == "ready"
        for maker in makers:
            assert maker.stdin is not None
            maker.stdin.write("go\n")
            maker.stdin.flush()
        for maker in makers:
            out, err = maker.communicate(timeout=60)
            assert maker.returncode == 0, err
            assert err.count("locks do not work on this disk") == 1
            assert out.split() in (["CURRENT"], ["MOVED"])  # by the last one, of the same bytes
    assert target.read_bytes() == b"x" * 50_000
    assert (folder / "file").read_text() == "whole"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *(".a.gguf.lock", ".state.json", "a.gguf", "folder")
    ]


@pytest.mark.skipif(os.name == "nt", reason="flock")
def test_a_lock_that_fails_later_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk's locks worked when it was tried; now the server that keeps them is gone."""
    import fcntl

    def fails(file: int, what: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    assert trouble(tmp_path) == ""
    monkeypatch.setattr(fcntl, "flock", fails)
    for take in (only_one, alone_with):
        with pytest.raises(OSError, match="No locks") as caught, take(tmp_path / "a"):
            pass
        assert str(caught.value.filename).startswith(str(tmp_path))
