"""The search of `tune` against measuring every combination, and against llama-server's defaults.

    .venv/bin/python benchmarks/tune.py MODEL.gguf [repetitions]

llama-bench and llama-server come from bins/. Every combination is measured with 512 tokens to read
and 128 to write, so many repetitions each (5, as llama-bench has it). At last the defaults, the
best combination and what the search found alternate, with fresh figures: those are compared.
llama-server is started with its defaults, with what was found, and with `--fit off`. The machine
should be quiet.
"""

from __future__ import annotations

import math
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from itertools import product
from pathlib import Path

from common import REPOSITORY

from pipeline.core import capacity
from pipeline.core.errors import PipelineError
from pipeline.core.store.hashing import sha256
from pipeline.models import gguf
from pipeline.report import bench, served_speed, tuning, tuning_axes, tuning_bench
from pipeline.report.tuned import Runs
from pipeline.report.tuning import DECODE, PROMPT, Axis, Setting
from pipeline.report.tuning_bench import REQUEST, Bench
from pipeline.serve import flags
from pipeline.serve.config.configuration import InstanceSpec
from pipeline.serve.config.options import ResolvedOptions, words
from pipeline.serve.server import Control, Server

ENOUGH, SHARE = 0.95, 0.2  # what the search has to reach: of the best, in this share of the time
ROUNDS = 8


def seconds(speeds: bench.Samples) -> dict[str, float]:
    """Of the phases of a request."""
    times = {PROMPT: REQUEST[PROMPT] / statistics.median(speeds.prompt)}
    if speeds.decode:
        times[DECODE] = REQUEST[DECODE] / statistics.median(speeds.decode)
    return times


def measured(found: Bench, setting: Setting, repetitions: int) -> dict[str, float]:
    """Each phase with its own number of threads."""
    times: dict[str, float] = {}
    for phase in REQUEST:
        given = tuning_axes.bench_words(setting, phase, {})
        sizes = {"prompt": 0, "generated": 0}
        sizes["prompt" if phase == PROMPT else "generated"] = REQUEST[phase]
        samples = bench.samples(found.program, found.model, given, repetitions=repetitions, **sizes)
        speeds = samples.prompt if phase == PROMPT else samples.decode
        times[phase] = REQUEST[phase] / statistics.median(speeds)
    return times


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
            samples = bench.samples(
                found.program,
                found.model,
                given,
                prompt=512,
                generated=128,
                repetitions=repetitions,
            )
        except PipelineError as error:
            print(f"left out: {error.message}")
            continue
        phases = best.setdefault(tuple(sorted(shared.items())), {})
        for phase, taken in seconds(samples).items():
            if taken < phases.get(phase, (math.inf, {}))[0]:
                phases[phase] = taken, setting
    fastest = min(best.values(), key=lambda phases: sum(taken for taken, _ in phases.values()))
    setting = {
        n: v for n, v in fastest[DECODE][1].items() if n not in ("ubatch-size", "batch-size")
    }
    prompt = dict(fastest[PROMPT][1])
    threads = prompt.pop("threads", None)
    setting |= prompt | ({tuning_axes.THREADS_BATCH: threads} if threads else {})
    return setting, time.monotonic() - began, len(combinations)


def served(program: Path, model: Path, changed: Mapping[str, Mapping[str, str]]) -> None:
    """llama-server's own speed with these options, over its defaults."""
    with tempfile.TemporaryDirectory() as folder:

        def run(options: Mapping[str, str]) -> list[float]:
            server = Server(
                name="bench",
                executable=str(program),
                cmd=(
                    "--model",
                    str(model),
                    "--port",
                    "18480",
                    "--ctx-size",
                    "2048",
                    *words({**options}),
                ),
                folder=folder,
                log_file=f"{folder}/log",
                port=18480,
            )
            return served_speed.seconds(server, {"PATH": "/usr/bin:/bin"})

        ratios = served_speed.ratios([*changed], lambda name: run(changed[name]))
        for name, ratio in ratios.items():
            print(f"llama-server, {name:<14} {ratio:.3f} times as fast as with its defaults")


def main() -> None:
    model = Path(sys.argv[1]).resolve()
    repetitions = int(sys.argv[2]) if len(sys.argv) > 2 else bench.REPETITIONS
    bins = next((REPOSITORY / "bins").glob("*-cpu"))
    server = bins / "llama-server"
    known = flags.read(server, sha256(server), REPOSITORY / "run" / "flags")
    began = time.monotonic()
    found = Bench(bins / "llama-bench", model, Runs(Path(tempfile.mkdtemp()) / "runs"), given={})
    header = gguf.read(model)
    scope = tuning_axes.Scope(
        processors=capacity.processors(),
        threads=found.first.threads,
        pools=header.pooling != "none",
    )
    spec = InstanceSpec(name="bench", control=Control(), server={}, place="bench")
    axes = tuning_axes.axes(scope, ResolvedOptions(spec, known))
    result = tuning_bench.search(found, axes, lambda share: True)
    searched = time.monotonic() - began
    print(
        f"search      {searched:7.1f} s  {tuning.shown(result.setting)}  "
        f"{result.ratio.value:.3f} ± {result.ratio.error:.3f}, spread {result.spread:.1%}"
    )
    best, whole, count = exhaustive(found, axes, repetitions)
    print(f"exhaustive  {whole:7.1f} s  {tuning.shown(best)}  ({count} combinations)")
    times: dict[str, list[float]] = {"default": [], "search": [], "exhaustive": []}
    settings: dict[str, Setting] = {"default": {}, "search": result.setting, "exhaustive": best}
    for number in range(ROUNDS):
        for name in [*settings][:: 1 if number % 2 == 0 else -1]:
            times[name].append(sum(measured(found, settings[name], 2).values()))
    typical = {name: statistics.median(each) for name, each in times.items()}
    print(
        f"over the defaults: search {typical['default'] / typical['search']:.3f}, exhaustive "
        f"{typical['default'] / typical['exhaustive']:.3f}"
    )
    quality, share = typical["exhaustive"] / typical["search"], searched / whole
    print(f"search over exhaustive: {quality:.3f} of the speed in {share:.3f} of the time")
    options = tuning_axes.server_options(result.setting, found.first.threads)
    served(
        server, model, {"its defaults": {}, "what was found": options, "--fit off": {"fit": "off"}}
    )
    if quality < ENOUGH or share > SHARE:
        sys.exit(f"at least {ENOUGH} in at most {SHARE} is wanted")


if __name__ == "__main__":
    main()
