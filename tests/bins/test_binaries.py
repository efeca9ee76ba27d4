from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from msgspec.structs import replace

from pipeline.bins import binaries
from pipeline.bins.binaries import program_file
from pipeline.core.errors import PipelineError, UsageError
from pipeline.core.paths import Home
from pipeline.core.store import receipts

SERVER = program_file("llama-server")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "größe").mkdir()
    (tmp_path / "größe" / SERVER).write_bytes(b"one")
    return tmp_path / "größe"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setenv("LLAMA_PIPELINE_CWD", str(tmp_path))
    monkeypatch.delenv("LLAMA_SERVER_BINS_DIR", raising=False)
    return Home(tmp_path / "home")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_external(folder: Path, home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    assert binaries.external(home) is None
    monkeypatch.setenv("LLAMA_SERVER_BINS_DIR", " größe ")
    found = binaries.external(home)
    assert found == binaries.Binaries(folder=folder, commit="", home=home)
    assert found.program("llama-server") == folder / SERVER
    assert found.recipe("llama-server") == {"commit": "", "build": f"sha256:{sha256(b'one')}"}


@pytest.mark.parametrize("there", ["nothing", "empty", "a folder of that name"])
def test_an_external_folder_without_a_server(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: str
) -> None:
    if there == "empty":
        (tmp_path / "own").mkdir()
    elif there == "a folder of that name":
        (tmp_path / "own" / SERVER).mkdir(parents=True)
    monkeypatch.setenv("LLAMA_SERVER_BINS_DIR", "own")
    with pytest.raises(UsageError, match="LLAMA_SERVER_BINS_DIR=own: there is no llama-server"):
        binaries.external(home)


@pytest.mark.parametrize(
    ("commit", "hint"), [("abc", "build it: ./doitw build_bins"), ("", "unset it")]
)
def test_a_missing_program(folder: Path, home: Home, commit: str, hint: str) -> None:
    found = binaries.Binaries(folder=folder, commit=commit, home=home)
    assert found.has("llama-server")
    assert not found.has("llama-quantize")
    with pytest.raises(PipelineError, match="there is no llama-quantize") as caught:
        found.program("llama-quantize")
    assert hint in caught.value.hint


def test_the_receipt_knows_the_sha256_while_it_is_current(folder: Path, home: Home) -> None:
    program = folder / SERVER
    found = binaries.Binaries(folder=folder, commit="abc", home=home)
    entry = receipts.stamp(program, {}, seconds=0)
    receipts.change(program, replace(entry, sha256="from the receipt"))
    assert found.sha256("llama-server") == "from the receipt"
    program.write_bytes(b"another")
    assert found.sha256("llama-server") == sha256(b"another")
    assert found.recipe("llama-server")["build"] == f"sha256:{sha256(b'another')}"


def test_others_programs_are_hashed_once(folder: Path, home: Home) -> None:
    found = binaries.Binaries(folder=folder, commit="", home=home)
    first, stat = found.sha256("llama-server"), (folder / SERVER).stat()
    (folder / SERVER).write_bytes(b"two")
    os.utime(folder / SERVER, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert found.sha256("llama-server") == first
    os.utime(folder / SERVER, ns=(1, 1))
    assert found.sha256("llama-server") == sha256(b"two")


@pytest.mark.parametrize(
    ("manifest", "backend"),
    [('{"backend": "cuda"}', "cuda"), ("{}", ""), ("[1]", ""), ("no JSON", ""), (None, "")],
)
def test_the_backend_that_a_package_names(
    tmp_path: Path, manifest: str | None, backend: str
) -> None:
    if manifest is not None:
        (tmp_path / "manifest.json").write_text(manifest)
    assert binaries.packed(tmp_path / "bin", "backend") == backend


def test_programs_of_our_own(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs" / "llama-server"
    theirs.parent.mkdir()
    assert binaries.is_ours(theirs), "it is yet to be made"
    theirs.write_text("#!/bin/sh\n")
    assert not binaries.is_ours(theirs)
    receipts.change(theirs, receipts.stamp(theirs, {"step": "build"}, seconds=1))
    assert binaries.is_ours(theirs)
    packed = tmp_path / "package" / "bin" / "llama-server"
    packed.parent.mkdir(parents=True)
    packed.write_text("")
    assert not binaries.is_ours(packed)
    (packed.parents[1] / "manifest.json").write_text('{"backend": "cpu"}')
    assert binaries.is_ours(packed)
