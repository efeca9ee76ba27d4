"""Compile llama.cpp into `bins/<platform>-<backend>/`."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline.core import receipts
from pipeline.core.errors import PipelineError
from pipeline.core.locks import only_one
from pipeline.core.paths import Home
from pipeline.core.process import WINDOWS, capture, last_lines, run
from pipeline.core.progress import bar
from pipeline.core.publish import (
    full_disk_is_an_error,
    is_cut,
    part,
    publish_folder,
    recover_folder,
    remove,
    require_space,
)
from pipeline.core.receipts import Recipe
from pipeline.core.say import say

from . import host
from .backends import Backend
from .source import Source

PROGRAMS = (
    "llama-server",
    "llama-quantize",
    "llama-gguf-split",
    "llama-perplexity",
    "llama-imatrix",
    "llama-bench",
    "llama-fit-params",
)
BUILD_BYTES = 700_000_000  # of a build folder and what is published from it
FIRST_ERRORS = 5
COMPILER_VARIABLES = ("CC", "CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS")
FIXED_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",  # on, it may download whatever is the latest
    "-DGGML_CCACHE=OFF",  # upstream's way of using it; ours is the launcher below
    "-DLLAMA_BUILD_NUMBER=0",  # unset, upstream asks the git of whatever folder it lies in
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """One build: of what, for what, and where. Nothing is done yet."""

    source: Source
    backend: Backend
    home: Home

    @property
    def tag(self) -> str:
        return f"{host.platform_tag()}-{self.backend.name}"

    @property
    def target(self) -> Path:
        return self.home.bins / self.tag

    @property
    def folder(self) -> Path:
        """CMake's folder; it stays, so that the next build does only what changed."""
        return self.home.bins / ".build" / self.tag

    @property
    def log(self) -> Path:
        return self.home.logs / f"build-{self.tag}.log"


def program_file(name: str) -> str:
    """The file name of a program on this system."""
    return f"{name}.exe" if WINDOWS else name


def options(build: Build) -> tuple[str, ...]:
    """The CMake options that shape the result."""
    commit = f"-DLLAMA_BUILD_COMMIT={build.source.commit[:9]}"
    return (*FIXED_OPTIONS, commit, *build.backend.options)


def recipe(build: Build) -> Recipe:
    """Everything that the programs depend on. They are built for this very processor."""
    compiler = host.find_compiler()
    return {
        "step": "build",
        "source": build.source.recipe(),
        "backend": build.backend.name,
        "options": list(options(build)),
        # Without a compiler nothing can be built again, and what is there is taken as it is.
        "compiler": compiler.version if compiler else _recorded(build, "compiler"),
        "environment": {
            name: os.environ[name] for name in COMPILER_VARIABLES if name in os.environ
        },
        "tools": {"cmake": version("cmake"), "ninja": version("ninja")},
        "cpu": host.cpu_identity(),
    }


def _recorded(build: Build, key: str) -> Any:
    entry = receipts.load(build.target).get(program_file("llama-server"))
    return entry.recipe.get(key) if entry else None


def is_current(build: Build) -> bool:
    """Whether every program stands in `bins/` as this recipe made it."""
    wanted = recipe(build)
    return not is_cut(build.target) and all(
        receipts.status(build.target / program_file(name), wanted) is receipts.Status.CURRENT
        for name in PROGRAMS
    )


def configure_argv(build: Build, tools: Mapping[str, str], ccache: str | None) -> list[str]:
    """The CMake command that makes the build folder."""
    launchers = [
        f"-DCMAKE_{language}_COMPILER_LAUNCHER={ccache or ''}" for language in ("C", "CXX")
    ]
    return [
        *(tools["cmake"], "-S", str(build.source.folder), "-B", str(build.folder)),
        *("-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tools['ninja']}"),
        *options(build),
        *launchers,
    ]


