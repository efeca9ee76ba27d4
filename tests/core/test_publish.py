from __future__ import annotations

import errno
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from core_tools import NO_RENAMEAT2, child, finish, line, names
from disks import disk
from kills import Kills

from pipeline.core.errors import PipelineError
from pipeline.core.store import publish

linux = pytest.mark.skipif(sys.platform != "linux", reason="as Linux does it")
seccomp = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"),
    reason="needs a system call filter for this machine",
)


def folder(path: Path, content: str) -> Path:
    (path / "sub").mkdir(parents=True)
    (path / "a").write_text(content)
    (path / "sub" / "b").write_text(content)
    (path / "link").symlink_to("a")
    return path


def content(path: Path) -> set[str]:
    return {(path / name).read_text() for name in ("a", "sub/b", "link")}


@pytest.mark.parametrize("there_before", [False, True])
def test_a_folder_takes_the_place_of_another(tmp_path: Path, there_before: bool) -> None:
    target = tmp_path / "bins"
    if there_before:
        folder(target, "old")
        (target / "only in old").touch()
    made = folder(publish.part(target), "new")
    publish.publish_folder(made, target)
    assert content(target) == {"new"}
    assert names(target) == ["a", "link", "sub"]
    assert names(tmp_path) == ["bins"]


def test_a_text_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "größe.json"
    for text in ("one: ü\n", "two"):
        publish.publish_text(target, text)
        assert target.read_bytes() == text.encode()
    with pytest.raises(UnicodeEncodeError):
        publish.publish_text(target, "a lone half \ud800")
    assert target.read_text() == "two"
    assert names(tmp_path) == ["größe.json"]


