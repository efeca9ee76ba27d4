"""The clock is set, back and forth: no timer notices."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from conftest import REPOSITORY
from msgspec.structs import replace
from supervisor_tools import QUICK, Servers, stand_in

from pipeline.core.store import active
from pipeline.serve.supervisor import marker, usage
from pipeline.serve.supervisor.state import FAILED, READY
from pipeline.serve.supervisor.usage import ServerUse, Usage

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs LD_PRELOAD")

HOURS = 3600
# The time of day with so many seconds more as a file holds.
CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
static long shift(void) {
    char text[32] = {0};
    int file = open(SHIFT, O_RDONLY | O_CLOEXEC);
    if (file < 0) return 0;
    if (read(file, text, sizeof text - 1) < 0) text[0] = 0;
    close(file);
    return atol(text);
}
int clock_gettime(clockid_t clock, struct timespec *at) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int status = real(clock, at);
    if (clock == CLOCK_REALTIME) at->tv_sec += shift();
    return status;
}
"""
Set = Callable[[int], None]


@contextmanager
def child(script: str, *words: object) -> Iterator[subprocess.Popen[str]]:
    """A Python process that runs `script`, and reads from us."""
    with subprocess.Popen(
        [sys.executable, "-c", script, *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().strip()


@pytest.fixture
def clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Set:
    """Sets the clock of all that is started from now on, this many seconds ahead."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        pytest.skip("needs a C compiler")
    shift, source = tmp_path / "shift", tmp_path / "clock.c"
    source.write_text(CLOCK)
    library = tmp_path / "clock.so"
    words = [compiler, f'-DSHIFT="{shift}"', "-shared", "-fPIC", "-o", library, source]
    subprocess.run(words, check=True)
    monkeypatch.setenv("LD_PRELOAD", str(library))

    def set_to(seconds: int) -> None:
        made = tmp_path / "shift.part"
        made.write_text(str(seconds))
        made.replace(shift)

    set_to(0)
    return set_to


def test_the_clock_of_these_tests_can_be_set(clock: Set) -> None:
    script = "import sys, time\nfor _ in sys.stdin: print(time.time(), flush=True)"
    with child(script) as process:
        for shift in (0, 5 * HOURS, -5 * HOURS):
            clock(shift)
            assert process.stdin
            process.stdin.write("\n")
            process.stdin.flush()
            assert abs(float(line(process)) - time.time() - shift) < 60


def says(servers: Servers, name: str, **use: float) -> None:
    """As a gateway would, which does not know of the supervisor's clock."""
    told = ServerUse(**{"last": time.monotonic(), **use})  # type: ignore[arg-type]
    pid = os.getpid()
    usage.write(servers.at, Usage(pid=pid, started=marker.start_time(pid), servers={name: told}))


def test_a_server_stays_loaded_as_long_as_it_should(
    clock: Set, servers: Servers, tmp_path: Path
) -> None:
    """Neither unloaded by a clock that goes forward, nor kept by one that goes back."""
    a = stand_in(tmp_path, "a", start="demand", idle_timeout=4.0)
    servers.up(a)
    for shift in (24 * HOURS, -24 * HOURS):
        clock(0)
        says(servers, "a", waiting=1, since=time.monotonic())
        servers.until("a", READY)
        used = time.monotonic()
        says(servers, "a")
        clock(shift)
        servers.until("a", "unloading", "stopping", "asleep")
        assert 4.0 <= time.monotonic() - used < 60
        says(servers, "a", closed=servers.state()["a"].ready_at or 0.0, last=used)
        servers.until("a", "asleep")


def test_what_failed_is_tried_again_after_its_pause(
    clock: Set, servers: Servers, tmp_path: Path
) -> None:
    servers.timing = replace(QUICK, first_retry=3.0)
    a = stand_in(tmp_path, "a", "--exit", "1", start="demand", max_restarts=0)
    servers.up(a)
    for shift in (-24 * HOURS, 24 * HOURS):
        clock(0)
        says(servers, "a", waiting=1, since=time.monotonic())
        servers.until("a", FAILED)
        failed = time.monotonic()
        says(servers, "a")
        clock(shift)
        servers.until("a", "asleep")
        assert 2.0 <= time.monotonic() - failed < 60


def test_a_run_is_under_way_though_the_clock_was_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux reckons when a process began from the present clock."""
    script = (
        "import sys\nfrom pathlib import Path\nfrom pipeline.core.store import active\n"
        "active.begin(Path(sys.argv[1]))\nprint('begun', flush=True)\nsys.stdin.read()"
    )
    with child(script, tmp_path) as run:
        assert line(run) == "begun"
        real = psutil.Process.create_time
        for shift in (24 * HOURS, -24 * HOURS):
            monkeypatch.setattr(
                psutil.Process, "create_time", lambda self, shift=shift: real(self) + shift
            )
            assert len(active.others(tmp_path)) == 1
        run.kill()
        run.wait()
        assert active.others(tmp_path) == []
