from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

from pipeline.bins import platform
from pipeline.bins.hardware import probe, providers
from pipeline.core.errors import PipelineError

posix = pytest.mark.skipif(os.name == "nt", reason="shell scripts stand in")


def program(path: Path, script: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def compilers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH that holds nothing but what a test puts into this folder."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("CXX", raising=False)
    return folder


def test_platform_tag() -> None:
    assert re.fullmatch(r"(linux|macos|windows)-(x64|arm64|\w+)", platform.platform_tag())


def test_cpu_identity() -> None:
    assert re.fullmatch(r"[0-9a-f]{16}", platform.cpu_identity())
    assert platform.cpu_identity() == platform.cpu_identity()
    assert platform.cpu_identity() != "e3b0c44298fc1c14", "the hash of nothing"


@posix
def test_the_usual_names_in_their_order(compilers: Path) -> None:
    assert platform.find_compiler() is None
    for name in ("clang++", "g++", "c++"):
        path = program(compilers / name, f"echo '{name} 1.0'; echo more")
        assert platform.find_compiler() == platform.Compiler(str(path), "1.0")
        providers.require_compiler()


@posix
def test_one_that_does_not_run_is_passed_over(compilers: Path) -> None:
    program(compilers / "c++", "exit 1")
    path = program(compilers / "g++", "echo g++ 2")
    assert platform.find_compiler() == platform.Compiler(str(path), "2")


@posix
def test_cxx_comes_first(compilers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(compilers / "c++", "echo usual")
    own = program(compilers / "own", "echo own")
    monkeypatch.setenv("CXX", f"{own} -flag")
    found = platform.find_compiler()
    assert found is not None
    assert found.version == "own"
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert platform.find_compiler() is None  # CMake would take no other either


@posix
@pytest.mark.parametrize("form", ["{}", "'{}' -flag", '"{}"', "{escaped} -flag"])
def test_cxx_in_a_folder_with_a_space_as_cmake_reads_it(
    compilers: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    own = program(compilers / "my tools" / "own", "echo own")
    monkeypatch.setenv("CXX", form.format(own, escaped=str(own).replace(" ", "\\ ")))
    words = ("-flag",) if "-flag" in form else ()
    assert platform.find_compiler() == platform.Compiler(str(own), "own", words)
    words = probe.tool_commands("linux", os.environ["CXX"])
    assert probe.run_all({"CXX": words["CXX"]})["CXX"].out == "own\n"


@posix
def test_a_quote_without_its_end(compilers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "'g++")
    assert platform.find_compiler() is None


@posix
def test_a_launcher_before_the_compiler(compilers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CXX="ccache g++": the version of g++ is what a build depends on."""
    program(compilers / "g++", "echo g++ 2")
    program(compilers / "ccache", '[ "$1" = --version ] && echo ccache 4 || exec "$@"')
    monkeypatch.setenv("CXX", "ccache g++")
    found = platform.find_compiler()
    assert found is not None
    assert found.version.endswith("2")


@posix
@pytest.mark.parametrize(("name", "calls"), [("g++-12", 1), ("clang-16", 1), ("ccache", 2)])
def test_a_compiler_is_asked_once_for_its_version_until_it_changes(
    compilers: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    calls: int,
) -> None:
    monkeypatch.setenv("LLAMA_PIPELINE_HOME", str(tmp_path))
    (tmp_path / "run").mkdir()
    log = tmp_path / "calls"
    real = program(compilers / name, f"echo call >> {log}; echo version 1")
    (compilers / "c++").symlink_to(real)

    def version() -> str:
        platform._version_text.cache_clear()  # as in another process
        found = platform.find_compiler()
        assert found
        return found.version

    assert [version(), version()] == ["version 1"] * 2
    assert log.read_text().count("call") == calls
    program(real, "echo version 22")
    assert version() == "version 22"


def test_none_is_an_error_that_says_what_to_install(compilers: Path) -> None:
    with pytest.raises(PipelineError, match="no C\\+\\+ compiler was found") as caught:
        providers.require_compiler()
    for word in ("apt install", "dnf install", "xcode-select", "winget"):
        assert word in caught.value.hint


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++ here")
def test_the_real_one() -> None:
    found = platform.find_compiler()
    assert found is not None
    assert Path(found.path).exists()
    assert re.search(r"\d+\.\d+", found.version)
