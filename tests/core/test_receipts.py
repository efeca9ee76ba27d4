from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import pytest
from core_tools import child, finish, line

from pipeline.core.store import artifacts, receipts
from pipeline.core.store.receipts import Status

RECIPE = {"step": "quantize", "input": "sha256:1", "imatrix": None, "tool": {"a": 1, "b": 2}}


def made(target: Path, content: bytes = b"content") -> Path:
    target.parent.mkdir(exist_ok=True)
    target.write_bytes(content)
    receipts.change(target, receipts.stamp(target, RECIPE, seconds=1.25))
    return target


def test_current(tmp_path: Path) -> None:
    target = made(tmp_path / "a.gguf")
    same = {"tool": {"b": 2, "a": 1}, "imatrix": None, "input": "sha256:1", "step": "quantize"}
    assert receipts.status(target) is receipts.status(target, same) is Status.CURRENT
    assert receipts.revalidate(target, RECIPE)
    entry = json.loads((tmp_path / ".state.json").read_text())["artifacts"]["a.gguf"]
    assert entry["recipe"] == RECIPE
    assert (entry["size"], entry["mtime_ns"]) == (7, target.stat().st_mtime_ns)
    assert entry["sha256"].startswith("ed7002b439e9ac84")


def test_moved_is_hashed_once_and_stamped_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = made(tmp_path / "a.gguf")
    os.utime(target, ns=(1, 1))
    assert receipts.status(target, RECIPE) is Status.MOVED
    assert receipts.revalidate(target, RECIPE)
    assert "rehashing to verify" in capsys.readouterr().err
    assert receipts.status(target, RECIPE) is Status.CURRENT
    assert receipts.revalidate(target, RECIPE)
    assert capsys.readouterr().err == ""


def test_a_folder_that_was_copied_is_hashed_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "bins"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / name).write_text(name)
    receipts.record_folder(folder, RECIPE, seconds=1)
    assert receipts.folder_is_current(folder, RECIPE)
    assert not receipts.folder_is_current(folder, RECIPE, ["c"])
    assert not receipts.folder_is_current(folder, {"step": "convert"})
    for name in ("a", "b"):
        os.utime(folder / name, ns=(1, 1))
    assert not receipts.folder_is_current(folder, RECIPE)
    assert not receipts.revalidate_folder(folder, {"step": "convert"})
    assert capsys.readouterr().err == ""
    assert receipts.revalidate_folder(folder, RECIPE)
    assert capsys.readouterr().err == "bins: mtime of 2 files changed; rehashing to verify\n"
    assert receipts.folder_is_current(folder, RECIPE)

    (folder / "a").write_text("A")
    os.utime(folder / "a", ns=(2, 2))
    assert not receipts.revalidate_folder(folder, RECIPE)
    assert set(receipts.load(folder)) == {"a", "b"}
    receipts.forget_folder(folder)
    assert receipts.load(folder) == {}
    assert not receipts.folder_is_current(folder)
    receipts.forget_folder(tmp_path / "missing")
    assert receipts.files_in(tmp_path / "missing") == []


def test_moved_with_another_recipe_is_not_hashed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = made(tmp_path / "a.gguf")
    os.utime(target, ns=(1, 1))
    assert not receipts.revalidate(target, {"step": "convert"})
    assert capsys.readouterr().err == ""


def test_same_size_other_content_is_dirty(tmp_path: Path) -> None:
    target = made(tmp_path / "a.gguf")
    target.write_bytes(b"CONTENT")
    os.utime(target, ns=(1, 1))
    assert not receipts.revalidate(target, RECIPE)
    assert receipts.status(target) is Status.DIRTY  # known now: it is not hashed again


@pytest.mark.parametrize("change", ["recipe", "nested", "size", "older", "forgotten"])
def test_dirty(tmp_path: Path, change: str) -> None:
    target, recipe = made(tmp_path / "a.gguf"), dict(RECIPE)
    if change == "recipe":
        recipe["input"] = "sha256:2"
    elif change == "nested":
        recipe["tool"] = {"a": 1, "b": 3}
    elif change == "forgotten":
        receipts.invalidate(target)
        assert receipts.load(tmp_path) == {}
        receipts.invalidate(target)
        assert target.exists()
    else:
        target.write_bytes(b"longer than it was")
        if change == "older":  # older is as dirty as newer
            os.utime(target, ns=(1, 1))
    assert receipts.status(target, recipe) is Status.DIRTY
    assert not receipts.revalidate(target, recipe)


def test_missing(tmp_path: Path) -> None:
    target = made(tmp_path / "a.gguf")
    target.unlink()
    assert receipts.status(target, RECIPE) is Status.MISSING
    assert receipts.status(tmp_path / "no" / "folder") is Status.MISSING
    assert not receipts.revalidate(target, RECIPE)


