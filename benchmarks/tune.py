"""The search of `tune` against measuring every combination, and against llama-server's defaults.

    .venv/bin/python benchmarks/tune.py MODEL.gguf [repetitions] [options of another tuner …]

llama-bench and llama-server come from bins/. First every combination is measured with 512 tokens to
read and 128 to write, so many repetitions each (5, as llama-bench has it); then the search gets a
fifth of that time. The defaults, the best combination and what the search found alternate at last,
with fresh figures: only those are compared. So do llama-servers with their defaults, with what was
found, with `--fit off`, and with the options of another tuner where they are given, such as
`--threads 2 --batch-size 256`.

The machine should be quiet: how much of it others use is printed first.
"""

from __future__ import annotations

import math
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

import psutil
from common import REPOSITORY, free_port

from pipeline.core import capacity
from pipeline.core.errors import PipelineError
from pipeline.core.store.hashing import sha256
from pipeline.models import gguf
from pipeline.report import bench, served_speed, tuning, tuning_axes, tuning_bench
from pipeline.report.tuned import Runs
from pipeline.report.tuning_axes import DECODE, PROMPT, Axis, Setting
from pipeline.report.tuning_bench import REQUEST, Bench
from pipeline.serve import flags
from pipeline.serve.config.configuration import InstanceSpec
from pipeline.serve.config.options import ResolvedOptions, words
from pipeline.serve.server import Control, Server

ENOUGH, SHARE = 0.95, 0.2  # what the search has to reach: of the best, in this share of the time
BUDGET = 0.19  # of that time; the run that has begun is finished
ROUNDS = 8  # of the comparison: even, so that each is early as often as late


def seconds(speeds: bench.Samples) -> dict[str, float]:
    """Of the phases of a request."""
    times = {PROMPT: REQUEST[PROMPT] / statistics.median(speeds.prompt)}
    if speeds.decode:
        times[DECODE] = REQUEST[DECODE] / statistics.median(speeds.decode)
    return times


def request_seconds(found: Bench, setting: Setting) -> float:
    """Of a request with a setting: each phase with its own number of threads."""
    total = 0.0
    for phase in found.first.weights:
        sizes = {"prompt": 0, "generated": 0}
        sizes["prompt" if phase == PROMPT else "generated"] = REQUEST[phase]
        given = tuning_axes.bench_words(setting, phase, {})
        samples = bench.samples(found.program, found.model, given, repetitions=2, **sizes)
        speeds = samples.prompt if phase == PROMPT else samples.decode
        total += REQUEST[phase] / statistics.median(speeds)
    return total


def exhaustive(found: Bench, axes: list[Axis], repetitions: int) -> tuple[Setting, float, int]:
    """The best combination, with the threads of each phase chosen apart, the seconds that it took,
    and how many there are."""
    began = time.monotonic()
    grid = [axis for axis in axes if axis.name != tuning_axes.THREADS_BATCH]
    best: dict[tuple[tuple[str, str], ...], dict[str, tuple[float, Setting]]] = {}
    combinations = [*product(*(axis.values for axis in grid))]
    for values in combinations:
        setting: Setting = {}
        for axis, value in zip(grid, values, strict=True):
            setting = tuning.changed(setting, axis, value)
        shared = {n: v for n, v in setting.items() if n in ("flash-attn", "load-mode")}
        given = tuning_axes.bench_words(setting, DECODE, {})
        try:
            samples = bench.samples(found.program, found.model, given, repetitions=repetitions)
        except PipelineError as error:
            print(f"left out: {error.message}")
            continue
        phases = best.setdefault(tuple(sorted(shared.items())), {})
        for phase, taken in seconds(samples).items():
            if taken < phases.get(phase, (math.inf, {}))[0]:
                phases[phase] = taken, setting
    fastest = min(best.values(), key=lambda phases: sum(taken for taken, _ in phases.values()))
    prompt = dict(fastest[PROMPT][1])
    threads = prompt.pop(tuning_axes.THREADS, None)
    batches = (tuning_axes.UBATCH, tuning_axes.BATCH)
    decode = fastest.get(DECODE, fastest[PROMPT])[1]
    setting = {name: value for name, value in decode.items() if name not in batches}
    setting |= prompt | ({tuning_axes.THREADS_BATCH: threads} if threads else {})
    return setting, time.monotonic() - began, len(combinations)


