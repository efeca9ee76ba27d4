"""The time that `quality` takes over that of the llama-perplexity runs that it needs.

    .venv/bin/python benchmarks/quality.py [millions of weights, 100] [chunks, 32] [rounds, 5]

A random Llama is made in a temporary folder, unquantized and as two quants. In turn `quality`
measures both, with nothing known from before, and plain llama-perplexity computes the same figures,
with its own defaults: one run of the unquantized model, one of each quant. Printed is the median of
the rounds' ratios, with the least and the most: on a shared machine a run takes 10 % more or less.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import REPOSITORY, doit, plan
from conftest import with_programs
from fakes import large_llama

QUANTS = ("q8_0", "q4_k_m")
TOKENS = 255  # of a chunk of 512 that are compared


def with_quality(home: Path, model: Path, text: Path, chunks: int) -> float:
    shutil.rmtree(home / "run" / "quality", ignore_errors=True)
    start = time.perf_counter()
    quants = f"quants={','.join(QUANTS)}"
    words = [f"model={model}", quants, f"text={text}", f"chunks={chunks}", "format=json"]
    done = doit("quality", *words, home=home)
    took = time.perf_counter() - start
    for row in json.loads(done.stdout)["quants"]:
        assert row["samples"] == chunks * TOKENS, row
    return took


def by_hand(program: Path, base: Path, quants: list[Path], text: Path, chunks: int) -> float:
    with tempfile.TemporaryDirectory(dir=base.parent) as folder:
        answers = ["--kl-divergence-base", f"{folder}/base"]
        sample = ["--ctx-size", "512", "--file", str(text), "--chunks", str(chunks)]
        runs = [["--model", str(base), *answers, *sample]]
        runs += [["--model", str(quant), *answers, "--kl-divergence"] for quant in quants]
        start = time.perf_counter()
        for words in runs:
            subprocess.run([program, *words], check=True, capture_output=True)
        return time.perf_counter() - start


def main() -> None:
    words = [int(word) for word in sys.argv[1:]]
    millions, chunks, rounds = [*words, *(100, 32, 5)[len(words) :]]
    size = large_llama.Size(
        layers=max(1, round((millions - 66) / 13)),
        hidden=1024,
        feed_forward=2816,
        heads=16,
        kv_heads=4,
    )
    with tempfile.TemporaryDirectory() as folder:
        home, model, text = (Path(folder, name) for name in ("home", "llama", "text.txt"))
        count = large_llama.make(model, size)
        large_llama.fill(model)
        pages = sorted((REPOSITORY / "docs").glob("*.md"))
        text.write_text("".join(page.read_text("utf-8") for page in pages), "utf-8")
        with_programs(REPOSITORY / "bins", home)
        files = []
        for quant in ("bf16", *QUANTS):
            doit("prepare", f"model={model}", f"quant={quant}", home=home)
            files.append(Path(plan(f"model={model}", f"quant={quant}", home=home)["file"]))
        (program,) = home.glob("bins/*/llama-perplexity")
        print(f"{count / 1e6:.0f} million weights, {chunks} chunks, {', '.join(QUANTS)}")
        ratios = []
        for number in range(rounds):
            works = [
                lambda: with_quality(home, files[0], text, chunks),
                lambda: by_hand(program, files[0], files[1:], text, chunks),
            ]
            order = [0, 1] if number % 2 else [1, 0]
            took = {which: works[which]() for which in order}
            ratios.append(took[0] / took[1])
            print(f"quality {took[0]:.1f} s, llama-perplexity {took[1]:.1f} s", flush=True)
        median = statistics.median(ratios)
        print(f"ratio {median:.3f} ({min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    main()
