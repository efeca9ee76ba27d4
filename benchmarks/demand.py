"""More models than fit: requests for six models where two are loaded at once, beside llama-server's
own router with `--models-max 2`.

    .venv/bin/python benchmarks/demand.py [seconds] [model=…] [seed=…]

Both get the same requests at the same times, one after the other: a seeded trace in which one model
is asked for in half of all requests, and the last one rarely. Ten minutes each by default. The
model is by default the demonstration model, six times under names of its own, on one thread each.
What counts is how long a request waits for its answer, and how often a model was loaded.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

from gateway import free_port, running  # noqa: E402
from msgspec import convert  # noqa: E402

from pipeline.core.paths import Home  # noqa: E402
from pipeline.serve.gateway.router import router_arguments, router_preset  # noqa: E402
from pipeline.serve.gateway.settings import GatewaySettings  # noqa: E402
from pipeline.serve.server import BOOT, GATEWAY, Server  # noqa: E402
from pipeline.serve.supervisor import books  # noqa: E402
from pipeline.serve.supervisor import state as files  # noqa: E402

NAMES = ("a", "b", "c", "d", "e", "f")
SHARES = (32, 16, 8, 4, 3, 1)
AT_ONCE = 2
EVERY = 1.0  # seconds between two requests, on average
MOST_SECONDS = 300.0  # for one answer


@dataclass(frozen=True)
class Request:
    at: float  # seconds from the start
    model: str
    tokens: int


def trace(seconds: float, seed: int) -> list[Request]:
    """The requests: in bursts of one to four for one model, as conversations make them."""
    chance, at, requests = random.Random(seed), 0.0, list[Request]()
    while at < seconds:
        model, burst = chance.choices(NAMES, SHARES)[0], chance.randint(1, 4)
        for _ in range(burst):
            requests.append(Request(at, model, chance.randint(4, 24)))
            at += chance.expovariate(2 / EVERY)
        at += chance.expovariate(1 / (burst * EVERY / 2))
    return requests


async def ask(port: int, request: Request) -> tuple[float, str]:
    """Seconds until the whole answer is there, and what went wrong with it."""
    body = {
        "model": request.model,
        "messages": [{"role": "user", "content": f"hello {request.model}"}],
        "max_tokens": request.tokens,
        "temperature": 0,
    }
    began = time.perf_counter()
    try:
        async with asyncio.timeout(MOST_SECONDS):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            data = json.dumps(body).encode()
            writer.write(
                f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n"
                "Connection: close\r\n\r\n".encode()
            )
            writer.write(data)
            answer = await reader.read()
            writer.close()
    except (OSError, TimeoutError) as error:
        return time.perf_counter() - began, type(error).__name__
    status = answer.split(b" ", 2)[1].decode() if answer else "no answer"
    return time.perf_counter() - began, "" if status == "200" else status


async def replay(port: int, requests: Sequence[Request]) -> list[tuple[float, str]]:
    """Each request at its time, whatever became of those before."""
    began = time.perf_counter()

    async def one(request: Request) -> tuple[float, str]:
        await asyncio.sleep(max(0.0, request.at - (time.perf_counter() - began)))
        return await ask(port, request)

    return await asyncio.gather(*(one(request) for request in requests))


def show(name: str, results: Sequence[tuple[float, str]], loads: int) -> None:
    waits = sorted(seconds for seconds, _ in results)
    errors = Counter(error for _, error in results if error)
    p95 = waits[int(len(waits) * 0.95)]
    print(
        f"{name:>8} {len(results):>5} requests  median {statistics.median(waits):>7.2f} s"
        f"  p95 {p95:>7.2f} s  longest {waits[-1]:>7.2f} s  {loads:>4} loads"
        f"  errors {dict(errors) or 'none'}",
        flush=True,
    )


def doit(home: Path, *words: str) -> str:
    env = {**os.environ, "LLAMA_PIPELINE_HOME": str(home)}
    command = [sys.executable, "-m", "doit", *words]
    done = subprocess.run(command, cwd=REPOSITORY, env=env, check=False, capture_output=True)
    if done.returncode:
        sys.exit((done.stdout + done.stderr).decode(errors="replace"))
    return done.stdout.decode()


def write(file: Path, model: Path, memory: int | None, port: int) -> None:
    lines = ["[master]\nsaved_slots = '0GiB'"]  # the router saves none
    lines += [f"memory = '{memory // 1000}KB'"] if memory else []
    lines += [f"[gateway]\nenable = true\nport = {port}\n[instance.control]\nstart = 'demand'"]
    lines += [
        f"[instance.server]\nmodel = '{model}'\nctx_size = 2048\nthreads = 1\napi_key = 'none'"
    ]
    lines += [f"[instance.{name}.server]\nport = {free_port()}" for name in NAMES]
    file.write_text("\n".join(lines), encoding="utf-8")


def ours(folder: Path, model: Path, requests: Sequence[Request]) -> None:
    """The gateway, with memory for AT_ONCE models."""
    port, file = free_port(), folder / "demand.toml"
    at = files.folder(Home(REPOSITORY), str(file))
    write(file, model, None, port)
    doit(REPOSITORY, "up", f"config={file}")  # only to learn what one takes
    need = books.read(at)["a"].need["ram"]
    write(file, model, int(need * (AT_ONCE + 0.5)), port)
    doit(REPOSITORY, "up", f"config={file}")
    try:
        before = loads(at)
        results = asyncio.run(replay(port, requests))
        show("gateway", results, loads(at) - before)
    finally:
        doit(REPOSITORY, "down", f"config={file}")


def loads(at: files.Folder) -> int:
    """How often the supervisor has said that a model loads."""
    return len(re.findall(r" [a-f]: loading$", at.log.read_text("utf-8"), re.M))


def router(folder: Path, model: Path, requests: Sequence[Request]) -> None:
    """llama-server's router, with AT_ONCE models."""
    port, file, log = free_port(), folder / "router.toml", folder / "router.log"
    write(file, model, None, port)
    planned = json.loads(doit(REPOSITORY, "plan", f"config={file}", "format=json"))
    servers = [
        convert({**server, "start": BOOT}, Server)
        for server in planned
        if server["engine"] != GATEWAY
    ]
    preset = folder / "preset.ini"
    text = router_preset(servers, GatewaySettings())
    preset.write_text(text.replace("load-on-startup = true\n", ""), encoding="utf-8")
    words = [servers[0].executable]
    words += router_arguments(preset, AT_ONCE, GatewaySettings(port=port))
    with running([*words, "--log-file", str(log)], port, dict(os.environ)):
        results = asyncio.run(replay(port, requests))
    spawned = log.read_text("utf-8", "replace") if log.exists() else ""
    show("router", results, len(re.findall(r"spawning server instance", spawned)))


def main() -> None:
    named = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
    seconds = float(next((word for word in sys.argv[1:] if "=" not in word), 600))
    model, seed = named.get("model", "demo"), int(named.get("seed", "1"))
    if not Path(model).is_file():
        doit(REPOSITORY, "prepare", f"model={model}")
        plan = json.loads(doit(REPOSITORY, "plan", f"model={model}", "format=json"))
        model = plan["cmd"][plan["cmd"].index("--model") + 1]
    requests = trace(seconds, seed)
    print(
        f"{len(requests)} requests in {seconds:g} s, seed {seed}, {AT_ONCE} of {len(NAMES)} models"
    )
    with tempfile.TemporaryDirectory() as temporary:
        ours(Path(temporary), Path(model), requests)
        router(Path(temporary), Path(model), requests)


if __name__ == "__main__":
    main()
