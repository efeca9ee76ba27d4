"""The build, with a stand-in of six lines for llama.cpp: real CMake, Ninja and compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.bins import build, compiling, host
from pipeline.bins.backends import Backend
from pipeline.bins.build import Build
from pipeline.bins.programs import PROGRAMS, program_file
from pipeline.bins.source import Source
from pipeline.core import receipts
from pipeline.core.errors import PipelineError
from pipeline.core.paths import Home
from pipeline.core.publish import part

compiles = pytest.mark.skipif(
    os.name == "nt" or not shutil.which("g++"), reason="compiles, with scripts around g++"
)
CPU = Backend(name="cpu", options=("-DGGML_METAL=OFF",))
TOOLS = {"cmake": "/tools/cmake", "ninja": "/tools/ninja"}
LISTS = f"""
cmake_minimum_required(VERSION 3.20)
project(stand_in LANGUAGES CXX)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${{CMAKE_BINARY_DIR}}/bin)
foreach(name {" ".join(PROGRAMS)})
  add_executable(${{name}} main.cpp)
endforeach()
"""
MAIN = """
#include <cstdio>
#ifndef WHO
#define WHO 0
#endif
int main() { std::printf("version: stand-in %d\\n", WHO); return 0; }
"""


@pytest.fixture(autouse=True)
def _surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CC", "CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CCACHE_DIR", str(tmp_path / "ccache"))


@pytest.fixture
def plan(tmp_path: Path) -> Build:
    folder = tmp_path / "source ü"
    folder.mkdir()
    (folder / "CMakeLists.txt").write_text(LISTS)
    (folder / "main.cpp").write_text(MAIN)
    source = Source(folder=folder, commit="0123456789" * 4, tree="t" * 40, local=True)
    return Build(source=source, backend=CPU, home=Home(tmp_path / "home"))


def compiler(path: Path, who: int) -> Path:
    """A compiler that leaves its mark in what it makes."""
    path.write_text(
        f'#!/bin/sh\n[ "$*" = --version ] && echo "compiler {who}" && exit\n'
        f'exec g++ -DWHO={who} "$@"\n'
    )
    path.chmod(0o755)
    return path


def told(plan: Build, name: str = "llama-server") -> str:
    return subprocess.check_output([plan.target / program_file(name)], text=True).strip()


# The plan


def test_places(plan: Build) -> None:
    assert plan.tag == f"{host.platform_tag()}-cpu"
    assert plan.target == plan.home.bins / plan.tag
    assert plan.work_folder.parent == plan.home.bins / ".build"
    assert plan.log.parent == plan.home.logs


def test_program_files() -> None:
    assert program_file("llama-server") == "llama-server" + (".exe" if os.name == "nt" else "")
    assert {"llama-server", "llama-quantize"} <= set(PROGRAMS)


@pytest.mark.parametrize(("ccache", "launcher"), [(None, ""), ("/usr/bin/ccache",) * 2])
def test_configure_argv(plan: Build, ccache: str | None, launcher: str) -> None:
    argv = compiling.configure_argv(build.work(plan), TOOLS, ccache)
    assert argv[0] == "/tools/cmake"
    assert argv[argv.index("-S") + 1] == str(plan.source.folder)
    assert argv[argv.index("-B") + 1] == str(plan.work_folder)
    assert argv[argv.index("-G") + 1] == "Ninja"
    assert {
        "-DCMAKE_MAKE_PROGRAM=/tools/ninja",
        "-DCMAKE_BUILD_TYPE=Release",
        "-DLLAMA_USE_PREBUILT_UI=OFF",
        "-DLLAMA_BUILD_COMMIT=012345678",
        f"-DCMAKE_CXX_COMPILER_LAUNCHER={launcher}",
        f"-DCMAKE_C_COMPILER_LAUNCHER={launcher}",
        *plan.backend.options,
    } <= set(argv)
    assert argv == compiling.configure_argv(build.work(plan), TOOLS, ccache)


def test_the_recipe_names_everything(plan: Build) -> None:
    recipe = plan.recipe()
    assert recipe == plan.recipe()
    assert recipe["source"] == {"commit": plan.source.commit, "tree": plan.source.tree}
    assert recipe["options"] == list(build.options(plan))
    assert recipe["cpu"] == host.cpu_identity()
    others = [
        replace(plan, source=replace(plan.source, commit="f" * 40)),
        replace(plan, source=replace(plan.source, tree="u" * 40)),
        replace(plan, backend=Backend(name="cuda", options=plan.backend.options)),
        replace(plan, backend=Backend(name="cpu", options=("-DMORE=ON",))),
        replace(plan, backend=Backend(name="cpu", options=CPU.options, tools={"nvcc": "13.4"})),
        replace(plan, portable=True),
    ]
    assert all(other.recipe() != recipe for other in others)


def test_where_things_lie_is_no_part_of_the_recipe(plan: Build, tmp_path: Path) -> None:
    moved = replace(plan.source, folder=tmp_path / "moved")
    other = Build(source=moved, backend=plan.backend, home=Home(tmp_path / "other"))
    assert other.recipe() == plan.recipe()


@compiles
@pytest.mark.parametrize("name", ["CXX", "CC", "CXXFLAGS", "CFLAGS", "LDFLAGS"])
def test_what_cmake_takes_from_the_environment_is_in_the_recipe(
    plan: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    before = plan.recipe()
    value = str(compiler(tmp_path / "own", 1)) if name in ("CC", "CXX") else "-DWHO=1"
    monkeypatch.setenv(name, value)
    assert plan.recipe() != before


def test_without_a_compiler_nothing_is_begun(
    plan: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not plan.is_current()
    with pytest.raises(PipelineError, match="no C\\+\\+ compiler"):
        plan.make()
    assert [path for path in plan.home.root.rglob("*") if path.suffix != ".lock"] == [
        plan.home.bins
    ]


# The work


@compiles
def test_compiled_once(plan: Build, capsys: pytest.CaptureFixture[str]) -> None:
    assert not plan.is_current()
    plan.make()
    shown = capsys.readouterr().err
    assert shown.count("+ ") == 2
    assert "built llama.cpp stand-in 0" in shown
    assert f"building llama.cpp for {plan.tag}: 100 %" in shown
    assert plan.is_current()
    assert {told(plan, name) for name in PROGRAMS} == {"version: stand-in 0"}
    assert set(receipts.load(plan.target)) == {program_file(name) for name in PROGRAMS}
    assert sorted(path.name for path in plan.home.bins.iterdir() if path.suffix != ".lock") == [
        *(".build", plan.tag)
    ]

    plan.make()
    assert capsys.readouterr().err == ""

    for file in plan.target.glob("llama-*"):  # a copy is hashed, not built
        os.utime(file, ns=(1, 1))
    assert not plan.is_current()
    plan.make()
    assert "+ " not in capsys.readouterr().err
    assert plan.is_current()

    plan.make(force=True)
    assert "+ " in capsys.readouterr().err

    (plan.target / program_file("llama-bench")).unlink()
    assert not plan.is_current()
    plan.make()
    assert plan.is_current()

    # A kill after the exchange leaves the old programs beside; they are removed, nothing is made.
    shutil.copytree(plan.target, part(plan.target))
    assert not plan.is_current()
    capsys.readouterr()
    plan.make()
    assert plan.is_current() and not part(plan.target).exists()
    assert "+ " not in capsys.readouterr().err

    plan.forget()
    assert receipts.load(plan.target) == {}
    plan.forget()
    assert not plan.is_current()
    assert told(plan) == "version: stand-in 0"
    plan.clean()
    assert not plan.target.exists()
    assert not plan.work_folder.exists()


@compiles
@pytest.mark.parametrize("name", ["compiler-2", "compiler-1"], ids=["other", "upgraded"])
def test_another_compiler_really_compiles(
    plan: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The build folder stays, and CMake and Ninja go on with the compiler that they know."""
    for who, file in ((1, "compiler-1"), (2, name)):
        monkeypatch.setenv("CXX", str(compiler(tmp_path / file, who)))
        plan.make()
        assert plan.is_current()
        assert told(plan) == f"version: stand-in {who}"


