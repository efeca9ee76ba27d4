"""Holes: as long as asked for, next to nothing on the disk, or a plain no."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pipeline.models import skeleton


@pytest.mark.parametrize("size", [5, 4096, skeleton.PROBE + 1, 1 << 30, 1 << 40])
def test_the_start_is_kept_and_the_rest_is_zero(tmp_path: Path, size: int) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"start")
    assert skeleton.extend_by_hole(path, size)
    assert path.stat().st_size == size
    with path.open("rb") as file:
        assert file.read(100) == (b"start" + bytes(95))[: min(100, size)]
        file.seek(max(0, size - 10))
        assert not any(file.read()[-5:]) or size == 5
    if sys.platform != "win32":
        assert path.stat().st_blocks * 512 <= 1 << 20


def test_what_cannot_be_that_long_is_a_no(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"start")
    assert not skeleton.extend_by_hole(tmp_path / "a", 1 << 63)
    assert not skeleton.extend_by_hole(tmp_path / "none", 10)


@pytest.mark.skipif(not Path("/proc/filesystems").exists(), reason="needs Linux")
def test_a_file_system_without_holes_is_found_out_on_a_little(tmp_path: Path) -> None:
    """FAT as a user meets it on a stick needs a mount: only where the tests may do that."""
    import subprocess

    image, folder = tmp_path / "fat", tmp_path / "mounted"
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(64 << 20)
    try:
        subprocess.run(["mkfs.vfat", image], check=True, capture_output=True)
        subprocess.run(["mount", "-o", "loop", image, folder], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no FAT file system can be mounted here")
    try:
        (folder / "a").write_bytes(b"start")
        assert not skeleton.extend_by_hole(folder / "a", 32 << 20)
        assert (folder / "a").stat().st_size <= skeleton.PROBE + 5
    finally:
        subprocess.run(["umount", folder], check=True)
