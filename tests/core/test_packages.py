from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import io
import os
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from core_tools import names
from msgspec.structs import replace

from pipeline.core import packages
from pipeline.core.errors import PipelineError
from pipeline.core.paths import Home
from pipeline.core.pins import Archive

WHEEL = Archive(
    package="some-thing",
    version="1.0",
    kind="wheel",
    file="some_thing-1.0-py3-none-any.whl",
    folder="some_thing",
    sha256="0" * 64,
    size=1000,
)
SDIST = replace(WHEEL, kind="sdist", file="some_thing-1.0.tar.gz", folder="some_thing-1.0")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """A home and an empty cache, and a pip that can reach nothing but the folder `index`."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    (tmp_path / "index").mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("LLAMA_PIPELINE_CACHE", str(tmp_path / "cache"))
    return Home(tmp_path / "home")


def wheel(index: Path) -> str:
    """Put a wheel as WHEEL names it into `index`; its sha256."""
    with zipfile.ZipFile(index / WHEEL.file, "w") as file:
        file.writestr("some_thing/data.txt", "größe")
        info = "some_thing-1.0.dist-info"
        file.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: some-thing\nVersion: 1.0\n")
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{info}/RECORD", "")
    return hashlib.sha256((index / WHEEL.file).read_bytes()).hexdigest()


def sdist(index: Path, proof: Path) -> str:
    """An sdist that writes `proof` when anything of it is run; its sha256."""
    files = {
        "PKG-INFO": "Metadata-Version: 2.1\nName: some-thing\nVersion: 1.0\n",
        "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "backend"\n'
        'backend-path = ["."]\n[project]\nname = "some-thing"\nversion = "1.0"\n',
        "backend.py": f"""
import os
open({str(proof)!r}, "w").close()
def prepare_metadata_for_build_wheel(folder, settings=None):
    os.mkdir(os.path.join(folder, "some_thing-1.0.dist-info"))
    with open(os.path.join(folder, "some_thing-1.0.dist-info", "METADATA"), "w") as file:
        file.write("Metadata-Version: 2.1\\nName: some-thing\\nVersion: 1.0\\n")
    return "some_thing-1.0.dist-info"
