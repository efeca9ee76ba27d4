"""Time to ready of a warm `doit serve` over the same llama-server typed by hand.

    .venv/bin/python benchmarks/warm_start.py [rounds] [model=…]

Both are started in turn; ready is the first 200 on /health. The model is prepared first.
"""

from __future__ import annotations

import http.client
import json
import os
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def seconds_to_ready(command: list[str], port: int, env: dict[str, str]) -> float:
    """Start, wait for 200, stop."""
    start = time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while True:
        if process.poll() is not None:
            sys.exit(f"it ended by itself: {shlex.join(command)}")
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1)
        try:
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                break
        except OSError:
            pass
        finally:
            connection.close()
        time.sleep(0.002)
    seconds = time.perf_counter() - start
    process.send_signal(signal.SIGINT)
    process.wait()
    return seconds


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    model = sys.argv[2] if len(sys.argv) > 2 else "model=demo-embed"
    doit = [sys.executable, "-m", "pipeline"]  # as ./doitw does
    subprocess.run([*doit, "prepare", model], cwd=REPOSITORY, check=True)
    ours, plain = [], []
    # Users' Python keeps its compiled modules; an inherited setting may forbid that.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    for number in range(rounds + 1):
        port = free_port()
        planned = json.loads(
            subprocess.run(
                [*doit, "plan", model, f"port={port}", "format=json"],
                cwd=REPOSITORY,
                check=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            ).stdout
        )
        by_hand = [planned["executable"], *planned["cmd"]]
        pair = (
            seconds_to_ready([*doit, "serve", model, f"port={port}"], port, env),
            seconds_to_ready(by_hand, port, env),
        )
        if number:  # the first round warms the disk cache
            ours.append(pair[0])
            plain.append(pair[1])
    one, other = statistics.median(ours), statistics.median(plain)
    print(f"doit serve    {one:.3f} s to ready (median of {rounds}, alternating)")
    print(f"llama-server  {other:.3f} s")
    print(f"difference    {one - other:.3f} s, ratio {one / other:.2f}")


if __name__ == "__main__":
    main()
