"""This machine, as far as a build depends on it."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import shutil
import sys
from functools import cache
from pathlib import Path

from msgspec import Struct

from pipeline.core import paths
from pipeline.core.process import capture
from pipeline.core.store import stat_cache

SYSTEMS = {"linux": "linux", "darwin": "macos", "win32": "windows"}
MACHINES = {"x86_64": "x64", "amd64": "x64", "aarch64": "arm64", "arm64": "arm64"}


class Compiler(Struct, frozen=True):
    """A C++ compiler. `version` is the line with which it names itself; `words`: what CXX says
    behind the program, such as the compiler behind a launcher."""

    path: str
    version: str
    words: tuple[str, ...] = ()


def platform_tag() -> str:
    """`linux-x64`, `macos-arm64`, `windows-x64` and so on."""
    machine = platform.machine().lower()
    return f"{SYSTEMS.get(sys.platform, sys.platform)}-{MACHINES.get(machine, machine)}"


def cpu_identity() -> str:
    """What a build for this very processor depends on: its model and its features, hashed."""
    if sys.platform == "linux":
        # The first processor's paragraph is enough, and reading on costs with every core.
        with Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as file:
            first = file.read(8192).partition("\n\n")[0]
        lines = [
            line
            for line in first.splitlines()
            if line.startswith(("model name", "flags", "Features", "CPU part", "CPU implementer"))
        ]
        text = "\n".join(lines)
    elif sys.platform == "darwin":
        text = capture(["sysctl", "-n", "machdep.cpu.brand_string"]) or platform.processor()
    else:
        text = platform.processor()
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def compiler_words(value: str) -> list[str]:
    """The words of CXX as CMake reads them: the path of a program, which may hold spaces, or
    a command line in which such a path is quoted."""
    if shutil.which(value.strip()):
        return [value.strip()]
    if os.name == "nt":  # where a backslash quotes nothing
        return value.split()
    try:
        return shlex.split(value)
    except ValueError:  # a quote has no end
        return value.split()


def find_compiler() -> Compiler | None:
    """The C++ compiler that CMake will take: CXX, else the first of the usual names."""
    chosen = compiler_words(os.environ.get("CXX", ""))
    for name in chosen[:1] or ["c++", "g++", "clang++", "cl"]:
        path = shutil.which(name)
        # CXX may hold words of its own, such as a launcher before the compiler
        words = () if name == "cl" else (*chosen[1:], "--version")
        version = path and _version_text(path, words, *stat_cache.stamp(Path(path)))
        if path and version:
            # GCC begins with the name it was called by, which is irrelevant
            line = version.splitlines()[0].removeprefix(name).strip()
            return Compiler(path, line, tuple(chosen[1:]))
    return None


@cache  # several steps call it
def _version_text(path: str, words: tuple[str, ...], *stamp: int) -> str | None:
    """What a compiler prints as its version, which takes 20 ms. Cached where the program is the
    compiler itself: a launcher or a script stays the same when the compiler changes."""
    command = [path, *words]
    program = Path(path)
    if not re.fullmatch(r"(\w+-linux-gnu-)?(g\+\+-\d+|clang(-\d+)?)", program.resolve().name):
        return capture(command)
    book = paths.home().run / "compilers.json"
    kept = stat_cache.recall(book, program)
    if isinstance(kept, dict) and command == kept.get("command"):
        return str(kept["answer"])
    answer = capture(command)
    if answer and book.parent.is_dir():  # the steps create the home; looking at them does not
        stat_cache.remember(book, program, {"command": command, "answer": answer}, [*stamp])
    return answer
