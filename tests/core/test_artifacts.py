from __future__ import annotations

import os
from pathlib import Path

import pytest
from core_tools import child, finish, line, names
from disks import disk
from kills import Kills
from msgspec.structs import replace

from pipeline.core.errors import PipelineError
from pipeline.core.store import artifacts, receipts
from pipeline.core.store.locks import only_one
from pipeline.core.store.publish import part
from pipeline.core.store.receipts import Status

ONE, TWO = {"v": 1}, {"v": 2}


class Maker:
    """Writes what it is told and counts how often."""

    def __init__(self, content: bytes = b"one") -> None:
        self.content, self.times = content, 0

    def __call__(self, path: Path) -> None:
        assert not path.exists()
        self.times += 1
        path.write_bytes(self.content)


def test_made_once(tmp_path: Path) -> None:
    target, maker = tmp_path / "sub" / "a", Maker()
    entry = artifacts.make(target, ONE, maker, source={"type": "test"})
    assert target.read_bytes() == b"one"
    assert entry == receipts.load(target.parent)["a"]
    assert entry.source == {"type": "test"}
    assert artifacts.make(target, ONE, maker) == entry
    assert maker.times == 1
    assert names(target.parent) == [".state.json", "a"]


@pytest.mark.parametrize("reason", ["force", "recipe", "size", "removed", "forgotten"])
def test_made_again(tmp_path: Path, reason: str) -> None:
    target = tmp_path / "a"
    artifacts.make(target, ONE, Maker())
    if reason == "size":
        target.write_bytes(b"damaged")
    elif reason == "removed":
        target.unlink()
    elif reason == "forgotten":
        receipts.invalidate(target)
    maker, recipe = Maker(b"two"), TWO if reason == "recipe" else ONE
    artifacts.make(target, recipe, maker, force=reason == "force")
    assert (maker.times, target.read_bytes()) == (1, b"two")
    assert receipts.status(target, recipe) is Status.CURRENT


@pytest.mark.parametrize("there_before", [False, True])
@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()])
def test_nothing_is_published_where_the_maker_fails(
    tmp_path: Path, error: BaseException, there_before: bool
) -> None:
    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise error

    target = tmp_path / "a"
    if there_before:
        artifacts.make(target, ONE, Maker())
    with pytest.raises(type(error)):
        artifacts.make(target, TWO, fail)
    assert names(tmp_path) == ([".state.json", "a"] if there_before else [])
    if there_before:
        assert target.read_bytes() == b"one"
        assert receipts.status(target, ONE) is Status.CURRENT
    artifacts.make(target, TWO, Maker(b"two"))  # and its lock is free
    assert target.read_bytes() == b"two"


@pytest.mark.parametrize("folder", [False, True])
def test_what_a_killed_run_left_is_replaced(tmp_path: Path, folder: bool) -> None:
    left = tmp_path / ".a.part"
    if folder:
        left.mkdir()
        (left / "x").write_text("x")
    else:
        left.write_bytes(b"half of something")
    artifacts.make(tmp_path / "a", ONE, Maker())
    assert (tmp_path / "a").read_bytes() == b"one"
    assert names(tmp_path) == [".state.json", "a"]


def test_kept_stays_kept(tmp_path: Path) -> None:
    target, maker = tmp_path / "a", Maker()
    asked = [
        (artifacts.make(target, ONE, maker, keep=keep).keep, receipts.load(tmp_path)["a"].keep)
        for keep in (False, False, True, False)
    ]
    assert asked == [(False, False), (False, False), (True, True), (True, True)]
    assert maker.times == 1
    assert artifacts.make(target, TWO, maker, keep=False).keep  # also when it is made again


def test_kept_without_being_made_again(tmp_path: Path) -> None:
    target = tmp_path / "a"
    artifacts.keep(target)
    assert receipts.load(tmp_path) == {}  # what has no receipt gets none
    made = artifacts.make(target, ONE, Maker(), keep=False)
    for _ in range(2):
        artifacts.keep(target)
        assert receipts.load(tmp_path) == {"a": replace(made, keep=True)}
    assert names(tmp_path) == [".state.json", "a"]


