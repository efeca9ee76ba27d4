"""CMake and Ninja at work on a stand-in of some lines, with a real compiler and real ccache."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from conftest import REPOSITORY, wait_for
from msgspec.structs import replace
from supervisor_tools import lives

from pipeline.bins.compile import cmake
from pipeline.bins.compile.cmake import GIB, Done, Watch, Work, compile_all, forecast, record_speed
from pipeline.core import capacity
from pipeline.core.errors import PipelineError

pytestmark = pytest.mark.skipif(
    os.name == "nt" or not shutil.which("g++"), reason="compiles, with scripts around g++"
)
TARGETS = ("one", "two")
LISTS = """
cmake_minimum_required(VERSION 3.20)
project(stand_in LANGUAGES CXX)
option(EXTRA "for two" OFF)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
add_executable(one one.cpp)
add_executable(two two.cpp)
if(EXTRA)
  target_compile_definitions(two PRIVATE EXTRA=1)
endif()
"""
MAIN = """
#ifndef EXTRA
#define EXTRA 0
#endif
int main() { return EXTRA; }
"""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Work:
    for name in ("CC", "CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CCACHE_DIR", str(tmp_path / "ccache"))
    source = tmp_path / "source ü"
    source.mkdir()
    (source / "CMakeLists.txt").write_text(LISTS)
    for target in TARGETS:
        (source / f"{target}.cpp").write_text(MAIN)
    return Work(
        source=source,
        folder=tmp_path / "build ü" / "here",
        options=(),
        targets=TARGETS,
        made_with=["compiler 1"],
        backend="cpu",
        root=tmp_path,
        jobs=None,
        log=tmp_path / "log",
        speeds=tmp_path / "speeds.json",
    )


def compiler(path: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """CXX that is g++ until a file of the project is compiled."""
    path.write_text(f'#!/bin/sh\ncase "$*" in *two.cpp*) {script};; esac\nexec g++ "$@"\n')
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))


def objects(work: Work) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in work.folder.rglob("*.o")}


# How many at once


def asked(work: Work) -> str:
    (line,) = [text for text in work.log.read_text().splitlines() if " -C " in text]
    found = re.search(r" -j (\d+)", line)
    return found[1] if found else ""


def test_jobs_reach_ninja(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "processors", lambda: 7)
    monkeypatch.setattr(capacity, "memory", lambda: 3 * GIB)
    compile_all(replace(work, jobs=5))
    assert asked(work) == "3"
    compile_all(replace(work, jobs=2))
    assert asked(work) == "2"
    compile_all(work)
    assert asked(work) == "3"
    compile_all(replace(work, backend="cuda"))
    assert asked(work) == "1"


# What is compiled again


def test_only_what_depends_on_a_change(work: Work) -> None:
    first = compile_all(work)
    assert first.steps == 4
    assert not (work.folder / ".unflushed").exists()
    before = objects(work)
    assert compile_all(work).steps == 0

    extra = replace(work, options=("-DEXTRA=ON",))
    assert compile_all(extra).steps == 2
    after = objects(work)
    assert after["one.cpp.o"] == before["one.cpp.o"]
    assert after["two.cpp.o"] != before["two.cpp.o"]

    assert compile_all(work).steps == 2, "an option that is dropped counts no more"
    assert objects(work)["one.cpp.o"] == before["one.cpp.o"]

    os.utime(work.source / "one.cpp")
    assert compile_all(work).steps == 2


@pytest.mark.parametrize("what", ["toolchain", "damaged", "removed"])
def test_another_toolchain_begins_anew(work: Work, what: str) -> None:
    compile_all(work)
    (work.folder / "left").touch()
    note = work.folder / ".toolchain.json"
    if what == "damaged":
        note.write_bytes(b"\xff\xfe{")
    elif what == "removed":
        note.unlink()
    else:
        work = replace(work, made_with=["compiler 2"])
    assert compile_all(work).steps == 4
    assert not (work.folder / "left").exists()
    assert json.loads(note.read_text())[2:] == work.made_with


def test_a_build_in_which_the_machine_went_down_begins_anew(
    work: Work, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = work.folder / "one.cpp.o"
    cmake.begin(work)
    made.touch()
    cmake.begin(work)
    assert made.exists(), "a build that was only killed is continued"
    monkeypatch.setattr(cmake, "_boot", lambda: "another\n")
    finished = cmake.begin(work)
    assert not made.exists()
    assert "the machine went down during the last build" in capsys.readouterr().err
    made.touch()
    finished.unlink()
    monkeypatch.undo()
    cmake.begin(work)
    assert made.exists(), "one that was finished before that is whole"


def test_what_fails_meanwhile_stops_the_compilers(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page that cannot be built ends the build now, not once all is compiled."""
    pid = tmp_path / "pid"
    compiler(tmp_path / "slow", f"echo $$ >'{pid}'; exec sleep 600", monkeypatch)

    def fail() -> None:
        if "one.cpp.o" in objects(work):
            wait_for(lambda: pid.exists() and pid.read_text())
            raise PipelineError("the page failed")

    with pytest.raises(PipelineError, match="the page failed"):
        compile_all(replace(work, jobs=2), meanwhile=fail)
    wait_for(lambda: not psutil.pid_exists(int(pid.read_text())))
    assert list(objects(work)) == ["one.cpp.o"], "what was compiled stays"


