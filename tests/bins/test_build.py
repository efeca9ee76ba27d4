"""The build, with a stand-in of six lines for llama.cpp: real CMake, Ninja and compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from msgspec.structs import replace

from pipeline.bins import platform
from pipeline.bins.binaries import PROGRAMS, QUANTIZER, hidden_cards, program_file
from pipeline.bins.compile import build, cmake
from pipeline.bins.compile.backends import Backend
from pipeline.bins.compile.build import Build
from pipeline.bins.compile.source import Source
from pipeline.core.errors import PipelineError
from pipeline.core.paths import Home
from pipeline.core.pins import pins
from pipeline.core.store import receipts
from pipeline.core.store.hashing import sha256
from pipeline.core.store.publish import part

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
    assert plan.tag == f"{platform.platform_tag()}-cpu"
    assert plan.target == plan.home.bins / plan.tag
    assert plan.work_folder.parent == plan.home.bins / ".build"
    assert plan.log.parent == plan.home.logs


def test_program_files() -> None:
    assert program_file("llama-server") == "llama-server" + (".exe" if os.name == "nt" else "")
    assert program_file("llama-server", windows=True) == "llama-server.exe"
    assert program_file("llama-server", windows=False) == "llama-server"
    assert {"llama-server", "llama-quantize"} <= set(PROGRAMS)


@pytest.mark.parametrize(("ccache", "launcher"), [(None, ""), ("/usr/bin/ccache",) * 2])
def test_configure_argv(plan: Build, ccache: str | None, launcher: str) -> None:
    argv = cmake.configure_argv(build.work(plan), TOOLS, ccache)
    assert argv[0] == "/tools/cmake"
    assert argv[argv.index("-S") + 1] == str(plan.source.folder)
    assert argv[argv.index("-B") + 1] == str(plan.work_folder)
    assert argv[argv.index("-G") + 1] == "Ninja"
    assert {
        "-DCMAKE_MAKE_PROGRAM=/tools/ninja",
        "-DCMAKE_BUILD_TYPE=Release",
        "-DLLAMA_USE_PREBUILT_UI=OFF",
        "-DLLAMA_BUILD_COMMIT=012345678",
        "-DGGML_BUILD_COMMIT=012345678",
        f"-DCMAKE_CXX_COMPILER_LAUNCHER={launcher}",
        f"-DCMAKE_C_COMPILER_LAUNCHER={launcher}",
        *plan.backend.options,
    } <= set(argv)
    assert argv == cmake.configure_argv(build.work(plan), TOOLS, ccache)


def test_the_recipe_names_everything(plan: Build) -> None:
    recipe = plan.recipe()
    assert recipe == plan.recipe()
    assert recipe["source"] == {"commit": plan.source.commit, "tree": plan.source.tree}
    assert recipe["options"] == list(build.options(plan))
    assert recipe["cpu"] == platform.cpu_identity()
    others = [
        replace(plan, source=replace(plan.source, commit="f" * 40)),
        replace(plan, source=replace(plan.source, tree="u" * 40)),
        replace(plan, backend=Backend(name="cuda", options=plan.backend.options)),
        replace(plan, backend=Backend(name="cpu", options=("-DMORE=ON",))),
        replace(plan, backend=Backend(name="cpu", options=CPU.options, tools={"nvcc": "13.4"})),
        replace(plan, portable=True),
        *([replace(plan, source=replace(plan.source, fetched=True))] * (sys.platform == "linux")),
    ]
    assert all(other.recipe() != recipe for other in others)


@pytest.mark.skipif(sys.platform != "linux", reason="files are compiled one by one elsewhere")
def test_only_what_is_not_edited_is_compiled_together(plan: Build) -> None:
    assert not any("_INCLUDE=" in word for word in build.work(plan).options)
    fetched = replace(plan, source=replace(plan.source, fetched=True))
    hook = build.work(fetched).options[-1]
    assert hook == f"-DCMAKE_PROJECT_llama.cpp_INCLUDE={build.UNITED}"
    assert fetched.recipe()["united"] == sha256(build.UNITED)


@pytest.mark.skipif(sys.platform != "linux", reason="the library is made on Linux alone")
def test_the_pinned_source_gives_the_library_that_quantizes(plan: Build) -> None:
    assert QUANTIZER not in plan.required() and plan.recipe()["quantizer"] is None
    source = replace(plan.source, tree=pins().llama_cpp_tree, local=False)
    pinned = replace(plan, source=source)
    assert QUANTIZER in pinned.required() and QUANTIZER in build.made_files(pinned)
    work = build.work(pinned)
    assert work.targets[-1] == "ggml-quantizer"
    assert work.options[-1] == f"-DCMAKE_PROJECT_llama.cpp_INCLUDE={build.QUANTIZER_FILES[0]}"
    assert pinned.recipe()["quantizer"] == [sha256(file) for file in build.QUANTIZER_FILES]
    portable = replace(pinned, portable=True)  # whose programs share ggml's library
    assert portable.has_quantizer and QUANTIZER not in portable.required()


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
    with pytest.raises(PipelineError, match="no C\\+\\+ compiler") as caught:
        plan.make()
    assert "apt install g++" in caught.value.hint
    monkeypatch.setenv("CXX", "clang++-99 -O2")
    with pytest.raises(PipelineError, match="CXX=clang\\+\\+-99 -O2 names none") as caught:
        plan.make()
    assert "unset CXX" in caught.value.hint
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
def test_a_changed_library_stays_unfit_though_no_build_succeeds(plan: Build) -> None:
    """Its receipt must not get lost, or it would be taken for a file of somebody else's."""
    plan.make()
    library = plan.target / "libggml-cuda.so"
    library.write_text("as it was built")
    receipts.change(library, receipts.stamp(library, plan.recipe(), seconds=0))
    assert plan.is_current()
    library.write_text("as it was BUILT")
    os.utime(library, ns=(1, 1))
    (plan.source.folder / "main.cpp").write_text("int main() {")
    for _ in range(2):
        with pytest.raises(PipelineError, match="could not be built"):
            plan.make()
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
    (plan.source.folder / "CMakeLists.txt").write_text(
        'message(FATAL_ERROR "there is no\n\n  \\"Vulkan\\"\n\n(missing: loader)")'
    )
    with pytest.raises(PipelineError, match="CMake Error") as caught:
        plan.make()
    assert '(message): there is no "Vulkan" (missing: loader)' in caught.value.message
    assert not plan.target.exists()


