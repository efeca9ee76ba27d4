"""Run CMake and Ninja: their arguments, progress and errors."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct, convert

from pipeline.bins import platform
from pipeline.bins.binaries import program_file
from pipeline.core import capacity, environment, log
from pipeline.core.errors import PipelineError
from pipeline.core.process import last_lines, outcome, run
from pipeline.core.progress import bar, duration
from pipeline.core.store import json_file
from pipeline.core.store.publish import disk_problem, flush, flush_folder, publish_text, remove
from pipeline.core.text import size

FIRST_ERRORS = 5
DETAILS = 4  # lines that follow an error of CMake's, and say what it is
COUNTER = re.compile(r"^\[(\d+)/(\d+)\] ", re.M)  # Ninja's
LANGUAGES = ("C", "CXX", "CUDA", "HIP")
# Signs that the system killed a compiler; 137 is how a shell reports SIGKILL.
KILLED = re.compile(r"\bKilled\b|out of memory|Cannot allocate|signal 9\b|\[code=137\]", re.I)
FAILURE = re.compile(
    r"\berror\b( \w+)?\s*:|\bfatal\s*:|CMake Error|No space left|undefined reference|"
    r"cannot find -l|Cannot create temporary|" + KILLED.pattern,
    re.I,
)
GIB = 1024**3
# Peak of one compiler, in bytes, measured on the largest sources of each.
COMPILER_BYTES = {"cuda": 2 * GIB, "hip": 2 * GIB, "sycl": 2 * GIB, "vulkan": 2 * GIB}
USUAL_COMPILER_BYTES = GIB
# What a step takes one compiler: 134 steps took two of them 516 s, with GCC 12 on a busy machine.
STEP_SECONDS = 7.7
LONG_BUILD = 60.0


class Work(Struct, frozen=True, kw_only=True):
    """What to compile: CMake's two folders, its options, the targets, and what all of it is made
    with: where that changes, the folder is made anew."""

    source: Path
    folder: Path
    options: tuple[str, ...]
    targets: tuple[str, ...]
    made_with: Sequence[Any]
    backend: str
    root: Path  # two checkouts share what they compiled: paths below it count as relative
    jobs: int | None
    log: Path
    first: tuple[str, ...] = ()  # the targets that need nothing of what `prepare` adds
    speeds: Path  # what earlier builds on this machine took


class Done(Struct, frozen=True, kw_only=True):
    """How it went: Ninja's steps, seconds, and compilations that ccache knew and did not."""

    steps: int
    seconds: float
    hits: int
    misses: int

    @property
    def summary(self) -> str:
        cached = f", ccache had {self.hits} of {self.hits + self.misses}"
        steps = f"{self.steps} steps in {self.seconds:.0f} s"
        return steps + (cached if self.hits + self.misses else "")


def configure_argv(work: Work, tools: Mapping[str, str], ccache: str | None) -> list[str]:
    """The CMake command that makes the build folder."""
    return [
        *(tools["cmake"], "-S", str(work.source), "-B", str(work.folder)),
        *("-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tools['ninja']}"),
        *work.options,
        *(f"-DCMAKE_{name}_COMPILER_LAUNCHER={ccache or ''}" for name in LANGUAGES),
    ]


def build_argv(
    work: Work, tools: Mapping[str, str], count: int, targets: Sequence[str]
) -> list[str]:
    """The command that compiles the targets, `count` files at once. Not through CMake, which leaves
    Ninja running when it is terminated; Ninja ends with its compilers."""
    return [tools["ninja"], "-C", str(work.folder), "-j", str(count), *targets]


