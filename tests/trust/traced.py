"""Runs of doit under the tracer of `tracer.c`: counted, killed or failing at one call that changes
a file. The run is forked from a Python that has loaded the pipeline; the tracer holds it and all
that it starts.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import forked
from conftest import Run
from tracer import tracer

KILLED = 128 + 9
PATIENCE = 400.0  # seconds for one run, on a machine with more to do than it can
CMAKE = "/.build/"  # in the paths of CMake's folders
SOME = 8  # calls in those that are tried
SETTLED = 0.3  # seconds after which what still runs is in the background

# doit, where `patch` may have changed what it does.
PATCHED = """
import runpy, sys
exec(sys.argv.pop(1))
sys.argv[0] = "-m"
runpy.run_module("doit", run_name="__main__", alter_sys=True)
"""
# As soon as the tracer holds the process; without one it ends by itself.
HELD = f"""
import ctypes, sys, time
ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1), 0, 0, 0)  # PR_SET_PTRACER: anybody
end = time.monotonic() + {PATIENCE}
while "TracerPid:\\t0\\n" in open("/proc/self/status").read():
    if time.monotonic() > end:
        sys.exit("no tracer came")
    time.sleep(0.001)
time.sleep(0.001)
"""


@dataclass(frozen=True, order=True)
class Call:
    """A call that was counted: its number, name, path, and result, which is below 0 where it
    failed."""

    n: int
    pid: int
    call: str
    path: str
    to: str
    flags: int
    result: int


@dataclass(frozen=True)
class Traced(Run):
    """A finished run, with the calls that were counted where they were recorded."""

    calls: tuple[Call, ...] = ()

    @property
    def was_killed(self) -> bool:
        return self.status == KILLED


def run(
    words: Sequence[str],
    env: Mapping[str, str],
    below: Sequence[Path],
    *options: str,
    record: bool = False,
    patch: str = "",
    after: Callable[[], object] = lambda: None,
) -> Traced:
    """doit with these words under the tracer, which counts what happens `below` these folders.
    `patch` is Python that breaks something first; `after` ends what the run has left in the
    background."""
    program = tracer()  # first: to compile it may take longer than a process waits for it
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        names = [Path(folder) / name for name in ("out", "err", "calls")]
        out, err = (stack.enter_context(name.open("w+b")) for name in names[:2])
        process = forked.start(
            ["-c", HELD + PATCHED, patch, *words], out.fileno(), err.fileno(), env
        )
        places = [word for path in below for word in ("-r", str(path))]
        log = ["-l", str(names[2])] if record else []
        command = [program, *places, *log, *options, "-p", str(process.pid)]
        with subprocess.Popen(command) as tracing:
            try:
                ended = process.wait(PATIENCE)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    tracing.wait(SETTLED)
                if tracing.returncode is None:
                    after()
                status = tracing.wait(PATIENCE)
            except BaseException:
                tracing.kill()  # and with it all that it traces
                raise
        assert status != 125, "the tracer itself failed"
        calls = tuple(sorted(read_calls(names[2]))) if record else ()
        printed = [name.read_text("utf-8", "replace") for name in names[:2]]
        return Traced(KILLED if status == KILLED else ended, *printed, calls)


def read_calls(log: Path) -> Iterator[Call]:
    for line in log.read_text("utf-8", "surrogateescape").splitlines():
        entry: dict[str, Any] = json.loads(line)
        if "count" not in entry:
            yield Call(
                n=entry["n"],
                pid=entry["pid"],
                call=entry["call"],
                path=entry["path"],
                to=entry.get("to", ""),
                flags=entry.get("flags", 0),
                result=entry["result"],
            )


def changes(call: Call) -> bool:
    """Whether it changed what a later run can see: not a flush, a lock, a log, or a file without a
    name."""
    path = call.path
    if call.result < 0 or call.call in ("fsync", "fdatasync"):
        return False
    if path.endswith((".lock", " (deleted)")) or "/logs/" in path:
        return False
    if call.call in ("open", "openat", "openat2"):
        return bool(call.flags & (os.O_CREAT | os.O_TRUNC)) and not is_nameless(call)
    return call.result > 0 or not is_write(call)


def is_nameless(call: Call) -> bool:
    return call.flags & os.O_TMPFILE == os.O_TMPFILE


def is_write(call: Call) -> bool:
    return call.call in ("write", "pwrite64", "writev", "pwritev", "sendfile", "copy_file_range")


def kill_points(calls: Sequence[Call], chance: random.Random) -> list[int]:
    """Before which calls a kill leaves something that a kill before the one before does not; of
    those in CMake's own folders some."""
    pairs = [(call, later.n) for call, later in pairwise(calls) if changes(call)]
    inside = [number for call, number in pairs if CMAKE in call.path]
    others = [number for call, number in pairs if CMAKE not in call.path]
    return sorted([*others, *chance.sample(inside, min(SOME, len(inside)))])


def fewer_writes(points: Sequence[int], calls: Sequence[Call], chance: random.Random) -> list[int]:
    """Of points before writes to the same file that follow each other the first, the last and one
    between."""
    chosen: set[int] = set()
    files = {call.n: (call.call, call.path) for call in calls}
    for _, group in groupby(points, key=files.__getitem__):
        run = list(group)
        chosen |= {run[0], run[-1], chance.choice(run)}
    return sorted(chosen)


def fail_points(calls: Sequence[Call], chance: random.Random) -> list[Call]:
    """Which calls have to be seen failing: not those that fail anyway, such as a mkdir of what is
    there; of writes to the same file that follow each other the first and the last; of those in
    CMake's own folders some."""
    kept = [call for call in calls if call.result >= 0]
    ends = [
        call
        for before, call, after in zip([None, *kept], kept, [*kept[1:], None], strict=False)
        if not (is_same(before, call) and is_same(call, after))
    ]
    inside = [call for call in ends if CMAKE in call.path]
    others = [call for call in ends if CMAKE not in call.path]
    return sorted([*others, *chance.sample(inside, min(SOME, len(inside)))])


def is_same(call: Call | None, other: Call | None) -> bool:
    return (
        call is not None
        and other is not None
        and (call.call, call.path) == (other.call, other.path)
    )