def test_jobs_reach_the_compiler(plan: Build) -> None:
    assert build.work(replace(plan, jobs=3)).jobs == 3
    assert replace(plan, jobs=3).recipe() == plan.recipe()


# Shared libraries, and devices

SHARED_LISTS = f"""
cmake_minimum_required(VERSION 3.20)
project(stand_in LANGUAGES CXX)
option(OPENMP "" OFF)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${{CMAKE_BINARY_DIR}}/bin)
set(CMAKE_LIBRARY_OUTPUT_DIRECTORY ${{CMAKE_BINARY_DIR}}/bin)
add_library(ggml-base base.cpp)
set_target_properties(ggml-base PROPERTIES VERSION 0.9.4 SOVERSION 0)
foreach(name {" ".join(PROGRAMS)})
  add_executable(${{name}} main.cpp)
  target_link_libraries(${{name}} ggml-base)
endforeach()
if(GGML_BACKEND_DL)
  add_library(ggml-cpu-x MODULE module.cpp)
  set_target_properties(ggml-cpu-x PROPERTIES PREFIX lib)
  target_link_libraries(ggml-cpu-x ggml-base)
  add_dependencies(llama-server ggml-cpu-x)
  if(OPENMP)
    target_compile_options(ggml-cpu-x PRIVATE -fopenmp)
    target_link_options(ggml-cpu-x PRIVATE -fopenmp)
  endif()
endif()
"""
BASE = 'const char *device() { return "Vulkan0: stand-in (1 MiB, 1 MiB free)"; }\n'
SHARED_MAIN = """
#include <cstdio>
#include <cstring>
const char *device();
int main(int count, char **words) {
  if (count > 1 && !std::strcmp(words[1], "--list-devices"))
    std::printf("Available devices:\\n  %s\\n", device());
  else
    std::printf("version: stand-in\\n");
  return 0;
}
"""
MODULE = """
const char *device();
#ifdef _OPENMP
#include <omp.h>
int threads() { return omp_get_max_threads(); }
#endif
const char *other() { return device(); }
"""
BASE_LIBRARY = "libggml-base.so.0"
linux = pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("g++"), reason="publishes ELF libraries"
)


@pytest.fixture
def vulkan(plan: Build) -> Build:
    folder = plan.source.folder
    (folder / "CMakeLists.txt").write_text(SHARED_LISTS)
    for name, text in (("base", BASE), ("main", SHARED_MAIN), ("module", MODULE)):
        (folder / f"{name}.cpp").write_text(text)
    return replace(plan, backend=Backend(name="vulkan"))


def listed(folder: Path) -> str:
    return subprocess.check_output([folder / "llama-server", "--list-devices"], text=True)


def published(plan: Build) -> set[str]:
    """All that lies there but the programs."""
    assert {path.name for path in plan.target.iterdir()} >= set(PROGRAMS)
    assert not any(path.is_symlink() for path in plan.target.iterdir())
    return {path.name for path in plan.target.iterdir()} - {*PROGRAMS, receipts.FILE}