def compile_all(
    work: Work,
    prepare: Callable[[], None] = lambda: None,
    meanwhile: Callable[[], None] = lambda: None,
) -> Done:
    """Configure and compile; `prepare` adds to the folder what is to be embedded, once `work.first`
    has been compiled. `meanwhile` is called at each step, and stops the work by what it raises:
    what was compiled stays in the folder. Raises PipelineError with the first errors."""
    start = time.monotonic()
    tools, statistics = own_tools(), work.folder / ".ccache.log"
    env = {
        **environment.without_credentials(os.environ, keep=["CCACHE_"]),
        # projects inside llama.cpp's own look for ninja there
        "PATH": os.pathsep.join([str(Path(tools["ninja"]).parent), os.environ.get("PATH", "")]),
        "NINJA_STATUS": "[%f/%t] ",
        "CCACHE_BASEDIR": str(work.root),
        "CCACHE_NOHASHDIR": "1",
        "CCACHE_STATSLOG": str(statistics),
    }
    unflushed = begin(work)
    ccache = working_ccache(work.folder, env)
    statistics.unlink(missing_ok=True)
    count = job_count(work.jobs, work.backend, capacity.processors(), capacity.memory())
    with bar(f"building llama.cpp for {work.folder.name}") as update:
        watch = Watch(update)

        def see(line: str) -> None:
            watch.see(line)
            meanwhile()

        def call(command: Sequence[str], *, append: bool = True) -> None:
            status = run(command, log=work.log, env=env, on_line=see, append=append)
            if status:
                raise failed(status, watch.errors, work.log)

        call(configure_argv(work, tools, ccache), append=False)
        watch.planned = planned(build_argv(work, tools, count, work.targets))
        forecast(work, watch.planned, count)
        if work.first:
            call(build_argv(work, tools, count, work.first))
            watch.again()
        prepare()
        call(build_argv(work, tools, count, work.targets))
    flush_folder(work.folder)
    unflushed.unlink()
    flush(work.folder)
    hits, misses = counted(statistics)
    done = Done(steps=watch.steps, seconds=time.monotonic() - start, hits=hits, misses=misses)
    if done.steps and hits <= misses / 10:
        record_speed(work, done.seconds * count / done.steps)
    return done


def working_ccache(folder: Path, env: Mapping[str, str]) -> str | None:
    """ccache, unless a compiler that works does not behind it: its folder cannot be written to, or
    a library of its own is missing."""
    ccache, compiler = shutil.which("ccache"), platform.find_compiler()
    if not ccache or not compiler:
        return ccache
    with tempfile.TemporaryDirectory(dir=folder) as inside:
        source = Path(inside, "empty.cpp")
        source.write_text("")
        files = ("-c", str(source), "-o", str(source.with_suffix(".o")))
        command = [compiler.path, *compiler.words, *files]
        status, _, error = outcome([ccache, *command], env=env)
        if status == 0 or outcome(command, env=env)[0] != 0:
            return ccache
    why = (error.strip().splitlines() or [f"it ended with status {status}"])[-1]
    log.info(f"compiling without ccache, which does not work here: {why}")
    return None


def planned(argv: Sequence[str]) -> int:
    """How many steps Ninja would run; 0 where it cannot say."""
    _, output, _ = outcome([*argv, "-n"])
    counter = COUNTER.search(output)
    return int(counter[2]) if counter else 0


def forecast(work: Work, steps: int, count: int) -> None:
    """Say what a long build takes, and what is quicker."""
    measured = _speeds(work).get(work.backend)
    seconds = steps * (measured or STEP_SECONDS) / count
    if seconds < LONG_BUILD:
        return
    basis = "as the last build here" if measured else "roughly; none was measured here yet"
    log.info(
        f"building llama.cpp takes {steps} steps, {duration(seconds)} with {count} at once "
        f"({basis}). Quicker: bins=prebuilt, upstream's own programs, or bins=package, a package "
        "from another machine"
    )


def record_speed(work: Work, seconds: float) -> None:
    """Keep what a step took one compiler, for the forecast of the next build."""
    with contextlib.suppress(OSError):  # a cache that cannot be written
        json_file.write(work.speeds, _speeds(work) | {work.backend: round(seconds, 2)})


def _speeds(work: Work) -> dict[str, float]:
    return json_file.read(work.speeds, lambda data: convert(data, dict[str, float])) or {}