def test_what_was_discarded_is_no_longer_kept(tmp_path: Path) -> None:
    artifacts.make(tmp_path / "a", ONE, Maker())
    artifacts.discard(tmp_path / "a")
    assert not artifacts.make(tmp_path / "a", ONE, Maker(), keep=False).keep


def test_too_little_space_is_said_before_any_work(tmp_path: Path) -> None:
    maker = Maker()
    with pytest.raises(PipelineError, match=r"are needed there and .* are free"):
        artifacts.make(tmp_path / "a", ONE, maker, need=1 << 60)
    assert maker.times == 0
    assert names(tmp_path) == []


def fill(path: Path) -> None:
    path.write_bytes(bytes(2_000_000))


@pytest.mark.parametrize("there_before", [False, True])
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, there_before: bool) -> None:
    with disk(tmp_path / "disk", "size=1m"):
        target = tmp_path / "disk" / "a"
        if there_before:
            artifacts.make(target, ONE, Maker())
        with pytest.raises(PipelineError, match="disk full; the unfinished"):
            artifacts.make(target, TWO, fill)
        assert names(target.parent) == ([".state.json", "a"] if there_before else [])
        if there_before:
            assert receipts.revalidate(target, ONE)
        artifacts.make(target, TWO, Maker(b"two"))
        assert target.read_bytes() == b"two"


def test_a_disk_too_full_for_the_receipt_leaves_no_parts(tmp_path: Path) -> None:
    def to_the_brim(path: Path) -> None:
        with path.open("wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError:
                pass

    with disk(tmp_path / "disk", "size=256k"):
        target = tmp_path / "disk" / "a"
        with pytest.raises(PipelineError, match="disk full; the unfinished"):
            artifacts.make(target, ONE, to_the_brim)
        assert receipts.status(target, ONE) is not Status.CURRENT
        assert [name for name in names(target.parent) if name.endswith(".part")] == []


def test_a_read_only_disk_is_an_error_that_users_understand(tmp_path: Path) -> None:
    maker = Maker()
    with disk(tmp_path / "disk", "size=1m") as remount:
        remount("ro")
        with pytest.raises(PipelineError, match="Read-only file system"):
            artifacts.make(tmp_path / "disk" / "a", ONE, maker)
    assert maker.times == 0


def test_an_unreadable_input_does_not_blame_the_target(tmp_path: Path) -> None:
    """What `maker` may not read is no reason to move the home."""

    def read_denied(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path / "elsewhere" / "model"))

    with pytest.raises((PipelineError, PermissionError)) as caught:
        artifacts.make(tmp_path / "home" / "a", ONE, read_denied)
    assert "elsewhere" in str(caught.value)
    assert "LLAMA_PIPELINE_HOME" not in str(caught.value)


SLOW = """
import sys, time
from pathlib import Path
from pipeline.core.store import artifacts
target, go, made = map(Path, sys.argv[1:])
def maker(path):
    print("making", flush=True)
    while not go.exists():
        time.sleep(0.01)
    path.write_bytes(b"one")
    with made.open("a") as log:
        log.write("made\\n")
artifacts.make(target, {"v": 1}, maker)
"""


def test_two_at_once_make_it_once_and_the_second_says_that_it_waits(tmp_path: Path) -> None:
    words = tmp_path / "out" / "a", tmp_path / "go", tmp_path / "made"
    with child(SLOW, *words) as one:
        assert line(one) == "making"
        with child(SLOW, *words) as two:
            assert two.stderr is not None
            assert two.stderr.readline() == "another run is making a; waiting for it\n"
            words[1].touch()
            assert (finish(one), finish(two)) == ("", "")
    assert words[2].read_text() == "made\n"
    assert receipts.status(words[0], ONE) is Status.CURRENT


# Each artifact is its version many times over, written in pieces: a torn one would show.
FOREVER = """
import sys
from itertools import count
from pathlib import Path
from pipeline.core.store import artifacts
def maker(version):
    def make(path):
        with path.open("wb", buffering=0) as file:
            for _ in range(40):
                file.write(b"%8d" % version * 500)
    return make
print("ready", flush=True)
for version in count(int(sys.argv[2])):
    artifacts.make(Path(sys.argv[1]), {"v": version}, maker(version))
"""


