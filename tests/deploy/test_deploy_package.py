"""Packages in a container: where they go, and what they go before. The programs are stand-ins."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest

from pipeline.bins import binaries
from pipeline.core.errors import PipelineError, UsageError
from pipeline.core.paths import Home
from pipeline.deploy import package

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the stand-in is a shell script")


def archive(path: Path, version: str) -> Path:
    """A package whose llama-server says this version."""
    files = {"README.md": "", "bin/llama-server": f"#!/bin/sh\necho version: {version}\n"}
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(text), 0o755
            tar.addfile(info, io.BytesIO(text.encode()))
    return path


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "daten ü")


def test_an_installed_one_goes_before_the_images_own(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_SERVER_BINS_DIR", str(binaries.IMAGES_OWN))
    package.get(archive(tmp_path / "one.tgz", "1"), home, tmp_path / "no such folder")
    found = binaries.external(home)
    assert found and found.folder == home.bins / "package" / "bin"
    own = tmp_path / "own"
    own.mkdir()
    (own / "llama-server").touch()
    monkeypatch.setenv("LLAMA_SERVER_BINS_DIR", str(own))
    found = binaries.external(home)
    assert found and found.folder == own, "who names others gets them"


def test_where_applications_live_it_is_cached(
    home: Home, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    soft = tmp_path / "soft" / "app"
    soft.mkdir(parents=True)
    one = archive(tmp_path / "llama ü.tgz", "1")
    package.get(one, home, soft)
    assert (soft / "llama-cpp" / "bin" / "llama-server").exists()
    assert (soft / "cache" / one.name).read_bytes() == one.read_bytes()
    archive(one, "22")
    package.get(one, home, soft)
    assert f"llama.cpp 22 is installed in {soft / 'llama-cpp'}" in capfd.readouterr().err
    one.unlink()
    package.get(one, home, soft)
    assert "does not exist; using" in capfd.readouterr().err
    with pytest.raises(UsageError, match="there is no such file"):
        package.get(tmp_path / "other.tgz", home, soft)


def test_one_that_does_not_run_leaves_the_old_one(home: Home, tmp_path: Path) -> None:
    nowhere = tmp_path / "no such folder"
    package.get(archive(tmp_path / "one.tgz", "1"), home, nowhere)
    with pytest.raises(PipelineError, match="does not run"):
        package.get(archive(tmp_path / "two.tgz", "2; exit 1"), home, nowhere)
    assert "version: 1" in (home.bins / "package" / "bin" / "llama-server").read_text()
