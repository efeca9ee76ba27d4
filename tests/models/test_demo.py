"""The demo model out of a package: of one that is made here, by the same steps."""

from __future__ import annotations

import hashlib
import os
import zipfile
from pathlib import Path

import pytest
from msgspec.structs import replace

from pipeline.core import packages
from pipeline.core.errors import PipelineError
from pipeline.core.paths import Home
from pipeline.core.pins import pins
from pipeline.models import fetch
from pipeline.models.resolve import ModelFile, Resolved

FILES = {"config.json": b"{}", "model.safetensors": b"weights"}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setenv("LLAMA_PIPELINE_CACHE", str(tmp_path / "cache"))
    return Home(tmp_path / "home")


@pytest.fixture
def package(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The pinned package, where fetched ones are kept."""
    made = tmp_path / "package.whl"
    with zipfile.ZipFile(made, "w") as archive:
        for name, content in FILES.items():
            archive.writestr(f"{pins().demo_archive.folder}/{name}", content)
    digest = hashlib.sha256(made.read_bytes()).hexdigest()
    own = replace(pins().demo_archive, file=made.name, sha256=digest)
    monkeypatch.setattr(fetch, "pins", lambda: replace(pins(), demo_archive=own))
    target = packages.cached(own, home)
    target.parent.mkdir(parents=True)
    return made.rename(target)


def test_the_package_is_opened_only_where_a_file_has_to_be_made(home: Home, package: Path) -> None:
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
    fetch.fetch_demo(resolved, home, offline=True)
    assert {name: (resolved.folder / name).read_bytes() for name in FILES} == FILES

    package.unlink()
    os.utime(resolved.folder / "config.json", ns=(1, 1))  # copied: hashed, not made
    fetch.fetch_demo(resolved, home, offline=True)

    (resolved.folder / "config.json").unlink()
    with pytest.raises(PipelineError, match="offline=1 forbids downloading it"):
        fetch.fetch_demo(resolved, home, offline=True)
    assert (resolved.folder / "model.safetensors").read_bytes() == b"weights"
