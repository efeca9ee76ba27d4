"""How fast the quants of a model run here, and what "here" is.

Each is measured in two passes, forwards and backwards through the quants, so that a machine that
gets warmer or busier meanwhile favours nobody.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from msgspec import to_builtins

from pipeline.bins.hardware import nvidia
from pipeline.core import log
from pipeline.core.errors import PipelineError
from pipeline.core.progress import bar
from pipeline.core.store import stat_cache
from pipeline.core.text import plural, size
from pipeline.models import gguf
from pipeline.report import bench, host
from pipeline.report.bench import Samples
from pipeline.report.figures import Speed
from pipeline.report.tuning_axes import BENCH as BENCH_NAMES
from pipeline.report.tuning_axes import bench_value

from .model import Model

BENCH = "llama-bench"
PROMPT, GENERATED = 256, 64  # tokens that are read and written
REPETITIONS = 3  # in each pass
SECONDS = 3600.0  # that a quant may take for a pass


def speeds(
    model: Model, files: Mapping[str, Path], *, again: bool = False
) -> tuple[dict[str, Speed], list[str]]:
    """The speed of each file by its name, kept from an earlier run or, if `again` or not kept,
    measured now; and why some have none."""
    if not model.binaries.has(BENCH):
        return {}, [f"these programs have no {BENCH}"]
    earlier = {} if again else {name: kept(model, path) for name, path in files.items()}
    known = {name: speed for name, speed in earlier.items() if speed}
    missing = {name: path for name, path in files.items() if name not in known}
    if known:
        log.info(f"kept from an earlier run: the speed of {', '.join(known)}")
    passes: dict[str, list[Samples]] = {name: [] for name in missing}
    stamps = {name: stat_cache.stamp(path) for name, path in missing.items()}
    problems: dict[str, str] = {}
    order = [*missing, *reversed(missing)]
    with bar("measuring speed") as update:
        for number, name in enumerate(order):
            if name not in problems:
                try:
                    passes[name].append(measure(model, missing[name]))
                except PipelineError as error:
                    problems[name] = error.message
            update(number + 1, len(order))
    for name, samples in passes.items():
        if name not in problems:
            known[name] = keep(model, missing[name], samples, stamps[name])
    return known, list(problems.values())


def options(model: Model) -> list[str]:
    """The options of llama-bench for those that the command line has."""
    request, layers = model.request, model.request.gpu_layers or ""
    given = {"threads": request.threads, "device": request.device}
    given["gpu-layers"] = layers if layers.isdecimal() else None  # it offloads all by itself
    return [
        word
        for name, value in given.items()
        if value is not None
        for word in (BENCH_NAMES[name], bench_value(name, str(value)))
    ]


def command(model: Model, path: Path) -> list[str]:
    """The command line that measures a file once."""
    generated = 0 if gguf.read(path).is_encoder else GENERATED
    tokens = ["-p", str(PROMPT), "-n", str(generated), "-r", str(REPETITIONS)]
    return [str(model.binaries.program(BENCH)), "-m", str(path), *tokens, *options(model)]


def measure(model: Model, path: Path) -> Samples:
    """One pass. Raises PipelineError."""
    return bench.samples(
        model.binaries.program(BENCH),
        path,
        options(model),
        prompt=PROMPT,
        generated=GENERATED,
        repetitions=REPETITIONS,
        timeout=SECONDS,
    )


def machine(model: Model) -> list[tuple[str, str]]:
    """What the figures were measured on: nothing that names this machine or its user."""
    here, cards = host.describe(), nvidia.find()
    rows = [
        ("processor", f"{here.processor}, {plural(here.processors, 'thread')} at once"),
        ("memory", f"{here.memory} GiB"),
    ]
    if cards:
        names = ", ".join(f"{card.name}, {size(card.total)}" for card in cards)
        rows.append(("graphics cards", names))
    revision, backend = model.programs.llama_cpp.revision, model.programs.backend
    rows.append(("programs", f"llama.cpp {revision}, backend {backend or 'unknown'}"))
    return rows


# What is kept, by file: its stamp, and the speeds by program, machine and options


def book(model: Model) -> Path:
    return model.home.run / "speeds.json"


def question(model: Model) -> str:
    """What a speed depends on beside the file."""
    program, machine = model.binaries.sha256(BENCH), to_builtins(host.describe())
    return json.dumps([program, machine, options(model), PROMPT, GENERATED, REPETITIONS])


def kept(model: Model, path: Path) -> Speed | None:
    """The speed that was measured before."""
    known = stat_cache.recall(book(model), path) or {}
    row = known.get(question(model)) if isinstance(known, dict) else None
    try:
        return Samples(prompt=row["prompt"], decode=row["decode"]).speed if row else None
    except (KeyError, TypeError, ValueError):
        return None


def keep(model: Model, path: Path, passes: Sequence[Samples], stamp: list[int]) -> Speed:
    """The speed of all passes together, which is kept."""
    together = Samples(
        prompt=[each for samples in passes for each in samples.prompt],
        decode=[each for samples in passes for each in samples.decode],
    )
    row = {"prompt": together.prompt, "decode": together.decode}
    known = stat_cache.recall(book(model), path)
    rows = (known if isinstance(known, dict) else {}) | {question(model): row}
    stat_cache.remember(book(model), path, rows, stamp)
    return together.speed
