"""A stand-in for another revision of llama.cpp's source: CMake "builds" it in a second.

Its programs are the compiled ones, byte for byte but for what `changes` replaces in them (by texts
of the same length), so that they really load, quantize and serve.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from pipeline.bins.binaries import PROGRAMS

LISTS = """
cmake_minimum_required(VERSION 3.20)
project(stand_in LANGUAGES NONE)
foreach(name {programs})
  add_custom_target(${{name}} COMMAND "{python}" -I -S "${{CMAKE_SOURCE_DIR}}/make.py" ${{name}}
    "{built}" "${{CMAKE_BINARY_DIR}}/bin")
endforeach()
"""
MAKE = """
import json, pathlib, shutil, sys, time
name, built, made = sys.argv[1], *map(pathlib.Path, sys.argv[2:])
told = json.loads(pathlib.Path(__file__).with_name("told.json").read_text())
time.sleep(told["seconds"])
if told["error"]:
    sys.exit("main.cpp:1:1: error: " + told["error"])
data = (built / name).read_bytes()
for old, new in told["changes"].get(name, {}).items():
    assert data.count(old.encode()) and len(old) == len(new), old
    data = data.replace(old.encode(), new.encode())
made.mkdir(exist_ok=True)
(made / name).write_bytes(told["scripts"].get(name, "").encode() or data)
(made / name).chmod(0o755)
"""
CONVERTER = ("conversion", "gguf-py", "convert_hf_to_gguf.py")
KNOWN = '"""The converter."""\nTEXT_MODEL_MAP: dict[str, str] = {{\n{lines}}}\n'


def make(
    folder: Path,
    built: Path,
    *,
    changes: Mapping[str, Mapping[str, str]] | None = None,
    scripts: Mapping[str, str] | None = None,
    architectures: tuple[str, ...] = ("LlamaForCausalLM",),
    error: str = "",
    seconds: float = 0,
) -> Path:
    """Write it into `folder`; `built` are the compiled programs. `scripts` take the place of whole
    programs, `error` fails the build, `seconds` draw out each program."""
    folder.mkdir(parents=True)
    lists = LISTS.format(programs=" ".join(PROGRAMS), python=sys.executable, built=built)
    (folder / "CMakeLists.txt").write_text(lists)
    (folder / "make.py").write_text(MAKE)
    (folder / "LICENSE").write_text("as its authors say\n")
    told = {"changes": changes or {}, "scripts": scripts or {}, "error": error, "seconds": seconds}
    (folder / "told.json").write_text(json.dumps(told))
    (folder / "conversion").mkdir()
    lines = "".join(f'    "{name}": "x",\n' for name in architectures)
    (folder / "conversion" / "__init__.py").write_text(KNOWN.format(lines=lines))
    return folder


def with_converter(folder: Path, source: Path) -> Path:
    """Put the real converter of `source` into a stand-in, so that it converts, too."""
    shutil.rmtree(folder / "conversion")
    for name in CONVERTER:
        here = source / name
        (shutil.copytree if here.is_dir() else shutil.copy)(here, folder / name)
    return folder


def own_sources(home: Path) -> None:
    """Give a home its own folder of sources in place of the link to the checkout's, to which
    nothing is to be added."""
    sources = home / "bins" / ".source"
    if sources.is_symlink():
        shared = sources.resolve()
        sources.unlink()
        sources.mkdir()
        shutil.copy(shared / ".state.json", sources)
        for folder in shared.iterdir():
            if folder.is_dir():
                (sources / folder.name).symlink_to(folder)