@compiles
@pytest.mark.parametrize("what", ["home", "source"])
def test_what_was_moved_is_built_again_on_demand(plan: Build, tmp_path: Path, what: str) -> None:
    """CMake refuses a folder that it made elsewhere, or for files elsewhere."""
    plan.make()
    if what == "home":
        plan.home.root.rename(tmp_path / "moved")
        moved = replace(plan, home=Home(tmp_path / "moved"))
    else:
        folder = plan.source.folder.rename(tmp_path / "moved")
        moved = replace(plan, source=replace(plan.source, folder=folder))
    assert moved.is_current()
    moved.make(force=True)
    assert told(moved) == "version: stand-in 0"
    assert plan.home.root.exists() == (what == "source")


@compiles
def test_programs_stay_current_where_the_compiler_was_removed(
    plan: Build,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan.make()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert plan.is_current()

    for file in plan.target.glob("llama-*"):  # a copy is hashed, which takes no compiler
        os.utime(file, ns=(1, 1))
    assert not plan.is_current()
    capsys.readouterr()
    plan.make()
    assert "+ " not in capsys.readouterr().err
    assert plan.is_current()

    with pytest.raises(PipelineError, match="no C\\+\\+ compiler"):
        plan.make(force=True)
    assert plan.is_current()


@compiles
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("int main() { return nothing_of_that_name; }", "error: .*nothing_of_that_name"),
        ("int other(); int main() { return other(); }", "undefined reference to .other"),
        ("int main() { return 1; }", "does not run"),
        ("int main() { __builtin_trap(); }", "does not run"),
        ("int main() { return 0; }", "does not run"),
    ],
    ids=["compiler", "linker", "status", "crash", "silent"],
)
def test_what_is_no_good_is_not_published(plan: Build, wrong: str, message: str) -> None:
    (plan.source.folder / "main.cpp").write_text(wrong)
    plan.target.mkdir(parents=True)
    (plan.target / "old").touch()
    with pytest.raises(PipelineError, match=message) as caught:
        plan.make()
    assert str(plan.log) in caught.value.hint
    assert [path.name for path in plan.target.iterdir()] == ["old"]
    assert not (plan.home.bins / f".{plan.tag}.part").exists()
    assert not plan.is_current()


@compiles
def test_what_a_killed_run_left_is_mended(plan: Build) -> None:
    for left in (f".{plan.tag}.part", f".{plan.tag}.old"):
        (plan.home.bins / left).mkdir(parents=True)
        (plan.home.bins / left / "half").touch()
    plan.make()
    assert plan.is_current()
    assert sorted(path.name for path in plan.home.bins.iterdir() if path.suffix != ".lock") == [
        *(".build", plan.tag)
    ]


@compiles
def test_cmake_itself_fails(plan: Build) -> None:
    (plan.source.folder / "CMakeLists.txt").write_text("message(FATAL_ERROR no)")
    with pytest.raises(PipelineError, match="CMake Error"):
        plan.make()
    assert not plan.target.exists()