@linux
def test_a_library_for_all_programs(vulkan: Build, tmp_path: Path) -> None:
    vulkan.make()
    assert published(vulkan) == {BASE_LIBRARY}
    assert set(receipts.load(vulkan.target)) == {*PROGRAMS, BASE_LIBRARY}
    assert vulkan.is_current()
    shutil.rmtree(vulkan.work_folder)
    moved = vulkan.target.rename(tmp_path / "moved ü")
    assert "Vulkan0: stand-in" in listed(moved)


@linux
def test_a_lost_library_is_published_again(vulkan: Build) -> None:
    vulkan.make()
    (vulkan.target / BASE_LIBRARY).unlink()
    assert not vulkan.is_current()
    vulkan.make()
    assert vulkan.is_current() and "Vulkan0" in listed(vulkan.target)

    (vulkan.target / BASE_LIBRARY).write_bytes(b"damaged")
    assert not vulkan.is_current()
    vulkan.make()
    assert "Vulkan0" in listed(vulkan.target)

    vulkan.forget()
    assert receipts.load(vulkan.target) == {} and not vulkan.is_current()
    vulkan.make()
    assert vulkan.is_current()
    vulkan.clean()
    assert not vulkan.target.exists() and not vulkan.work_folder.exists()


@linux
def test_without_its_device_nothing_is_published(vulkan: Build) -> None:
    vulkan.make()
    old = receipts.load(vulkan.target)
    base = vulkan.source.folder / "base.cpp"
    base.write_text(BASE.replace("Vulkan0", "CUDA0"))
    newer = replace(vulkan, source=replace(vulkan.source, tree="u" * 40))
    with pytest.raises(PipelineError, match="shows no device of vulkan") as caught:
        newer.make()
    assert "CUDA0: stand-in" in caught.value.message
    assert str(newer.log) in caught.value.hint
    assert receipts.load(vulkan.target) == old
    assert "Vulkan0" in listed(vulkan.target), "the old one stays"
    assert not part(vulkan.target).exists()

    replace(newer, elsewhere=True).make()
    assert "CUDA0" in listed(vulkan.target)
    assert newer.is_current()


@linux
@pytest.mark.parametrize("shown", ["", "-1", "NoDevFiles", "-1,0"])
def test_nothing_is_compiled_for_cards_that_the_environment_hides(
    vulkan: Build, monkeypatch: pytest.MonkeyPatch, shown: str
) -> None:
    cuda = replace(vulkan, backend=Backend(name="cuda"))
    (cuda.source.folder / "base.cpp").write_text(BASE.replace("Vulkan0", "CUDA0"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    with pytest.raises(PipelineError, match="not compiled") as caught:
        cuda.make()
    assert f"CUDA_VISIBLE_DEVICES={shown} hides all cards" in caught.value.hint
    assert not cuda.work_folder.exists()
    replace(cuda, elsewhere=True).make()
    assert cuda.is_current(), "what is there is used"
    for seen in ("0,-1", "GPU-5f2a", "MIG-9c"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
        assert not hidden_cards("cuda")


@linux
@pytest.mark.parametrize("openmp", ["OFF", "ON"])
@pytest.mark.parametrize("launched", [False, True], ids=["", "launched"])
def test_what_is_portable_takes_its_modules_along(
    vulkan: Build, monkeypatch: pytest.MonkeyPatch, openmp: str, launched: bool
) -> None:
    if launched:
        monkeypatch.setenv("CXX", "env g++")
    backend = replace(vulkan.backend, options=(f"-DOPENMP={openmp}",))
    portable = replace(vulkan, portable=True, backend=backend)
    portable.make()
    further = {"libgomp.so.1"} if openmp == "ON" else set()
    assert published(portable) == {BASE_LIBRARY, "libggml-cpu-x.so", *further}
    assert portable.target.name.endswith("-vulkan-portable")
    assert portable.recipe()["cpu"] is None
    assert portable.is_current() and not vulkan.is_current()


@linux
def test_libraries_of_a_toolkit_go_along(vulkan: Build, tmp_path: Path) -> None:
    """One file under two names, where the disk allows it; receipts and all."""
    library = tmp_path / "toolkit ü" / "libcublas.so.13"
    library.parent.mkdir()
    library.with_name("libcublas.so.13.8").write_bytes(b"large")
    library.symlink_to("libcublas.so.13.8")
    backend = replace(vulkan.backend, libraries=(library,))
    replace(vulkan, backend=backend).make()
    made = vulkan.target / library.name
    assert published(vulkan) == {BASE_LIBRARY, library.name}
    assert made.read_bytes() == b"large" and made.samefile(library)
    vulkan.clean()
    assert library.read_bytes() == b"large"


@linux
def test_backends_live_beside_each_other(plan: Build, vulkan: Build) -> None:
    vulkan.make()
    plan.make()
    assert plan.target != vulkan.target and plan.work_folder != vulkan.work_folder
    assert plan.is_current() and vulkan.is_current()
    plan.clean()
    assert vulkan.is_current()