ENTRY = {"recipe": {}, "size": 7, "mtime_ns": 1, "sha256": "", "made_at": "", "seconds": 1}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"schema": 1, "artif',
        b"\xff\xfe\x00",
        b"[]",
        b"null",
        b"{}",
        b'{"schema": 1}',
        b'{"schema": 2, "artifacts": {}}',
        b'{"schema": 1, "artifacts": []}',
        b'{"schema": 1, "artifacts": {"a": 5}}',
        json.dumps({"schema": 1, "artifacts": {"a": {**ENTRY, "later": 1}}}).encode(),
        json.dumps({"schema": 1, "artifacts": {"a": {"recipe": {}}}}).encode(),
        pytest.param(b"[" * 200_000, id="deep"),
        pytest.param(None, id="folder"),
    ],
)
def test_unreadable_receipts_are_told_and_count_as_absent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None
) -> None:
    book = tmp_path / ".state.json"
    target = tmp_path / "a"
    target.write_bytes(b"content")
    if content is None:
        book.mkdir()
    else:
        book.write_bytes(content)
    assert receipts.load(tmp_path) == {}
    assert "treated as absent" in capsys.readouterr().err
    assert receipts.status(target) is Status.DIRTY
    if content is not None:  # and the next receipt mends it
        made(target)
        capsys.readouterr()
        assert receipts.status(target, RECIPE) is Status.CURRENT
        assert capsys.readouterr().err == ""


def test_no_receipts_are_nothing_to_tell(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert receipts.load(tmp_path) == {}
    assert capsys.readouterr().err == ""


def test_removed_on_purpose_stays_known_and_may_come_back(tmp_path: Path) -> None:
    target = made(tmp_path / "a.gguf")
    digest = receipts.load(tmp_path)["a.gguf"].sha256
    artifacts.discard(target)
    entry = receipts.load(tmp_path)["a.gguf"]
    assert (entry.mtime_ns, entry.sha256, entry.recipe) == (None, digest, RECIPE)
    assert (
        json.loads((tmp_path / ".state.json").read_text())["artifacts"]["a.gguf"]["mtime_ns"]
        is None
    )
    assert receipts.status(target, RECIPE) is Status.MISSING
    target.write_bytes(b"content")
    assert receipts.status(target, RECIPE) is Status.MOVED
    assert receipts.revalidate(target, RECIPE)


@pytest.mark.parametrize("name", ["模型 ü.gguf", "a\u0301.gguf", "with space & 'quotes'.gguf"])
def test_any_name(tmp_path: Path, name: str) -> None:
    target = made(tmp_path / "größe" / name)
    made(target.with_name("other"))
    assert receipts.status(target, RECIPE) is Status.CURRENT
    assert list(receipts.load(target.parent)) == sorted([name, "other"])


WRITER = """
import sys
from pathlib import Path
from pipeline.core.store import artifacts, receipts
folder, name = Path(sys.argv[1]), sys.argv[2]
target = folder / name
target.write_bytes(b"content")
print("ready", flush=True)
sys.stdin.readline()
for i in range(100):
    receipts.change(target, receipts.stamp(target, {"i": i}, seconds=0))
    receipts.change(folder / f"{name}-{i}", receipts.stamp(target, {"i": i}, seconds=0))
"""


def test_two_processes_lose_nothing_of_each_other(tmp_path: Path) -> None:
    with (
        child(WRITER, tmp_path, "one", stdin=subprocess.PIPE) as one,
        child(WRITER, tmp_path, "two", stdin=subprocess.PIPE) as two,
    ):
        assert (line(one), line(two)) == ("ready", "ready")
        for process in (one, two):
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        assert finish(one) == finish(two) == ""  # neither ever read half a file
    entries = receipts.load(tmp_path)
    assert len(entries) == 202
    assert entries["one"].recipe == entries["two"].recipe == {"i": 99}


def read_before(folder: Path) -> dict[str, receipts.Entry]:
    """The receipts, as a run that started long after they were written has read them."""
    os.utime(folder / ".state.json", (1, 1))
    return receipts.load(folder)


def test_what_is_read_once_is_not_what_was_changed_since(tmp_path: Path) -> None:
    target = made(tmp_path / "a.gguf")
    entry = read_before(tmp_path)["a.gguf"]
    receipts.load(tmp_path).clear()  # the caller's own
    assert receipts.load(tmp_path) == {"a.gguf": entry}
    receipts.invalidate(target)
    assert receipts.load(tmp_path) == {}
    receipts.change(target, entry)
    assert read_before(tmp_path) == {"a.gguf": entry}
    receipts.save(tmp_path, {})
    assert receipts.load(tmp_path) == {}
    receipts.save(tmp_path, {"a.gguf": entry})
    assert read_before(tmp_path) == {"a.gguf": entry}
    (tmp_path / ".state.json").unlink()
    assert receipts.load(tmp_path) == {}


def test_what_another_process_writes_is_seen_at_once(tmp_path: Path) -> None:
    made(tmp_path / "mine")
    with child(WRITER, tmp_path, "other", stdin=subprocess.PIPE) as other:
        assert line(other) == "ready"
        assert list(read_before(tmp_path)) == ["mine"]
        assert other.stdin is not None
        other.stdin.write("go\n")
        other.stdin.flush()
        assert finish(other) == ""
    assert receipts.load(tmp_path)["other"].recipe == {"i": 99}
    made(tmp_path / "mine too")
    assert len(receipts.load(tmp_path)) == 103


@pytest.mark.parametrize("age", [0, 3600], ids=["now", "an hour ago"])
def test_a_file_changed_in_its_place_is_read_again(tmp_path: Path, age: float) -> None:
    """Within the clock's granularity a change may leave size and time as they were."""
    made(tmp_path / "a.gguf")
    file = tmp_path / ".state.json"
    then = time.time() - age
    os.utime(file, (then, then))
    assert receipts.load(tmp_path)["a.gguf"].keep
    file.write_text(file.read_text().replace('"keep": true', '"keep":false'))
    if not age:
        os.utime(file, (then, then))
    assert not receipts.load(tmp_path)["a.gguf"].keep