@pytest.mark.slow
def test_killed_at_any_instant_the_file_is_whole_and_the_receipt_true(tmp_path: Path) -> None:
    target, seen = tmp_path / "a", set()
    kills = Kills(20, 0.1, lambda: len(seen) > 5)
    for number in kills:
        with child(FOREVER, target, number * 100_000) as process:
            assert line(process) == "ready"
            kills.wait()
            process.kill()
        if target.exists():
            content = target.read_bytes()
            version = int(content[:8])
            assert content == b"%8d" % version * 20_000
            entry = receipts.load(tmp_path).get("a")
            if receipts.status(target) is Status.CURRENT:
                assert entry is not None
                assert entry.recipe == {"v": version}
            seen.add(version)
    artifacts.make(target, ONE, Maker())
    assert target.read_bytes() == b"one"
    assert names(tmp_path) == [".state.json", "a"]


def test_discard_keeps_the_receipt(tmp_path: Path) -> None:
    target, maker = tmp_path / "a", Maker()
    made = artifacts.make(target, ONE, maker)
    with only_one(target):
        artifacts.discard(target)
    assert names(tmp_path) == [".state.json"]
    assert receipts.load(tmp_path)["a"] == replace(made, mtime_ns=None)


def test_discard_of_what_was_never_made(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    artifacts.discard(tmp_path / "a")
    assert names(tmp_path) == []


@pytest.mark.parametrize("same", [False, True])
def test_published_with_a_journal(tmp_path: Path, same: bool) -> None:
    """Nothing is left beside it, also where it is in its place already, under another name too."""
    target, journal = tmp_path / "a", tmp_path / ".a.part.pieces"
    made = part(target)
    made.write_bytes(b"one")
    journal.touch()
    if same:
        os.link(made, target)
    artifacts.publish(target, ONE, source={}, sha256="0", seconds=0, journal=journal)
    assert names(tmp_path) == [".state.json", "a"]


# Folders


def make_folder(target: Path, content: str) -> None:
    with artifacts.locked_folder(target), artifacts.new_folder(target) as made:
        assert not made.exists()
        made.mkdir()
        (made / "file").write_text(content)


def test_a_folder_takes_the_place_of_another(tmp_path: Path) -> None:
    target = tmp_path / "sub" / "folder"
    for content in ("one", "two"):
        make_folder(target, content)
        assert (target / "file").read_text() == content
        assert names(target.parent) == ["folder"]


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()])
@pytest.mark.parametrize("there_before", [False, True])
def test_a_folder_that_fails_changes_nothing(
    tmp_path: Path, error: BaseException, there_before: bool
) -> None:
    target = tmp_path / "folder"
    if there_before:
        make_folder(target, "before")
    with (
        pytest.raises(type(error)),
        artifacts.locked_folder(target),
        artifacts.new_folder(target) as made,
    ):
        made.mkdir()
        (made / "half").write_text("x")
        raise error
    assert names(tmp_path) == ["folder"] * there_before
    if there_before:
        assert (target / "file").read_text() == "before"


def test_what_a_cut_run_left_of_a_folder(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    make_folder(target, "one")
    target.rename(tmp_path / ".folder.old")
    (tmp_path / ".folder.part").mkdir()
    with artifacts.locked_folder(target):
        assert names(tmp_path) == ["folder"]
        assert (target / "file").read_text() == "one"


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_that_was_not_replaced_is_put_back(tmp_path: Path, there: bool) -> None:
    target, aside = tmp_path / "folder", tmp_path / ".folder.old"
    make_folder(target, "one")
    target.rename(aside)
    if there:
        make_folder(target, "two")
        (target / "file").rename(tmp_path / "kept")
        aside.mkdir(exist_ok=True)
        (tmp_path / "kept").rename(target / "file")
    artifacts.finish(aside)
    assert names(tmp_path) == ["folder"]
    assert (target / "file").read_text() == ("two" if there else "one")


def test_a_folder_needs_room(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    with (
        pytest.raises(PipelineError, match="are needed there"),
        artifacts.locked_folder(target),
        artifacts.new_folder(target, need=10**18),
    ):
        raise AssertionError("begun without the room for it")
    assert names(tmp_path) == []