@linux
def test_what_a_killed_process_left_beside_a_file_goes(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as running:
        (tmp_path / f".page.html.{running.pid}.part").touch()
        (tmp_path / ".page.html.2147483647.part").touch()  # more than the system gives
        (tmp_path / ".page.html.old.part").touch()  # of somebody else
        publish.publish_beside(tmp_path / "page.html", b"x")
        running.kill()
    assert names(tmp_path) == [f".page.html.{running.pid}.part", ".page.html.old.part", "page.html"]


def test_no_reader_ever_sees_it_missing(tmp_path: Path) -> None:
    target, done, looks, missed = folder(tmp_path / "bins", "old"), threading.Event(), 0, 0

    def look() -> None:
        nonlocal looks, missed
        while not done.is_set():
            looks += 1
            missed += not os.path.lexists(target)

    reader = threading.Thread(target=look)
    reader.start()
    for i in range(100):
        publish.publish_folder(folder(publish.part(target), str(i)), target)
    done.set()
    reader.join()
    assert missed == 0
    assert looks > 100
    assert content(target) == {"99"}


@seccomp
def test_where_no_exchange_exists_two_renames_do_it(tmp_path: Path) -> None:
    target = folder(tmp_path / "bins", "old")
    folder(publish.part(target), "new")
    script = f"""{NO_RENAMEAT2}
import sys
import tempfile
from pathlib import Path
from pipeline.core.store import publish
target = Path(sys.argv[1])
assert not publish._exchange(publish.part(target), target)
publish.publish_folder(publish.part(target), target)
"""
    with child(script, target) as process:
        finish(process)
    assert content(target) == {"new"}
    assert names(tmp_path) == ["bins"]


@pytest.mark.parametrize(
    ("left", "expected"),
    [
        (["old aside", "new part"], "old"),  # cut between the two renames
        (["old aside"], "old"),
        (["old aside", "new there"], "new"),  # cut before the old one was removed
        (["new there"], "new"),
        ([], None),
    ],
)
def test_what_a_cut_left_is_finished_or_undone(
    tmp_path: Path, left: list[str], expected: str | None
) -> None:
    target = tmp_path / "bins"
    places = {"aside": tmp_path / ".bins.old", "part": publish.part(target), "there": target}
    for what in left:
        version, place = what.split()
        folder(places[place], version)
    publish.recover_folder(target)
    assert not places["aside"].exists()
    assert (content(target) if target.exists() else None) == ({expected} if expected else None)


FOREVER = """
import sys
import tempfile
from itertools import count
from pathlib import Path
from pipeline.core.store import publish
target = Path(sys.argv[1])
print("ready", flush=True)
for version in count(int(sys.argv[2])):
    publish.recover_folder(target)
    made = publish.part(target)
    publish.remove(made)
    made.mkdir()
    for name in "abc":
        (made / name).write_text(str(version))
    publish.publish_folder(made, target)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "old_kernel", [pytest.param(False, marks=linux), pytest.param(True, marks=seccomp)]
)
def test_killed_at_any_instant_a_whole_folder_stands(tmp_path: Path, old_kernel: bool) -> None:
    target, seen = tmp_path / "bins", set()
    kills = Kills(10, 0.1, lambda: len(seen) > 3)
    for number in kills:
        start = number * 100_000
        with child(NO_RENAMEAT2 * old_kernel + FOREVER, target, start) as process:
            assert line(process) == "ready"
            kills.wait()
            process.kill()
        publish.recover_folder(target)
        if seen or target.exists():
            (version,) = {(target / name).read_text() for name in "abc"}
            seen.add(version)


def test_a_file_takes_the_place_of_another(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    publish.part(tmp_path / "a").write_text("new")
    publish.publish_file(publish.part(tmp_path / "a"), tmp_path / "a")
    assert (tmp_path / "a").read_text() == "new"
    assert names(tmp_path) == ["a"]


def test_space(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    publish.require_space(tmp_path / "new" / "folder", 1000)
    assert (tmp_path / "new" / "folder").is_dir()
    with pytest.raises(PipelineError, match=r"GB are needed there") as caught:
        publish.require_space(tmp_path, free)  # the spare room does not fit
    assert str(tmp_path) in caught.value.message
    assert "LLAMA_PIPELINE_HOME (for the cache LLAMA_PIPELINE_CACHE)" in caught.value.hint


def test_remove(tmp_path: Path) -> None:
    kept = folder(tmp_path / "kept", "x")
    (tmp_path / "link").symlink_to(kept)
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "file").touch()
    folder(tmp_path / "folder", "x")
    for name in ("link", "dangling", "file", "folder", "nothing"):
        publish.remove(tmp_path / name)
    assert names(tmp_path) == ["kept"]
    assert content(kept) == {"x"}


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "disk full; the unfinished"),
        (errno.EDQUOT, "disk quota exceeded; the unfinished"),
        (errno.EIO, "Input/output error; the unfinished"),
        (errno.EROFS, "Read-only"),
        (errno.EACCES, "denied"),
    ],
)
def test_errors_of_the_disk_are_said_plainly(tmp_path: Path, number: int, message: str) -> None:
    with (
        pytest.raises(PipelineError, match=message) as caught,
        publish.disk_errors(tmp_path),
    ):
        raise OSError(number, os.strerror(number))
    assert str(tmp_path) in caught.value.message
    assert caught.value.hint


def test_the_hint_names_what_chose_the_folder(tmp_path: Path) -> None:
    with (
        pytest.raises(PipelineError) as caught,
        publish.disk_errors(tmp_path, "llamacpp.model_root"),
    ):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))
    assert caught.value.hint == "set llamacpp.model_root to a folder that you may write to"


@pytest.mark.parametrize("name", ["gguf", "gguf/model"])
def test_a_link_to_a_disk_that_is_not_there_is_named(tmp_path: Path, name: str) -> None:
    link = tmp_path / "gguf"
    link.symlink_to(tmp_path / "gone")
    with pytest.raises(FileExistsError) as caught:
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
    said = publish.described(caught.value, tmp_path)
    assert said.startswith(f"{link}: is a link to {tmp_path / 'gone'}") and "mount" in said


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Not a directory"), publish.disk_errors(tmp_path):
        raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    assert publish.described(OSError(errno.ENOTDIR, "no"), tmp_path) == "the system: no"


def test_an_error_that_names_no_whole_path_is_said_with_the_folder(tmp_path: Path) -> None:
    """As what removes a folder raises it."""
    error = OSError(errno.EROFS, os.strerror(errno.EROFS), "README.md")
    with pytest.raises(PipelineError, match="Read-only") as caught, publish.disk_errors(tmp_path):
        raise error
    assert str(tmp_path) in caught.value.message
    assert str(tmp_path) in publish.described(error, tmp_path)
    elsewhere = OSError(errno.EIO, os.strerror(errno.EIO), "/elsewhere/file")
    assert publish.described(elsewhere, tmp_path).startswith("/elsewhere/file: ")


def test_what_a_program_prints_of_the_disk(tmp_path: Path) -> None:
    found = publish.disk_error_in("cp: x: No space left on device\nfailed", tmp_path)
    assert found is not None and f"{tmp_path}: disk full" in found.message
    assert publish.disk_error_in("cp: x: Permission denied", tmp_path) is None
    npm = publish.disk_error_in("npm error nospc ENOSPC: no space left on device, write", tmp_path)
    assert npm is not None and f"{tmp_path}: disk full" in npm.message


def test_a_disk_that_a_program_fills_up_in_silence(tmp_path: Path) -> None:
    publish.require_disk(tmp_path, "it crashed")
    with disk(tmp_path / "disk", "size=64k"):
        fill(tmp_path / "disk")
        with pytest.raises(PipelineError, match="cannot be written to: No space") as caught:
            publish.require_disk(tmp_path / "disk", "it crashed")
    assert caught.value.hint.startswith("free some space")


def fill(folder: Path) -> None:
    (folder / "filler").write_bytes(b"\0" * shutil.disk_usage(folder).free)


def test_the_disk_that_is_full_is_the_one_that_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    for error in (
        OSError(errno.ENOSPC, "full", "/elsewhere/sub/file"),
        OSError(errno.ENOSPC, "full", str(home / "from"), None, "/elsewhere/sub/to"),  # of a copy
    ):
        with pytest.raises(PipelineError) as caught, publish.disk_errors(home):
            raise error
        assert caught.value.message.startswith("/elsewhere/sub: disk full;")
        assert caught.value.hint == "free some space"
    with disk(tmp_path / "tmp", "size=64k"):
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
        a_write = OSError(errno.ENOSPC, "full")  # names no path
        assert f"{home}: disk full" in publish.described(a_write, home)
        fill(tmp_path / "tmp")
        said = publish.described(a_write, home)
    assert f"{tmp_path / 'tmp'}: disk full" in said and "set TMPDIR to" in said