class Watch:
    """Progress and errors, read from Ninja's output."""

    def __init__(self, update: Callable[[float, float], None]) -> None:
        self._update = update
        self.planned = 0  # steps of all its runs, as far as that is known
        self.before = self.done = self.total = 0
        self.errors: list[str] = []
        self._details = 0

    @property
    def steps(self) -> int:
        """How many steps of all runs are done."""
        return self.before + self.done

    def again(self) -> None:
        """Ninja runs once more, and counts from 1."""
        self.before, self.done, self.total = self.steps, 0, 0

    def see(self, line: str) -> None:
        """Read a line of the output."""
        if counter := COUNTER.match(line):
            done, total = map(int, counter.groups())
            # A project inside counts its own few steps: they are not those of the whole.
            if total * 2 >= self.total:
                self.done, self.total = done, total
                self._update(self.steps, max(self.planned, self.before + total))
        elif FAILURE.search(line):
            self.errors.append(line.strip())
            self._details = DETAILS if "CMake Error" in line else 0
        elif self._details and line.startswith("  "):
            self.errors[-1] += f" {line.strip()}"
            self._details -= 1
        elif line.strip():
            self._details = 0


def begin(work: Work) -> Path:
    """CMake keeps the compiler and the folders of its first run, whatever is passed later: start
    over where they changed. Compilers flush nothing, and Ninja trusts a file's time, so start over
    too where the machine went down during the last build. Returns the file to remove once all of
    the folder is flushed."""
    unflushed, boot = work.folder / ".unflushed", _boot()
    if unflushed.exists() and _read(unflushed) != boot:
        log.info(
            "the machine went down during the last build, so files may be incomplete; compiling "
            "everything again"
        )
        remove(work.folder)
    note = work.folder / ".toolchain.json"
    now = json.dumps([str(work.folder), str(work.source), *work.made_with])
    if _read(note) != now:
        remove(work.folder)
        work.folder.mkdir(parents=True)
        note.write_text(now, encoding="utf-8")
    # Nor does it forget an option that is no longer passed, unless its cache is removed.
    note, now = work.folder / ".options.json", json.dumps(work.options)
    if _read(note) != now:
        remove(work.folder / "CMakeCache.txt")
        note.write_text(now, encoding="utf-8")
    publish_text(unflushed, boot)
    return unflushed


def _boot() -> str:
    """An identity of the time since the machine was started."""
    if text := _read(Path("/proc/sys/kernel/random/boot_id")):
        return text
    import psutil

    return f"{psutil.boot_time():.0f}\n"


def _read(file: Path) -> str:
    """The text of a file; empty where it cannot be read."""
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def failed(status: int, errors: Sequence[str], log: Path) -> PipelineError:
    """The error for a failed build: its first errors and a hint."""
    reason = "\n".join(f"  | {line}" for line in errors[:FIRST_ERRORS]) or last_lines(log)
    hint = f"the whole log is {log}"
    if why := disk_problem(log.parent, reason):
        reason, hint = f"{reason}\n{why.message}", f"{why.hint}; {hint}"
    elif any(KILLED.search(line) for line in errors):
        hint = f"out of memory: set a lower jobs=; {hint}"
    return PipelineError(f"llama.cpp could not be built (status {status}):\n{reason}", hint)


def counted(statistics: Path) -> tuple[int, int]:
    """Hits and misses in ccache's log of its results."""
    results = _read(statistics).splitlines()
    hits = results.count("direct_cache_hit") + results.count("preprocessed_cache_hit")
    return hits, results.count("cache_miss")


def own_tools() -> dict[str, str]:
    """cmake and ninja out of the environment's own packages."""
    import cmake
    import ninja

    return {
        "cmake": str(Path(cmake.CMAKE_BIN_DIR) / program_file("cmake")),
        "ninja": str(Path(ninja.BIN_DIR) / program_file("ninja")),
    }


def job_count(requested: int | None, backend: str, processors: int, memory: int) -> int:
    """How many compilers to run: as requested, or one a processor, within the free memory (bytes).
    At least one. Logs where that is fewer than requested."""
    fit = max(1, memory // COMPILER_BYTES.get(backend, USUAL_COMPILER_BYTES))
    if requested and requested > fit:
        log.info(
            f"jobs={requested}: running {fit}, all that the free memory allows ({size(memory)})"
        )
    return min(requested or max(1, processors), fit)
