from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from disks import disk

from pipeline.core.store import hashing, stat_cache


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "modèle.gguf"
    path.write_bytes(b"one")
    return path


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "run" / "cache.json"


def store(cache: Path, file: Path, value: object) -> None:
    stat_cache.remember(cache, file, value, stat_cache.stamp(file))


def test_remembered(file: Path, cache: Path, tmp_path: Path) -> None:
    assert stat_cache.recall(cache, file) is None
    store(cache, file, {"n": [1, "é"]})
    (tmp_path / "other").touch()
    store(cache, tmp_path / "other", 2)
    assert stat_cache.recall(cache, file) == {"n": [1, "é"]}
    assert stat_cache.recall(cache, tmp_path / "other") == 2
    assert stat_cache.recall(cache, tmp_path / "unknown") is None


def test_a_value_from_before_a_change_does_not_count_after_it(file: Path, cache: Path) -> None:
    before = stat_cache.stamp(file)
    file.write_bytes(b"longer")
    stat_cache.remember(cache, file, 1, before)
    assert stat_cache.recall(cache, file) is None


@pytest.mark.parametrize("change", ["size", "newer", "older", "gone"])
def test_another_stamp_is_another_file(file: Path, cache: Path, change: str) -> None:
    store(cache, file, 1)
    if change == "size":
        stat = file.stat()
        file.write_bytes(b"longer")
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    elif change == "gone":
        file.unlink()
    else:
        moment = file.stat().st_mtime_ns + (1 if change == "newer" else -1) * 1_000_000_000
        os.utime(file, ns=(moment, moment))
    assert stat_cache.recall(cache, file) is None


def test_identity_is_hashed_once(file: Path, cache: Path) -> None:
    first = stat_cache.identity(cache, file)
    assert first == hashing.sha256(file)
    stat = file.stat()
    file.write_bytes(b"two")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert stat_cache.identity(cache, file) == first  # the stamp alone was looked at
    os.utime(file, ns=(1, 1))
    assert stat_cache.identity(cache, file) == hashing.sha256(file) != first


@pytest.mark.parametrize("inside", [b"", b"{", b"[]", b"\xff", b'{"%s": 5}', b'{"%s": {"x": 1}}'])
def test_a_damaged_cache_counts_as_empty(file: Path, cache: Path, inside: bytes) -> None:
    cache.parent.mkdir()
    cache.write_bytes(inside.replace(b"%s", str(file).encode()))
    assert stat_cache.recall(cache, file) is None
    store(cache, file, 1)
    assert stat_cache.recall(cache, file) == 1


def test_a_book_that_cannot_be_written_is_no_harm(file: Path) -> None:
    cache = file / "below a file" / "cache.json"
    store(cache, file, 1)
    assert stat_cache.recall(cache, file) is None
    assert stat_cache.identity(cache, file) == hashing.sha256(file)


@pytest.mark.parametrize("trouble", ["ro", "full"])
def test_a_read_only_or_full_disk_is_no_harm(file: Path, tmp_path: Path, trouble: str) -> None:
    with disk(tmp_path / "disk", "size=64k") as remount:
        cache = tmp_path / "disk" / "cache.json"
        store(cache, file, 1)
        if trouble == "ro":
            remount("ro")
            store(cache, file, 2)
        else:
            store(cache, file, "x" * 100_000)
        assert stat_cache.recall(cache, file) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="names are bytes on Linux only")
def test_a_name_that_is_not_utf_8(tmp_path: Path, cache: Path) -> None:
    file = Path(os.fsdecode(os.fsencode(tmp_path) + b"/mod\xe8le.gguf"))
    file.write_bytes(b"one")
    store(cache, file, 1)
    assert stat_cache.recall(cache, file) == 1
