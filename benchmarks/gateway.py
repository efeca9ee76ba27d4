"""Time to first token and tokens per second through the gateway over asking directly.

    .venv/bin/python benchmarks/gateway.py [rounds] [model=…]

Beside it stand the guard of `serve`, llama-server's own router, and nginx where it is installed.
All are asked in turn, by 1 client and by 16 at once, for streams of the same length. The model is
by default the tests' tiny one, which answers faster than any real one: what the gateway adds to
each token shows as nothing else does. The best round of each counts: other work on the machine
disturbs it least.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from common import DOIT, REPOSITORY, doit, free_port, plan, running, send
from fakes import tiny_llama

from pipeline.serve.gateway.other_engines import router_arguments, router_preset
from pipeline.serve.gateway.settings import GatewaySettings
from pipeline.serve.server import Server
from pipeline.serve.supervisor import state as files

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


async def ask(port: int) -> Stream:
    """One stream."""
    begin = time.perf_counter()
    reader, writer = await send(port, "/v1/chat/completions", BODY)
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


def variables(model: str, port: int) -> list[str]:
    """What `serve` and `plan` are run with."""
    return [f"model={model}", f"port={port}", "parallel=16", "alias=bench", "server.metrics=1"]


def server_command(model: str, port: int) -> list[str]:
    """The command of a server for `model`, which is prepared first."""
    words = variables(model, port)
    doit("prepare", *words)
    planned = plan(*words)
    return [planned["executable"], *planned["cmd"]]


def measure(ports: dict[str, int], rounds: int) -> None:
    """Print the best round of each, and what it adds to asking directly."""
    print(f"{'clients':>8} {'':>8} {'first token':>12} {'more':>9} {'tokens/s':>10} {'ratio':>6}")
    for clients in CLIENTS:
        results: dict[str, list[tuple[float, float]]] = {name: [] for name in ports}
        for _ in range(rounds):
            for name, port in ports.items():
                results[name].append(asyncio.run(ask_all(port, clients)))
        for name, rows in results.items():
            first, speed = min(row[0] for row in rows), max(row[1] for row in rows)
            if name == "direct":
                direct = first, speed
            print(
                f"{clients:>8} {name:>8} {first * 1000:>9.1f} ms"
                f" {(first - direct[0]) * 1000:>+6.1f} ms {speed:>10.0f} {speed / direct[1]:>6.2f}"
            )


NGINX = """daemon off; pid {folder}/nginx.pid; error_log stderr; worker_processes 1;
events {{}}
http {{
  access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/1; uwsgi_temp_path {folder}/2; scgi_temp_path {folder}/3;
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://127.0.0.1:{direct}; proxy_buffering off; proxy_http_version 1.1;
    }}
  }}
}}
"""


def nginx(folder: Path, port: int, direct: int) -> list[str] | None:
    """The command of nginx; None where it is not installed."""
    program = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        return None
    config = folder / "nginx.conf"
    config.write_text(NGINX.format(folder=folder, port=port, direct=direct))
    return [program, "-c", str(config)]


def router(folder: Path, port: int, server: list[str]) -> list[str]:
    """The command of llama-server's router before a server of its own like `server`."""
    executable, *words = server
    instance = Server(name="bench", executable=executable, cmd=tuple(words), folder="", log_file="")
    preset = folder / "preset.ini"
    preset.write_text(router_preset([instance], GatewaySettings()))
    return [executable, *router_arguments(preset, 1, GatewaySettings(port=port))]


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    model = sys.argv[2].removeprefix("model=") if len(sys.argv) > 2 else ""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if not model:
            model = str(REPOSITORY / "run" / "tiny-llama")
            if not Path(model).exists():
                tiny_llama.make(Path(model))
        ports = {name: free_port() for name in ("direct", "guard", "gateway", "router", "nginx")}
        direct = ports["direct"]
        server = server_command(model, direct)
        at = files.Folder(folder)
        instance = Server(name="bench", executable="", cmd=(), folder="", log_file="", port=direct)
        files.write_wanted(at, files.DesiredState(config="bench", instances=(instance,)))
        seen = files.ServerStatus(name="bench", state=files.READY)
        files.write_state(at, files.State(pid=1, started=0.0, asked=0, instances=(seen,)))
        gateway = [sys.executable, "-m", "pipeline.serve.gateway", temporary]
        commands = {
            "direct": server,
            "guard": [*DOIT, "serve", *variables(model, ports["guard"])],
            "gateway": [*gateway, json.dumps({"port": ports["gateway"]})],
            "router": router(folder, ports["router"], server),
            "nginx": nginx(folder, ports["nginx"], direct),
        }
        with ExitStack() as started:
            for name, command in commands.items():
                if command:
                    started.enter_context(running(command, ports[name]))
                else:
                    del ports[name]
            measure(ports, rounds)


if __name__ == "__main__":
    main()
