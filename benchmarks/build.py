"""Our build of llama.cpp over upstream's documented default one: steps, CPU-seconds, wall time.

    .venv/bin/python benchmarks/build.py

Both compile the same tree for the CPU, with Ninja and the same number of jobs, each into an empty
folder with an empty ccache (ours is built once more with the then warm one). Upstream's is
`cmake -B build && cmake --build build --config Release`; its page would be downloaded from wherever
it is, which is turned off; ours is built without its page too. Takes half an hour on two cores.
"""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from common import DOIT, REPOSITORY

from pipeline.bins.compile import source
from pipeline.bins.compile.cmake import own_tools
from pipeline.core import capacity, paths

JOBS = capacity.processors()
LIMIT = 0.55  # of upstream's CPU-seconds


@dataclass(frozen=True)
class Cost:
    """Steps of Ninja, CPU-seconds of all processes, seconds on the clock."""

    steps: int
    cpu: float
    wall: float


def measure(commands: list[list[str]], env: dict[str, str], count: str) -> Cost:
    """Run the commands; `count` is a pattern whose last match tells the steps."""
    before, start, told = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic(), ""
    for command in commands:
        done = subprocess.run(
            command, cwd=REPOSITORY, env={**os.environ, **env}, capture_output=True, text=True
        )
        told += done.stdout + done.stderr
        if done.returncode:
            sys.exit(told[-3000:])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    steps = [int(found) for found in re.findall(count, told)]
    return Cost(steps[-1] if steps else 0, cpu, time.monotonic() - start)


def ours(top: Path, name: str) -> Cost:
    """Ours, in a home of its own; the source is unpacked before the clock runs."""
    env = {"LLAMA_PIPELINE_HOME": str(top / name), "CCACHE_DIR": str(top / "ccache")}
    words = ["backend=cpu", "ui=off", f"jobs={JOBS}"]
    subprocess.run(
        [*DOIT, "source"],
        cwd=REPOSITORY,
        env={**os.environ, **env},
        check=True,
        capture_output=True,
    )
    return measure([[*DOIT, "build_bins", *words]], env, r": (\d+) steps in ")


def upstream(top: Path) -> Cost:
    """The documented default build, of the source that ours was built of."""
    tree = source.find(paths.Home(top / "cold")).folder
    build, tools = top / "upstream", own_tools()
    configure = [tools["cmake"], "-S", str(tree), "-B", str(build), "-G", "Ninja"]
    configure += [f"-DCMAKE_MAKE_PROGRAM={tools['ninja']}", "-DLLAMA_USE_PREBUILT_UI=OFF"]
    compile_it = [tools["cmake"], "--build", str(build), "--config", "Release", "-j", str(JOBS)]
    env = {"CCACHE_DIR": str(top / "ccache-upstream")}
    return measure([configure, compile_it], env, r"\[\d+/(\d+)\] ")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        top = Path(folder)
        rows = {"ours, cold": ours(top, "cold"), "ours, warm ccache": ours(top, "warm")}
        rows["upstream's default"] = whole = upstream(top)
        print(f"{'':<20}{'steps':>7}{'CPU s':>9}{'wall s':>9}{'CPU ratio':>11}")
        for name, cost in rows.items():
            ratio = cost.cpu / whole.cpu
            print(f"{name:<20}{cost.steps:>7}{cost.cpu:>9.0f}{cost.wall:>9.0f}{ratio:>11.2f}")
        if rows["ours, cold"].cpu > LIMIT * whole.cpu:
            sys.exit(f"a cold build may take {LIMIT} of upstream's CPU-seconds")


if __name__ == "__main__":
    main()