""",
    }
    with tarfile.open(index / SDIST.file, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"some_thing-1.0/{name}")
            member.size = len(content.encode())
            tar.addfile(member, io.BytesIO(content.encode()))
    return hashlib.sha256((index / SDIST.file).read_bytes()).hexdigest()


@pytest.mark.parametrize(("archive", "only"), [(WHEEL, "--only-binary"), (SDIST, "--no-binary")])
def test_download_argv(archive: Archive, only: str, tmp_path: Path) -> None:
    argv = packages.download_argv(archive, tmp_path)
    assert argv[:4] == [sys.executable, "-m", "pip", "download"]
    assert argv[argv.index(only) + 1] == "some-thing"
    assert argv[argv.index("--dest") + 1] == str(tmp_path)
    assert "--no-deps" in argv


def test_the_cache_is_shared_by_content(home: Home, tmp_path: Path) -> None:
    path = packages.cached(WHEEL, home)
    assert path.is_relative_to(tmp_path / "cache")
    assert path.name == WHEEL.file
    assert packages.cached(replace(WHEEL, sha256="1" * 64), home) != path


def test_what_is_cached_is_not_fetched(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    archive = replace(WHEEL, sha256=hashlib.sha256(b"right").hexdigest())
    cached = packages.cached(archive, home)
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"right")
    assert packages.fetch(archive, home) == cached
    assert capsys.readouterr().err == ""
    assert not home.logs.exists()


@pytest.mark.parametrize("cached", [False, True])
def test_a_pip_that_reaches_nothing(home: Home, cached: bool) -> None:
    """A damaged file in the cache counts as none."""
    target = packages.cached(WHEEL, home)
    if cached:
        target.parent.mkdir(parents=True)
        target.write_bytes(b"damaged")
    with pytest.raises(PipelineError, match=r"some-thing 1\.0 could not be downloaded") as caught:
        packages.fetch(WHEEL, home)
    assert "No matching distribution" in caught.value.message
    assert str(target.parent) in caught.value.hint
    assert names(target.parent) == ([WHEEL.file] if cached else [])
    assert "No matching distribution" in (home.logs / "download-some-thing.log").read_text()


def test_a_full_disk_names_the_variable_that_moves_the_cache(home: Home, tmp_path: Path) -> None:
    def fail(made: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(made))

    with pytest.raises(PipelineError, match="disk full") as caught:
        packages.keep(tmp_path / "cache" / "file", "0" * 64, fail)
    assert "LLAMA_PIPELINE_CACHE" in caught.value.hint


def test_offline(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(PipelineError, match="offline=1 forbids"):
        packages.fetch(WHEEL, home, offline=True)
    archive = replace(WHEEL, sha256=hashlib.sha256(b"right").hexdigest())
    packages.cached(archive, home).parent.mkdir(parents=True)
    packages.cached(archive, home).write_bytes(b"right")
    assert packages.fetch(archive, home, offline=True) == packages.cached(archive, home)
    assert "+ " not in capsys.readouterr().err


@pytest.mark.parametrize("before", ["nothing", "damaged", "left by a killed run"])
def test_fetched_once(
    home: Home,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    before: str,
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    archive = replace(WHEEL, sha256=wheel(tmp_path / "index"))
    target = packages.cached(archive, home)
    target.parent.mkdir(parents=True)
    if before == "damaged":
        target.write_bytes(b"damaged")
    elif before == "left by a killed run":
        (target.parent / f".{target.name}.part.pip").mkdir()
        (target.parent / f".{target.name}.part.pip" / "half").touch()
        (target.parent / f".{target.name}.part").write_bytes(b"half")
    assert packages.fetch(archive, home) == target
    assert target.read_bytes() == (tmp_path / "index" / WHEEL.file).read_bytes()
    assert "+ " in capsys.readouterr().err
    packages.fetch(archive, home)
    assert capsys.readouterr().err == ""
    assert names(target.parent) == [WHEEL.file]


def test_pip_sees_no_credentials_but_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    index = "https://user:secret@index/simple"
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", index)
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("DATABASE_URL", "postgres://user:secret@host/db")
    seen = packages.pip_environment()
    assert {name: seen[name] for name in seen if "secret" in seen[name]} == {
        "PIP_EXTRA_INDEX_URL": index
    }


def test_another_file_than_the_pinned_one_is_refused(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    digest = wheel(tmp_path / "index")
    with pytest.raises(PipelineError) as caught:
        packages.fetch(WHEEL, home)
    assert digest in str(caught.value)
    assert WHEEL.sha256 in str(caught.value)
    assert names(packages.cached(WHEEL, home).parent) == []


def test_nothing_of_an_unchecked_archive_is_run(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    sdist(tmp_path / "index", tmp_path / "it was run")
    with pytest.raises(PipelineError):
        packages.fetch(SDIST, home)
    assert names(packages.cached(SDIST, home).parent) == []
    assert not (tmp_path / "it was run").exists()


def test_a_pinned_sdist_is_fetched(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    archive = replace(SDIST, sha256=sdist(tmp_path / "index", tmp_path / "it was run"))
    target = packages.fetch(archive, home)
    assert target.read_bytes() == (tmp_path / "index" / SDIST.file).read_bytes()


@pytest.mark.parametrize("name", ["cmake", "ninja", "msgspec"])
def test_the_version_of_a_package_is_what_its_metadata_says(name: str) -> None:
    assert packages.installed(name) == importlib.metadata.version(name)


def test_a_package_that_is_not_installed_has_no_version() -> None:
    assert packages.installed("no_such_package") is None
    assert packages.installed("pipeline.core") is None, "it has no folder of an installer's"