def make(build: Build, *, force: bool = False) -> None:
    """Compile and publish, unless it stands already. Raises PipelineError."""
    with full_disk_is_an_error(build.target.parent), only_one(build.target):
        recover_folder(build.target)
        wanted = recipe(build)
        files = [build.target / program_file(name) for name in PROGRAMS]
        if not force and all(receipts.settle(file, wanted) for file in files):
            return
        host.require_compiler()
        start = time.monotonic()
        if force:
            remove(build.folder)
        require_space(build.folder, 0 if build.folder.exists() else BUILD_BYTES)
        _compile(build)
        made = part(build.target)
        remove(made)
        try:
            made.mkdir()
            entries = {}
            for file in files:
                copy = made / file.name
                shutil.copy2(build.folder / "bin" / file.name, copy)
                entries[file.name] = receipts.stamp(copy, wanted, seconds=time.monotonic() - start)
            _try_out(made / program_file("llama-server"), build.log)
            receipts.save(made, entries)
            publish_folder(made, build.target)
        finally:
            remove(made)


def clean(build: Build) -> None:
    """Remove the published programs and the build folder."""
    remove(build.target)
    remove(build.folder)


def forget(build: Build) -> None:
    """Drop the receipts of the published programs."""
    for name in PROGRAMS:
        receipts.forget(build.target / program_file(name))


def _compile(build: Build) -> None:
    tools = _tools()
    ccache = shutil.which("ccache")
    env = {
        **os.environ,
        "NINJA_STATUS": "[%f/%t] ",
        # Two checkouts share what they compiled: paths below the home count as relative.
        "CCACHE_BASEDIR": str(build.home.root),
        "CCACHE_NOHASHDIR": "1",
    }
    # CMake keeps the compiler and the folders that it first saw, whatever it is told later.
    toolchain = build.folder / ".toolchain.json"
    now = json.dumps([str(build.folder), str(build.source.folder), *_toolchain(build)])
    if not toolchain.is_file() or toolchain.read_text(encoding="utf-8") != now:
        remove(build.folder)
        build.folder.mkdir(parents=True)
        toolchain.write_text(now, encoding="utf-8")
    errors: list[str] = []

    def watch(line: str) -> None:
        counter = re.match(r"\[(\d+)/(\d+)\] ", line)
        if counter:
            update(int(counter[1]), int(counter[2]))
        elif re.search(r"\berror\b:|CMake Error|No space left|undefined reference", line, re.I):
            errors.append(line.strip())

    with bar(f"building llama.cpp for {build.tag}") as update:
        status = run(configure_argv(build, tools, ccache), log=build.log, env=env, on_line=watch)
        if status == 0:
            command = [tools["cmake"], "--build", str(build.folder), "--target", *PROGRAMS]
            status = run(command, log=build.log, env=env, on_line=watch, append=True)
    if status:
        shown = "\n".join(f"  | {line}" for line in errors[:FIRST_ERRORS]) or last_lines(build.log)
        full = any("No space left" in line for line in errors)
        raise PipelineError(
            f"llama.cpp could not be built (status {status}):\n{shown}",
            "the disk is full: free some space and run the same command again"
            if full
            else f"the whole log is {build.log}",
        )


def _tools() -> dict[str, str]:
    """cmake and ninja out of the environment's own packages."""
    import cmake
    import ninja

    return {
        "cmake": str(Path(cmake.CMAKE_BIN_DIR) / program_file("cmake")),
        "ninja": str(Path(ninja.BIN_DIR) / program_file("ninja")),
    }


def _toolchain(build: Build) -> list[Any]:
    wanted = recipe(build)
    return [wanted["compiler"], wanted["environment"], wanted["tools"], wanted["cpu"]]


def _try_out(server: Path, log: Path) -> None:
    """What does not start is not published."""
    told = capture([server, "--version"])
    if not told:
        raise PipelineError(
            f"the llama-server just built does not run ({server.name} --version fails)",
            f"the build's log is {log}",
        )
    say("built llama.cpp " + told.splitlines()[0].removeprefix("version: "))
