"""Shared libraries, made with the system's compiler."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.bins.compile import build

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("gcc"), reason="makes ELF files with gcc"
)


def library(folder: Path, name: str, *needs: Path, version: str = "") -> Path:
    """`lib<name>.so`, whose name for the loader ends in `version`; a link leads from that name."""
    folder.mkdir(exist_ok=True)
    path, loaded = folder / f"lib{name}.so{version}.9" if version else folder / f"lib{name}.so", ""
    source = folder / f"{name}.c"
    called = "".join(f"extern int {need_name(need)}(void);" for need in needs)
    calls = "".join(f" + {need_name(need)}()" for need in needs)
    source.write_text(f"{called} int {name}(void) {{ return 1{calls}; }}")
    loaded = f"lib{name}.so{version}"
    link(path, source, *needs, words=("-shared", "-fPIC", f"-Wl,-soname,{loaded}"))
    if version:
        (folder / loaded).symlink_to(path.name)
    return path


def need_name(path: Path) -> str:
    return path.name.partition(".")[0].removeprefix("lib")


def program(folder: Path, *needs: Path) -> Path:
    source = folder / "main.c"
    called = "".join(f"extern int {need_name(need)}(void);" for need in needs)
    calls = "".join(f" + {need_name(need)}()" for need in needs)
    source.write_text(f"{called} int main(void) {{ return 0{calls}; }}")
    link(folder / "program", source, *needs, words=())
    return folder / "program"


def link(path: Path, source: Path, *needs: Path, words: tuple[str, ...]) -> None:
    linker = ("-Wl,-rpath,$ORIGIN", "-Wl,--allow-shlib-undefined")
    subprocess.run(["gcc", *words, "-o", path, source, *needs, *linker], check=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "bïn aries"
    made.mkdir()
    return made


def test_what_is_needed(folder: Path) -> None:
    inner = library(folder, "inner", version=".1")
    outer = library(folder, "outer", inner)
    made = program(folder, outer)
    assert build.needed(made)[0] == "libouter.so"
    assert "libc.so.6" in build.needed(made)
    assert build.needed(outer)[0] == "libinner.so.1"


def test_the_closure_is_what_lies_in_the_folders(folder: Path, tmp_path: Path) -> None:
    inner = library(tmp_path / "second", "inner", version=".1")
    outer = library(folder, "outer", inner, version=".0")
    alone = library(tmp_path / "single", "alone")
    library(folder, "unused")
    made = program(folder, outer, alone)
    folders = [folder, tmp_path / "second"]
    assert build.needed_libraries(
        [made], folders, {"libalone.so": alone, "libother.so": alone}
    ) == {
        "libouter.so.0": folder / "libouter.so.0",
        "libinner.so.1": tmp_path / "second" / "libinner.so.1",
        "libalone.so": alone,
    }
    assert build.needed_libraries([made], [folder], {}) == {
        "libouter.so.0": folder / "libouter.so.0"
    }
    assert build.needed_libraries([made], [], {}) == {}


def test_the_closure_runs_beside_the_program(folder: Path, tmp_path: Path) -> None:
    inner = library(folder, "inner", version=".1")
    outer = library(folder, "outer", inner, version=".0")
    made = program(folder, outer)
    there = tmp_path / "moved ü"
    there.mkdir()
    files = {"program": made} | build.needed_libraries([made], [folder], {})
    for name, file in files.items():
        shutil.copy2(file, there / name)
    shutil.rmtree(folder)
    assert subprocess.run([there / "program"], check=False).returncode == 2


@pytest.mark.parametrize("content", [b"", b"#!/bin/sh\n", b"\x7fELF", b"\x7fELF" + bytes(60)])
def test_what_is_no_program_needs_nothing(folder: Path, content: bytes) -> None:
    (folder / "script").write_bytes(content)
    assert build.needed(folder / "script") == []
    assert build.needed_libraries([folder / "script"], [folder], {}) == {}
