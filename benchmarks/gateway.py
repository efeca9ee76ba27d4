"""Time to first token and tokens per second through the gateway over asking directly.

    .venv/bin/python benchmarks/gateway.py [rounds] [model=…]

Both ways are asked in turn, by 1 client and by 16 at once, for streams of the same length. The
model is by default the tests' tiny one, which answers faster than any real one: what the gateway
adds to each token shows as nothing else does.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

from fakes import tiny_llama  # noqa: E402

from pipeline.serve.server import Server  # noqa: E402
from pipeline.serve.supervisor import state as files  # noqa: E402

TOKENS = 128
CLIENTS = (1, 16)
BODY = json.dumps(
    {
        "model": "bench",
        "messages": [{"role": "user", "content": "hello there"}],
        "max_tokens": TOKENS,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
    }
).encode()


@dataclass(frozen=True)
class Stream:
    """One answer: seconds until its first token and its last one, and how many there were."""

    first: float
    seconds: float
    tokens: int


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(command: list[str], port: int, env: dict[str, str]) -> Iterator[None]:
    """A server, from the moment that its /health answers 200."""
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(command, cwd=REPOSITORY, env=env, stdout=log, stderr=log) as process,
    ):
        try:
            while not is_ready(port):
                if process.poll() is not None:
                    log.seek(0)
                    sys.exit(log.read().decode(errors="replace"))
                time.sleep(0.02)
            yield
        finally:
            process.send_signal(signal.SIGINT)


def is_ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
            return True
    except OSError:
        return False


async def ask(port: int) -> Stream:
    """One stream, read from a bare socket."""
    begin = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(BODY)}\r\n"
        "Connection: close\r\n\r\n"
    )
    writer.write(head.encode() + BODY)
    first, tokens = 0.0, 0
    while line := await reader.readline():
        if line.startswith(b"data: {") and b'"content":"' in line:
            first = first or time.perf_counter() - begin
            tokens += 1
    writer.close()
    return Stream(first, time.perf_counter() - begin, tokens)


async def ask_all(port: int, clients: int) -> tuple[float, float]:
    """Median seconds to the first token, and tokens per second of all clients together."""
    begin = time.perf_counter()
    streams = await asyncio.gather(*(ask(port) for _ in range(clients)))
    seconds = time.perf_counter() - begin
    tokens = sum(stream.tokens for stream in streams)
    if not tokens:
        sys.exit("no tokens came")
    return statistics.median(stream.first for stream in streams), tokens / seconds


def planned(model: str, port: int) -> list[str]:
    """The command of a server for `model`, which is prepared first."""
    doit = [sys.executable, "-m", "doit"]
    words = [f"model={model}", f"port={port}", "parallel=16", "alias=bench", "server.metrics=1"]
    subprocess.run([*doit, "prepare", *words], cwd=REPOSITORY, check=True)
    told = subprocess.run(
        [*doit, "plan", *words, "format=json"],
        cwd=REPOSITORY,
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    plan = json.loads(told.stdout)
    return [plan["executable"], *plan["cmd"]]


def measure(direct: int, gateway: int, rounds: int) -> None:
    print(f"{'clients':>8} {'':>12} {'first token':>12} {'tokens/s':>10}")
    for clients in CLIENTS:
        told: dict[str, list[tuple[float, float]]] = {"direct": [], "gateway": []}
        for number in range(rounds + 1):
            for name, port in (("direct", direct), ("gateway", gateway)):
                result = asyncio.run(ask_all(port, clients))
                if number:  # the first round warms up
                    told[name].append(result)
        medians = {
            name: tuple(statistics.median(column) for column in zip(*rows, strict=True))
            for name, rows in told.items()
        }
        for name, (first, speed) in medians.items():
            print(f"{clients:>8} {name:>12} {first * 1000:>9.1f} ms {speed:>10.0f}")
        first, speed = (
            through / plain
            for through, plain in zip(medians["gateway"], medians["direct"], strict=True)
        )
        print(f"{clients:>8} {'ratio':>12} {first:>12.2f} {speed:>10.2f}")


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    model = sys.argv[2].removeprefix("model=") if len(sys.argv) > 2 else ""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if not model:
            model = str(REPOSITORY / "run" / "tiny-llama")
            if not Path(model).exists():
                tiny_llama.make(Path(model))
        direct, gateway = free_port(), free_port()
        server = planned(model, direct)
        at = files.Folder(folder)
        instance = Server(name="bench", executable="", cmd=(), folder="", log_file="", port=direct)
        files.write_wanted(at, files.DesiredState(config="bench", instances=(instance,)))
        seen = files.ServerStatus(name="bench", state=files.READY)
        files.write_state(at, files.State(pid=0, started=0.0, asked=0, instances=(seen,)))
        command = [sys.executable, "-m", "pipeline.serve.gateway", temporary]
        env = dict(os.environ)
        with (
            running(server, direct, env),
            running([*command, "--port", str(gateway)], gateway, env),
        ):
            measure(direct, gateway, rounds)


if __name__ == "__main__":
    main()
