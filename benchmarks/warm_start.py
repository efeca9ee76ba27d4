"""Time to ready of a warm `doit serve` over the same llama-server typed by hand.

    .venv/bin/python benchmarks/warm_start.py [rounds] [model=…]

Both are started in turn; ready is the first 200 on /health. The model is prepared first.
"""

from __future__ import annotations

import sys

from common import DOIT, doit, free_port, medians, plan, running


def seconds_to_ready(command: list[str], port: int) -> float:
    """Start, wait for 200, stop."""
    with running(command, port, pause=0.002) as seconds:
        return seconds


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    model = sys.argv[2] if len(sys.argv) > 2 else "model=demo-embed"
    doit("prepare", model)

    def ours() -> float:
        port = free_port()
        return seconds_to_ready([*DOIT, "serve", model, f"port={port}"], port)

    def by_hand() -> float:
        port = free_port()
        planned = plan(model, f"port={port}")
        return seconds_to_ready([planned["executable"], *planned["cmd"]], port)

    one, other = medians(rounds, ours, by_hand)
    print(f"doit serve    {one:.3f} s to ready (median of {rounds}, alternating)")
    print(f"llama-server  {other:.3f} s")
    print(f"difference    {one - other:.3f} s, ratio {one / other:.2f}")


if __name__ == "__main__":
    main()