# ccache


@pytest.mark.skipif(not shutil.which("ccache"), reason="there is no ccache")
def test_what_ccache_knew(work: Work) -> None:
    first = compile_all(work)
    assert (first.hits, first.misses) == (0, 2)
    assert first.summary.endswith("ccache had 0 of 2")
    shutil.rmtree(work.folder)
    again = compile_all(work)
    assert (again.hits, again.misses) == (2, 0)
    assert again.summary.endswith("ccache had 2 of 2")
    assert compile_all(work).hits == 0, "of this run, not of all"


def test_without_ccache(work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("g++", "as", "ld", "ar", "ranlib"):
        (programs / name).symlink_to(str(shutil.which(name)))
    monkeypatch.setenv("PATH", str(programs))
    done = compile_all(work)
    assert (done.hits, done.misses, done.steps) == (0, 0, 4)


@pytest.mark.parametrize("what", ["folder", "library"])
def test_a_ccache_that_does_not_work_is_left_out(
    work: Work,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    what: str,
) -> None:
    if what == "folder":
        if not shutil.which("ccache"):
            pytest.skip("there is no ccache")
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("CCACHE_DIR", str(tmp_path / "file" / "ccache"))
    else:
        program = tmp_path / "programs" / "ccache"
        program.parent.mkdir()
        program.write_text("#!/bin/sh\necho 'libhiredis.so.1.0.0: not found' >&2\nexit 127\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    assert compile_all(work).steps == 4
    told = capsys.readouterr().err
    assert "compiling without ccache, which does not work here: " in told
    assert "libhiredis" in told or what == "folder"


def test_what_a_compiler_sees(work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ccache may keep what it knows elsewhere, behind a password."""
    monkeypatch.setenv("GITHUB_TOKEN", "secret")
    monkeypatch.setenv("CCACHE_REMOTE_STORAGE", "redis://user:secret@127.0.0.1:1")
    monkeypatch.setenv("CXXFLAGS", "-O1")
    seen = tmp_path / "seen"
    compiler(tmp_path / "g++", f"env >'{seen}'", monkeypatch)
    compile_all(work)
    variables = dict(line.split("=", 1) for line in seen.read_text().splitlines() if "=" in line)
    assert [name for name in variables if "secret" in variables[name]] == ["CCACHE_REMOTE_STORAGE"]
    assert variables["CXXFLAGS"] == "-O1"


def test_told() -> None:
    assert Done(steps=3, seconds=1.4, hits=0, misses=0).summary == "3 steps in 1 s"
    assert Done(steps=3, seconds=1.4, hits=1, misses=1).summary == (
        "3 steps in 1 s, ccache had 1 of 2"
    )


def test_no_log_of_ccaches(tmp_path: Path) -> None:
    assert cmake.counted(tmp_path / "none") == (0, 0)


# What goes wrong


def test_the_first_errors_are_told(work: Work) -> None:
    (work.source / "two.cpp").write_text("int main() { return a + b + c + d + e + f + g; }")
    with pytest.raises(PipelineError, match="could not be built") as caught:
        compile_all(work)
    told = [line for line in caught.value.message.splitlines() if line.startswith("  | ")]
    assert len(told) == cmake.FIRST_ERRORS
    assert "two.cpp" in told[0] and "error: " in told[0]
    assert caught.value.hint == f"the whole log is {work.log}"


@pytest.mark.parametrize(
    "script",
    [
        'echo "g++: fatal error: Killed signal terminated program cc1plus" >&2; exit 1',
        'echo "cc1plus: out of memory allocating 65536 bytes" >&2; exit 1',
        "echo \"nvcc error   : 'cicc' died due to signal 9 (Kill signal)\" >&2; exit 1",
        "kill -KILL $$",
    ],
    ids=["g++", "cc1plus", "nvcc", "itself"],
)
def test_a_compiler_that_the_system_ended(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    compiler(tmp_path / "compiler", script, monkeypatch)
    with pytest.raises(PipelineError) as caught:
        compile_all(work)
    assert "out of memory: set a lower jobs=" in caught.value.hint
    assert str(work.log) in caught.value.hint


@pytest.mark.parametrize(
    ("line", "counts"),
    [
        ("x.cpp:1:5: error: no", True),
        ("x.cpp:1:5: fatal error: x.h: No such file or directory", True),
        ("x.cpp(1): error C2065: 'x': undeclared identifier", True),
        ("nvcc fatal   : Unsupported gpu architecture 'compute_60'", True),
        ("/usr/bin/ld: cannot find -lcuda: No such file or directory", True),
        ("CMake Error at CMakeLists.txt:1 (message):", True),
        ("write error: No space left on device", True),
        ("-- Performing Test errors_are_fine", False),
        ("x.cpp:1:5: warning: an error is near", False),
        ("[3/4] Building CXX object error: .o", False),
    ],
)
def test_lines_that_say_why(line: str, counts: bool) -> None:
    watch = Watch(lambda done, whole: None)
    watch.see(line)
    assert watch.errors == ([line] if counts else [])


def test_a_full_disk() -> None:
    error = cmake.failed(1, ["as: x.o: No space left on device"], Path("/log"))
    assert error.hint.startswith("free some space")


def test_what_needs_no_page_is_compiled_first(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    there = []
    shown: list[tuple[float, float]] = []

    @contextmanager
    def bar(text: str) -> Iterator[Callable[[float, float], None]]:
        yield lambda done, whole: shown.append((done, whole))

    def prepare() -> None:
        there.extend(name for name in TARGETS if any(work.folder.rglob(f"{name}.cpp.o")))

    monkeypatch.setattr(cmake, "bar", bar)
    done = compile_all(replace(work, first=TARGETS[:1]), prepare)
    assert there == [*TARGETS[:1]]
    assert {whole for _, whole in shown} == {done.steps}, "one count for both runs of Ninja"
    whole = replace(work, folder=work.folder.with_name("again"))
    assert done.steps == compile_all(whole).steps


def test_a_long_build_is_announced_with_what_it_takes_here(
    work: Work, capsys: pytest.CaptureFixture[str]
) -> None:
    forecast(work, 7, 1)
    assert capsys.readouterr().err == "", "a short build needs no words"
    forecast(work, 400, 2)
    assert "400 steps, 25 min 40 s with 2 at once (roughly; none was" in capsys.readouterr().err
    record_speed(work, 1.5)
    forecast(work, 400, 2)
    told = capsys.readouterr().err
    assert "400 steps, 5 min 0 s with 2 at once (as the last build here)" in told
    assert "Quicker: bins=prebuilt" in told


def test_a_build_leaves_its_speed_unless_ccache_knew_it(work: Work) -> None:
    compile_all(work)
    first = work.speeds.read_text()
    assert json.loads(first)["cpu"] > 0
    work.speeds.unlink()
    compile_all(replace(work, folder=work.folder.with_name("again")))
    assert work.speeds.exists() == (shutil.which("ccache") is None)


SCRIPT = """
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pipeline.bins.compile.cmake import Work, compile_all
top = Path(sys.argv[1])
compile_all(Work(source=top / "source ü", folder=top / "build", options=(), targets=("one", "two"),
    made_with=[], backend="cpu", root=top, jobs=None, log=top / "log", speeds=top / "speeds"))
"""


@pytest.mark.skipif(os.name == "nt", reason="Unix")
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL], ids=["interrupted", "killed"])
def test_no_compiler_is_left_behind(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: signal.Signals
) -> None:
    """Whether Ctrl-C in a terminal reaches all of them, or a signal this program alone."""
    seen = tmp_path / "pid of a compiler"
    compiler(tmp_path / "g++", f"echo $$ > '{seen}'; exec sleep 1000", monkeypatch)
    words = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    with subprocess.Popen(words, cwd=REPOSITORY, stderr=subprocess.DEVNULL) as building:
        wait_for(lambda: seen.exists() and seen.read_text().endswith("\n"))
        building.send_signal(end)
    pid = int(seen.read_text())
    wait_for(lambda: not lives(pid))
