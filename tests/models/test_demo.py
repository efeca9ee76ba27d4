"""The demo model out of a package: of one that is made here, by the same steps."""

from __future__ import annotations

import hashlib
import os
import zipfile
from pathlib import Path

import pytest

from pipeline.core import packages
from pipeline.core.errors import PipelineError
from pipeline.core.paths import Home
from pipeline.core.pins import Archive
from pipeline.models import fetch
from pipeline.models.resolve import ModelFile, Resolved

FILES = {"config.json": b"{}", "model.safetensors": b"weights"}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setenv("LLAMA_PIPELINE_CACHE", str(tmp_path / "cache"))
    return Home(tmp_path / "home")


@pytest.fixture
def package(home: Home, tmp_path: Path) -> Archive:
    """A package, where fetched ones are kept."""
    made = tmp_path / "package.whl"
    with zipfile.ZipFile(made, "w") as wheel:
        for name, content in FILES.items():
            wheel.writestr(f"folder/{name}", content)
    content = made.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    archive = Archive(
        package="package",
        version="1",
        kind="wheel",
        file=made.name,
        folder="folder",
        sha256=digest,
        size=len(content),
    )
    target = packages.cached(archive, home)
    target.parent.mkdir(parents=True)
    made.rename(target)
    return archive


def test_the_package_is_opened_only_where_a_file_has_to_be_made(
    home: Home, package: Archive
) -> None:
    files = tuple(
        ModelFile(name, len(content), hashlib.sha256(content).hexdigest())
        for name, content in FILES.items()
    )
    resolved = Resolved(
        kind="safetensors",
        name="demo",
        slug="demo",
        folder=home.models / "source" / "demo",
        local=False,
        source={"type": "package"},
        files=files,
        precision="F32",
    )
    fetch.unpack(resolved, package, home, offline=True)
    assert {name: (resolved.folder / name).read_bytes() for name in FILES} == FILES

    packages.cached(package, home).unlink()
    os.utime(resolved.folder / "config.json", ns=(1, 1))  # copied: hashed, not made
    fetch.unpack(resolved, package, home, offline=True)

    (resolved.folder / "config.json").unlink()
    with pytest.raises(PipelineError, match="offline=1 forbids downloading it"):
        fetch.unpack(resolved, package, home, offline=True)
    assert (resolved.folder / "model.safetensors").read_bytes() == b"weights"
