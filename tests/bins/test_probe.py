"""The machine's fingerprint: it changes with everything that counts, and with nothing else."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from pipeline.bins.hardware import probe
from pipeline.bins.hardware.probe import VARIABLES, fingerprint, mtime_ns

posix = pytest.mark.skipif(os.name == "nt", reason="programs without a suffix")


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that alone is on PATH."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(probe, "BESIDE_PATH", ())
    folder = tmp_path / "prög rams"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def program(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("#!/bin/sh\n")
    (folder / name).chmod(0o755)


@posix
def test_programs(programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = [fingerprint()]
    program(programs, "nvcc")
    seen.append(fingerprint())
    os.utime(programs / "nvcc", ns=(1, 1))  # another version of it
    seen.append(fingerprint())
    program(programs, "nothing-of-interest")
    assert fingerprint() == seen[-1]
    (programs / "nvcc").unlink()
    program(tmp_path / "kept elsewhere", "nvcc")
    (programs / "nvcc").symlink_to(tmp_path / "kept elsewhere" / "nvcc")
    seen.append(fingerprint())
    os.utime(tmp_path / "kept elsewhere" / "nvcc", ns=(2, 2))
    seen.append(fingerprint())
    monkeypatch.setenv("CXX", str(tmp_path / "kept elsewhere" / "nvcc"))
    seen.append(fingerprint())
    assert len(set(seen)) == len(seen)
    shutil.rmtree(programs)
    assert fingerprint() not in seen


@pytest.mark.parametrize("name", VARIABLES)
def test_variables(programs: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    before = fingerprint()
    assert fingerprint() == before
    monkeypatch.setenv(name, str(programs / "other"))
    assert fingerprint() != before


def test_parts_of_a_toolkit(programs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cuda"
    seen = [fingerprint(), fingerprint(str(folder))]
    for name in ("lib64/libcublas.so", "targets/x86_64-linux/lib/stubs/libcuda.so"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).touch()
        seen.append(fingerprint(str(folder)))
    assert len(set(seen)) == len(seen)


def test_when_it_changed(tmp_path: Path) -> None:
    assert mtime_ns(str(tmp_path)) == tmp_path.stat().st_mtime_ns
    assert mtime_ns(str(tmp_path / "nothing")) == 0
