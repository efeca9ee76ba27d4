"""Logs that are begun anew, and read meanwhile."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing, suppress
from pathlib import Path

import pytest
from conftest import REPOSITORY, wait_for
from disks import disk

from pipeline.core.errors import PipelineError
from pipeline.serve.logfile import KEPT, LOOK_SECONDS, Log, lines, set_aside, trouble

FOLLOW = """
import sys
from pathlib import Path
from pipeline.serve.logfile import lines
for line in lines(Path(sys.argv[1]), 2, follow=True):
    print(line, flush=True)
print("the end", flush=True)
"""


def earlier(path: Path) -> list[Path]:
    """The logs set aside, oldest first."""
    files = path.parent.glob(f"{path.stem}.*{path.suffix}")
    return sorted(files, key=lambda file: [int(number) for number in re.findall(r"\d+", file.name)])


def numbers(path: Path) -> list[str]:
    return path.read_text("utf-8").splitlines()


def test_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "new" / "größe.log"
    log = Log(path, 30)
    for number in range(20):
        log(f"line {number:02}")  # 8 bytes each: three fit
    log.close()
    assert len(earlier(path)) == KEPT
    assert numbers(path) == ["line 18", "line 19"]
    assert numbers(earlier(path)[-1]) == ["line 15", "line 16", "line 17"]
    log("x" * 100)
    log("after")
    log.close()
    assert numbers(path) == ["after"]
    assert earlier(path)[-1].read_text() == "x" * 100 + "\n"
    assert len(earlier(path)) == KEPT


def test_the_log_of_the_run_before_is_kept_under_its_date(tmp_path: Path) -> None:
    path = tmp_path / "serve-8080.log"
    set_aside(path)  # none yet
    for run in range(KEPT + 2):
        path.write_text(f"run {run}\n")
        day = time.mktime((2026, 11, 1 + run, 6, 20, 11, 0, 0, -1))
        os.utime(path, (day, day))
        set_aside(path)
        assert not path.exists()
    assert [one.name for one in earlier(path)] == [
        f"serve-8080.2026-11-{1 + run:02}T06-20-11.log" for run in range(2, KEPT + 2)
    ]
    path.write_text("run 7\n")
    os.utime(path, (day, day))
    set_aside(path)
    assert earlier(path)[-1].name == "serve-8080.2026-11-07T06-20-11-2.log", "nothing is lost"
    assert list(lines(path, 2)) == ["run 6", "run 7"], "before the first line of the next run"
    path.write_text("this run\n")
    assert list(lines(path, 3)) == ["run 6", "run 7", "this run"]


@pytest.mark.skipif(os.name == "nt", reason="links of POSIX")
def test_what_is_no_file_is_not_renamed(tmp_path: Path) -> None:
    device, empty, other = tmp_path / "a.log", tmp_path / "b.log", tmp_path / "c.log"
    device.symlink_to("/dev/null")
    empty.touch()
    other.write_text("of another server\n")
    for path in (device, empty, tmp_path / "missing" / "d.log"):
        set_aside(path)
    assert {one.name for one in tmp_path.iterdir()} == {"a.log", "b.log", "c.log"}


@pytest.mark.skipif(os.name == "nt", reason="links and devices of POSIX")
def test_what_cannot_take_a_log_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    os.mkfifo(tmp_path / "pipe")
    for name, target in (("out", "/dev/stdout"), ("null", "/dev/null"), ("loop", "loop")):
        (tmp_path / name).symlink_to(target)
    (tmp_path / "again").symlink_to("out")
    (tmp_path / "gone").symlink_to("none/a.log")
    (tmp_path / "to a pipe").symlink_to("pipe")
    with socket.socket(socket.AF_UNIX) as made:
        monkeypatch.chdir(tmp_path)  # the name of a socket must be short
        made.bind("socket")
    before = sorted(tmp_path.iterdir())
    for name, why in (
        ("folder", "is a folder, not a file"),
        ("pipe", "is a pipe, not a file"),
        ("to a pipe", "is a pipe, not a file"),
        ("socket", "is a socket, not a file"),
        ("null", "is a device, not a file"),
        ("/dev/full", "is a device, not a file"),
        ("out", "is a stream of whoever opens it, not a file"),
        ("again", "is a stream of whoever opens it, not a file"),
        ("/dev/stderr", "is a stream of whoever opens it, not a file"),
        ("file/a.log", "is a file, not a folder"),
        ("null/a.log", "is a device, not a folder"),
        ("loop", "Too many levels of symbolic links"),
    ):
        assert why in trouble(tmp_path / name), name
    for name in ("file", "new.log", "new/folder/a.log"):
        assert trouble(tmp_path / name) == ""
    assert sorted(tmp_path.iterdir()) == before


def test_a_disk_that_takes_no_log_is_named(tmp_path: Path) -> None:
    with disk(tmp_path / "disk", "size=1m") as remount:
        there, new = tmp_path / "disk" / "a.log", tmp_path / "disk" / "new" / "b.log"
        there.write_text("x")
        with suppress(OSError):
            (tmp_path / "disk" / "big").write_bytes(b"x" * 1_100_000)
        assert "No space left on device" in trouble(there)
        assert "No space left on device" in trouble(new)
        (tmp_path / "disk" / "big").unlink()
        assert (trouble(there), trouble(new)) == ("", "")
        remount("ro")
        assert "Read-only file system" in trouble(there)
        assert "Read-only file system" in trouble(new)


@pytest.mark.skipif(os.name == "nt", reason="links and pipes of POSIX")
def test_a_link_stays_one_and_a_pipe_is_not_waited_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "pipe")
    with closing(Log(tmp_path / "pipe")) as log:
        log("lost")
    assert f"{tmp_path / 'pipe'}: 1 lines could not be written" in capsys.readouterr().err
    (tmp_path / "a.log").symlink_to("real.log")
    with closing(Log(tmp_path / "a.log", 30)) as log:
        for number in range(4):
            log(f"line {number:02}")
    set_aside(tmp_path / "a.log")
    assert (tmp_path / "a.log").is_symlink() and not (tmp_path / "a.log").exists()
    assert list(lines(tmp_path / "a.log", 9)) == [f"line {number:02}" for number in range(4)]


def test_it_goes_on_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    path.write_text("x" * 95 + "\n")
    with closing(Log(path, 100)) as log:
        log("more")
    assert numbers(path) == ["more"]
    with closing(Log(path, 100)) as log:
        log("and more")
    assert numbers(path) == ["more", "and more"]


@pytest.mark.skipif(os.name == "nt", reason="an open file stays")
def test_one_that_is_deleted_or_moved_away_is_begun_anew(tmp_path: Path) -> None:
    """Else a server that runs for months would write where nobody finds it."""
    path = tmp_path / "logs" / "a.log"
    log = Log(path)
    log("one")
    path.unlink()
    log("two")
    assert numbers(path) == ["two"]
    path.rename(tmp_path / "moved.log")
    log("three")
    assert numbers(path) == ["three"]
    path.unlink()
    path.parent.rmdir()
    log("four")
    assert not path.parent.exists(), "a configuration whose folder is removed ends"
    log.close()


def test_what_could_not_be_written_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "folder" / "a.log"
    path.parent.write_text("a file where a folder should be")
    with closing(Log(path, 1000)) as log:
        for number in range(3):
            log(f"line {number}")
        path.parent.unlink()
        log("line 3")
    assert numbers(path) == ["[3 lines could not be written]", "line 3"]
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"warning: {path}: ") and said.endswith("lost meanwhile")


def test_half_a_line_is_none(tmp_path: Path) -> None:
    with disk(tmp_path / "disk", "size=64k"):
        path, big = tmp_path / "disk" / "a.log", tmp_path / "disk" / "big"
        with closing(Log(path)) as log:
            log("first")
            big.write_bytes(b"x" * 40_000)
            log("y" * 60_000)
            big.unlink()
            log("last")
        assert numbers(path) == ["first", "[1 lines could not be written]", "last"]


def test_the_last_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    with pytest.raises(PipelineError, match="no log yet"):
        list(lines(path, 10))
    log = Log(path, 30)
    for number in range(8):
        log(f"line {number:02}")
    log("\u2028 is no end of a line")
    log.close()
    assert list(lines(path, 2)) == ["line 07", "\u2028 is no end of a line"]
    assert list(lines(path, 6))[:1] == ["line 03"], "those of the older log too"
    assert len(list(lines(path, 100))) == 9
    assert list(lines(path, 0)) == []


def test_following(tmp_path: Path) -> None:
    """No line is lost or told twice while the log is begun anew again and again."""
    path, heard, over = tmp_path / "a.log", list[str](), threading.Event()

    def follow() -> None:
        heard.extend(lines(path, 5, follow=True, over=over.is_set))

    thread = threading.Thread(target=follow)
    thread.start()  # before there is a log
    log = Log(path, 5000)
    for number in range(2000):
        log(f"line {number}")
        if number % 200 == 0:
            threading.Event().wait(LOOK_SECONDS * 1.5)
    log.close()
    over.set()
    thread.join(30)
    assert heard == [f"line {number}" for number in range(2000)]


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_following_ends_with_ctrl_c(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    path.write_text("one\ntwo\nthree\nhal")
    with (
        (tmp_path / "out").open("w") as out,
        subprocess.Popen(
            [sys.executable, "-c", FOLLOW, str(path)],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            stdout=out,
            stderr=subprocess.PIPE,
            text=True,
        ) as process,
    ):
        wait_for(lambda: (tmp_path / "out").read_text() == "two\nthree\n")
        with path.open("a") as file:
            file.write("f\n")
        wait_for(lambda: (tmp_path / "out").read_text() == "two\nthree\nhalf\n")
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
        assert process.stderr and process.stderr.read() == ""
    assert numbers(tmp_path / "out")[-1] == "the end"