def compared(found: Bench, settings: Mapping[str, Setting]) -> dict[str, list[float]]:
    """The seconds of a request with each setting, measured in turns."""
    times: dict[str, list[float]] = {name: [] for name in settings}
    for number in range(ROUNDS):
        for name in [*settings][:: 1 if number % 2 == 0 else -1]:
            times[name].append(request_seconds(found, settings[name]))
    return times


def ratio(slow: Sequence[float], fast: Sequence[float]) -> tuple[float, float]:
    """How many times as fast, round by round, and the standard error."""
    logs = [math.log(a / b) for a, b in zip(slow, fast, strict=True)]
    mean = math.exp(statistics.fmean(logs))
    return mean, mean * statistics.stdev(logs) / math.sqrt(len(logs))


def served(program: Path, model: Path, variants: Mapping[str, Sequence[str]]) -> None:
    """llama-server's own speed with these options, over its defaults."""
    with tempfile.TemporaryDirectory() as folder:

        def run(options: Sequence[str]) -> list[float]:
            port = free_port()
            place = ("--port", str(port), "--ctx-size", "2048")
            server = Server(
                name="bench",
                executable=str(program),
                cmd=("--model", str(model), *place, *options),
                folder=folder,
                log_file=f"{folder}/log",
                port=port,
                kind="embedding" if gguf.read(model).pooling != "none" else "chat",
            )
            return served_speed.seconds(server, {"PATH": "/usr/bin:/bin"})

        ratios = served_speed.ratios([*variants], lambda name: run(variants[name]))
        for name, times in ratios.items():
            print(f"llama-server, {name:<14} {times:.3f} times as fast as with its defaults")


def main() -> None:
    model = Path(sys.argv[1]).resolve()
    repetitions = int(sys.argv[2]) if len(sys.argv) > 2 else bench.REPETITIONS
    others = psutil.cpu_percent(interval=1) / 100
    print(f"other programs use {others:.0%} of {capacity.processors()} processors")
    bins = next((REPOSITORY / "bins").glob("*-cpu"))
    server = bins / "llama-server"
    known = flags.read(server, sha256(server), REPOSITORY / "run" / "flags")
    with tempfile.TemporaryDirectory() as folder:
        found = Bench(bins / "llama-bench", model, Runs(Path(folder) / "runs"), given={})
        header = gguf.read(model)
        scope = tuning_axes.Scope(
            processors=capacity.processors(),
            threads=found.first.threads,
            pools=header.pooling != "none",
        )
        spec = InstanceSpec(name="bench", control=Control(), server={}, place="bench")
        axes = tuning_axes.axes(scope, ResolvedOptions(spec, known))
        best, whole, count = exhaustive(found, axes, repetitions)
        print(f"exhaustive  {whole:7.1f} s  {tuning.shown(best)}  ({count} combinations)")
        began = time.monotonic()
        result = tuning_bench.search(
            found, axes, lambda share: time.monotonic() - began < share * BUDGET * whole
        )
        searched = time.monotonic() - began
    print(
        f"search      {searched:7.1f} s  {tuning.shown(result.setting)}  "
        f"{result.ratio.value:.3f} ± {result.ratio.error:.3f}, spread {result.spread:.1%}"
    )
    times = compared(found, {"default": {}, "search": result.setting, "exhaustive": best})
    for name in ("search", "exhaustive"):
        value, error = ratio(times["default"], times[name])
        print(f"{name:<11} {value:.3f} ± {error:.3f} times as fast as the defaults")
    quality, error = ratio(times["exhaustive"], times["search"])
    share = searched / whole
    print(
        f"search over exhaustive: {quality:.3f} ± {error:.3f} of the speed, {share:.3f} of the time"
    )
    options = tuning_axes.server_options(result.setting, found.first.threads)
    variants = {
        "its defaults": [],
        "what was found": words({**options}),
        "--fit off": ["--fit", "off"],
    }
    if sys.argv[3:]:
        variants["another tuner"] = sys.argv[3:]
    served(server, model, variants)
    if quality + error < ENOUGH or share > SHARE:
        sys.exit(f"at least {ENOUGH} in at most {SHARE} is wanted")


if __name__ == "__main__":
    main()
