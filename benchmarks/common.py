"""What the benchmarks share. Import it first: it makes `pipeline` and what the tests share
importable."""

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
import threading
import time
import urllib.request
from asyncio import StreamReader, StreamWriter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
DOIT = [sys.executable, "-m", "pipeline"]  # as ./doitw does
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]


def environment(home: Path = REPOSITORY) -> dict[str, str]:
    """A user's environment: Python keeps its compiled modules, and `home` is the home."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return env | {"LLAMA_PIPELINE_HOME": str(home)}


def doit(*words: str, home: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    """Run a command of ours to its end, which must be a success."""
    done = subprocess.run(
        [*DOIT, *words],
        cwd=REPOSITORY,
        env=environment(home),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{' '.join(words)} failed:\n{done.stdout}{done.stderr}")
    return done


def plan(*words: str, home: Path = REPOSITORY) -> Any:
    """What `plan` prints as JSON."""
    return json.loads(doit("plan", *words, "format=json", home=home).stdout)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def request(url: str, body: Mapping[str, object]) -> urllib.request.Request:
    """A POST of JSON."""
    headers = {"Content-Type": "application/json"}
    return urllib.request.Request(url, json.dumps(body).encode(), headers)


def post(url: str, body: Mapping[str, object]) -> Any:
    """The JSON that answers a POST of JSON. Raises OSError."""
    with urllib.request.urlopen(request(url, body), timeout=600) as answer:
        return json.load(answer)


async def send(port: int, path: str, data: bytes) -> tuple[StreamReader, StreamWriter]:
    """POST JSON over a bare socket, which costs less than any client. Raises OSError."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n"
        "Connection: close\r\n\r\n"
    )
    writer.write(head.encode() + data)
    return reader, writer


@contextmanager
def sampling(seconds: float, sample: Callable[[], None]) -> Iterator[None]:
    """Call `sample` on a thread, again and again, for as long as the block runs."""
    over = threading.Event()

    def run() -> None:
        while not over.wait(seconds):
            sample()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextmanager
def running(command: list[str], port: int, pause: float = 0.02) -> Iterator[float]:
    """A server, from the first 200 on its /health: yields the seconds until then."""
    start = time.perf_counter()
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(
            command, cwd=REPOSITORY, env=environment(), stdout=log, stderr=log
        ) as process,
    ):
        try:
            while not is_ready(port):
                if process.poll() is not None:
                    log.seek(0)
                    sys.exit(log.read().decode(errors="replace"))
                time.sleep(pause)
            yield time.perf_counter() - start
        finally:
            process.send_signal(signal.SIGINT)


def is_ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
            return True
    except OSError:
        return False


def medians(rounds: int, *works: Callable[[], float]) -> list[float]:
    """The median of the seconds that each work returns; they alternate, and the first round, which
    warms caches, does not count."""
    seconds: list[list[float]] = [[] for _ in works]
    for number in range(rounds + 1):
        for each, work in zip(seconds, works, strict=True):
            taken = work()
            if number:
                each.append(taken)
    return [statistics.median(each) for each in seconds]
