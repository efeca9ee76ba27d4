"""One pass from safetensors to a quantized GGUF over the two steps: time, disk and memory.

    .venv/bin/python benchmarks/onepass.py [millions of weights, 1000] [rounds, 3] [quant, q4_k_m]

A random Llama in BF16 is made in a temporary folder, and prepared in turn without and with the
library that quantizes; what is timed is the run from the source to the GGUF, its hash and receipts
included. The disk counts what lies in the home beside the programs, looked at ten times a second;
the memory is that of the largest process. Ratios of medians, with the least and the most of the
rounds.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from common import DOIT, REPOSITORY, environment, sampling
from conftest import with_programs
from fakes import large_llama

LOOK = 0.1  # seconds


def allocated(folder: Path) -> int:
    total = 0
    for top, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(Path(top, name)).st_blocks * 512
            except FileNotFoundError:
                continue
    return total


def prepare(home: Path, *words: str) -> dict[str, float]:
    """Make the GGUF anew; what that took."""
    shutil.rmtree(home / "models" / "gguf", ignore_errors=True)
    command, env = [*DOIT, "prepare", *words], environment(home)
    start = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, cwd=REPOSITORY, env=env, stdout=log, stderr=log)
        most: dict[str, float] = {"disk": 0, "memory": 0}

        def watch() -> None:
            most["disk"] = max(most["disk"], allocated(home / "models"))
            with suppress(psutil.Error):
                family = psutil.Process(process.pid).children(recursive=True)
                most["memory"] = max([most["memory"], *(x.memory_info().rss for x in family)])

        with sampling(LOOK, watch):
            status = process.wait()
            took = time.perf_counter() - start
        if status:
            log.seek(0)
            sys.exit(log.read().decode())
    return {"seconds": took, **most}


def main() -> None:
    words = sys.argv[1:]
    millions = int(words[0]) if words else 1000
    rounds = int(words[1]) if len(words) > 1 else 3
    quant = words[2] if len(words) > 2 else "q4_k_m"
    layers = max(1, round((millions - 130) / 44)) if millions >= 500 else max(1, millions // 13)
    wide = 2048 if millions >= 500 else 1024
    size = large_llama.Size(
        layers=layers, hidden=wide, feed_forward=wide * 11 // 4, heads=16, kv_heads=4
    )
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "llama")
        count = large_llama.make(model, size)
        large_llama.fill(model)
        homes = {}
        for kind in ("two steps", "one pass"):
            homes[kind] = Path(folder, kind)
            with_programs(REPOSITORY / "bins", homes[kind])("resolve", f"model={model}")
        rows: list[dict[str, Any]] = []
        digests = set()
        for number in range(rounds):
            order = list(homes)[:: 1 if number % 2 else -1]
            row = {}
            for kind in order:
                more = ["keep_f16=1"] if kind == "two steps" else []
                row[kind] = prepare(homes[kind], f"model={model}", f"quant={quant}", *more)
                (made,) = (homes[kind] / "models" / "gguf").glob(f"*/model.{quant}.gguf")
                with made.open("rb") as file:
                    digests.add(hashlib.file_digest(file, "sha256").hexdigest())
            rows.append(row)
            print(json.dumps(row), flush=True)
        assert len(digests) == 1, "the bytes differ"
        source = (model / "model.safetensors").stat().st_size
        print(f"{count / 1e9:.2f} billion weights, {source / 1e9:.2f} GB, {quant}")
        for what in ("seconds", "disk", "memory"):
            ratios = [row["one pass"][what] / row["two steps"][what] for row in rows]
            two, one = (statistics.median(row[kind][what] for row in rows) for kind in homes)
            print(
                f"{what:<8} {two:.4g} in two steps, {one:.4g} in one pass, ratio {one / two:.3f} "
                f"({min(ratios):.3f} to {max(ratios):.3f})"
            )


if __name__ == "__main__":
    main()
