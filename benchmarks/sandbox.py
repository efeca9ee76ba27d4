"""What the sandbox costs: converting, quantizing and serving in it over the same without it.

    .venv/bin/python benchmarks/sandbox.py [rounds]

The demonstration model and a tiny Llama are converted and quantized anew, in and out of the sandbox
in turn; then one server of each kind answers the same requests in turn. Ratios of medians, with the
quartiles of the ratios of neighbours.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from common import DOIT, REPOSITORY, doit, environment, free_port, post
from conftest import with_programs
from fakes import tiny_llama

REQUESTS = 20  # in one round of a server


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compare(what: str, rounds: int, work: Callable[[str], object]) -> None:
    """Print how long `work` takes in the sandbox over without; the first round warms caches."""
    rows = []
    for number in range(rounds + 1):
        order = ("auto", "off") if number % 2 else ("off", "auto")
        took = {mode: seconds(lambda mode=mode: work(mode)) for mode in order}  # type: ignore[misc]
        rows += [took] if number else []
    inside, outside = (statistics.median(row[mode] for row in rows) for mode in ("auto", "off"))
    low, _, high = statistics.quantiles((row["auto"] / row["off"] for row in rows), n=4)
    print(
        f"{what:<28} {inside:7.3f} s in, {outside:7.3f} s out, ratio {inside / outside:.3f} "
        f"({low:.3f} to {high:.3f})",
        flush=True,
    )


def embed(url: str) -> None:
    for _ in range(REQUESTS):
        post(f"{url}/v1/embeddings", {"input": "the rain and the train " * 60})


def serve(home: Path, mode: str) -> tuple[subprocess.Popen[str], str]:
    words = ["serve", "model=demo-embed", f"port={free_port()}", "format=json", f"sandbox={mode}"]
    process = subprocess.Popen(
        [*DOIT, *words],
        cwd=REPOSITORY,
        env=environment(home),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout
    return process, json.loads(process.stdout.readline())["url"]


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 9
    doit("build_bins")
    with tempfile.TemporaryDirectory() as folder:
        home, tiny = Path(folder, "home"), Path(folder, "tiny")
        with_programs(REPOSITORY / "bins", home)
        tiny_llama.make(tiny)
        for name, model in (("MiniLM", "demo-embed"), ("tiny Llama", str(tiny))):

            def make(mode: str, quant: str, model: str = model) -> None:
                words = (f"model={model}", f"quant={quant}", "force=1", f"sandbox={mode}")
                doit("prepare", *words, home=home)

            compare(f"convert {name} to f16", rounds, lambda mode: make(mode, "f16"))
        compare("and quantize to q4_k_m", rounds, lambda mode: make(mode, "q4_k_m"))
        doit("prepare", "model=demo-embed", home=home)
        servers = {mode: serve(home, mode) for mode in ("auto", "off")}
        try:
            compare(f"{REQUESTS} requests", rounds, lambda mode: embed(servers[mode][1]))
        finally:
            for process, _ in servers.values():
                process.terminate()
                process.wait()


if __name__ == "__main__":
    main()
