"""More models than fit: eight clients ask for six models where memory holds two or three, beside
llama-server's own router with `--models-max 2`.

    .venv/bin/python benchmarks/demand.py [seconds] [seed=…] [swap_wait=0]

Each client has a seeded list of requests, in bursts for one model as conversations make them, and
sends each at its time or once the one before is answered. Ten minutes for each by default, of which
the pipeline's gateway has two: as it is by default, and with another `swap_wait` in the file.
Beside how long a request takes it prints

- the loads, over those of an oracle: the fewest that the same requests in the order of their
  arrival can do with, where everything to come is known (computed exactly, over all sets of models
  that fit),
- the most memory that all servers together had, as the kernel counts it (resident, so that what two
  of them share counts twice), over what they were given, and how often it was more,
- the time of a load over the bare server's start, on the machine at rest.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import psutil
from common import REPOSITORY, doit, free_port, plan, running, sampling, send
from fakes import tiny_llama
from msgspec import convert

from pipeline.core.paths import Home
from pipeline.serve.gateway.other_engines import router_arguments, router_preset
from pipeline.serve.gateway.settings import GatewaySettings
from pipeline.serve.server import BOOT, GATEWAY, Server
from pipeline.serve.supervisor import books
from pipeline.serve.supervisor import state as files

CLIENTS = 8
AT_ONCE = 2  # models that the router keeps
EVERY = 6.0  # seconds between two requests of a client, on average
MOST_SECONDS = 300.0  # for one answer
SAMPLE_SECONDS = 0.1
STARTS = 3  # of which the median counts
PHASE = 120.0  # seconds that popularity stays, where it changes


@dataclass(frozen=True)
class Model:
    """One of those that are asked for: what it is made from, and how often it is wanted."""

    words: tuple[str, ...]  # as `plan` takes them
    ctx_size: int
    share: int
    embeds: bool = False


MODELS = {
    "a": Model(("model=demo",), 2048, 32),
    "b": Model(("model=demo",), 8192, 16),
    "c": Model(("model=demo",), 4096, 8),
    "d": Model(("model=demo-embed", "quant=q8_0"), 512, 8, embeds=True),
    "e": Model(("model=demo-embed", "quant=f32"), 512, 4, embeds=True),
    "f": Model(("model=run/tiny-llama",), 2048, 2),
}
SHARES = [model.share for model in MODELS.values()]


@dataclass(frozen=True)
class Request:
    at: float  # seconds from the start, at the earliest
    model: str
    tokens: int


@dataclass(frozen=True)
class Result:
    model: str
    sent: float  # seconds from the start
    seconds: float  # until the whole answer was there
    error: str


def requests_of(
    client: int, seconds: float, seed: int, phases: Sequence[Sequence[float]] = (SHARES,)
) -> list[Request]:
    """The requests of one client: bursts of one to four for one model. `phases` are the models'
    shares, each for PHASE seconds."""
    chance, at, requests = random.Random(f"{seed} {client}"), 0.0, list[Request]()
    while True:
        name = chance.choices(list(MODELS), phases[int(at // PHASE) % len(phases)])[0]
        for _ in range(chance.randint(1, 4)):
            at += chance.expovariate(1 / EVERY)
            if at >= seconds:
                return requests
            requests.append(Request(at, name, chance.randint(4, 24)))


def oracle(order: Sequence[str], need: Mapping[str, int], budget: int) -> int:
    """The fewest loads with which these models can be asked for in this order."""
    sets = [
        frozenset(chosen)
        for count in range(1, len(need) + 1)
        for chosen in combinations(need, count)
        if sum(need[name] for name in chosen) <= budget
    ]
    costs: dict[frozenset[str], float] = {frozenset(): 0}
    for name in order:
        costs = {
            now: min(cost + len(now - before) for before, cost in costs.items())
            for now in sets
            if name in now
        }
    return int(min(costs.values()))


async def ask(port: int, request: Request) -> str:
    """What went wrong with a request; empty where it was answered."""
    body: dict[str, object] = {"model": request.model}
    path = "/v1/embeddings" if MODELS[request.model].embeds else "/v1/chat/completions"
    if MODELS[request.model].embeds:
        body |= {"input": "hello"}
    else:
        messages = [{"role": "user", "content": f"hello {request.model}"}]
        body |= {"messages": messages, "max_tokens": request.tokens, "temperature": 0}
    try:
        async with asyncio.timeout(MOST_SECONDS):
            reader, writer = await send(port, path, json.dumps(body).encode())
            answer = await reader.read()
            writer.close()
    except (OSError, TimeoutError) as error:
        return type(error).__name__
    status = answer.split(b" ", 2)[1].decode() if answer else "no answer"
    return "" if status == "200" else status


async def replay(port: int, clients: Sequence[Sequence[Request]]) -> list[Result]:
    """All requests in the order in which they were sent."""
    began = time.perf_counter()
    results: list[Result] = []

    async def run(requests: Sequence[Request]) -> None:
        for request in requests:
            await asyncio.sleep(max(0.0, request.at - (time.perf_counter() - began)))
            sent = time.perf_counter() - began
            error = await ask(port, request)
            seconds = time.perf_counter() - began - sent
            results.append(Result(request.model, sent, seconds, error))

    await asyncio.gather(*map(run, clients))
    return sorted(results, key=lambda result: result.sent)


class Watch:
    """The memory of the servers of some files: the most in bytes, and how often it was too much."""

    def __init__(self, budget: int, models: set[str]) -> None:
        self.budget, self.models = budget, models
        self.most = self.over = self.samples = 0

    def sample(self) -> None:
        used = sum(map(resident, llama_servers(self.models)))
        self.most = max(self.most, used)
        self.over += used > self.budget
        self.samples += 1


@contextmanager
def watched(budget: int, models: set[str]) -> Iterator[Watch]:
    watch = Watch(budget, models)
    with sampling(SAMPLE_SECONDS, watch.sample):
        yield watch


def llama_servers(models: set[str]) -> list[psutil.Process]:
    """The processes that serve one of these files."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "llama-server" in " ".join(words[:1]) and models.intersection(words):
            found.append(process)
    return found


def resident(process: psutil.Process) -> int:
    """Bytes; 0 where it has ended."""
    with contextlib.suppress(psutil.Error):
        return int(process.memory_info().rss)
    return 0


def show(name: str, results: Sequence[Result], loads: int, fewest: int, watch: Watch) -> None:
    waits = sorted(result.seconds for result in results)
    errors = Counter(result.error for result in results if result.error)
    print(
        f"{name:>8} {len(results):>5} requests  median {statistics.median(waits):>6.2f} s"
        f"  p95 {waits[int(len(waits) * 0.95)]:>6.2f} s  longest {waits[-1]:>6.2f} s"
        f"  {loads:>4} loads, oracle {fewest} ({loads / fewest:.2f})"
        f"  memory {watch.most / watch.budget:.2f}, over it {watch.over} of {watch.samples} times"
        f"  errors {dict(errors) or 'none'}",
        flush=True,
    )


def write(
    file: Path, models: Mapping[str, Path], memory: int | None, port: int, swap_wait: str = ""
) -> None:
    lines = ["[master]\nsaved_slots = '0GiB'"]  # the router saves none
    lines += [f"swap_wait = {swap_wait}"] if swap_wait else []
    lines += [f"memory = '{memory // 1000}KB'"] if memory else []
    lines += [f"[gateway]\nenable = true\nport = {port}\n[instance.control]\nstart = 'demand'"]
    lines += ["[instance.server]\nthreads = 1\napi_key = 'none'"]
    for name, path in models.items():
        lines.append(f"[instance.{name}.server]\nport = {free_port()}\nmodel = '{path}'")
        lines.append(f"ctx_size = {MODELS[name].ctx_size}")
        lines += ["embeddings = true\npooling = 'mean'"] if MODELS[name].embeds else []
    file.write_text("\n".join(lines), encoding="utf-8")


def prepared(words: Sequence[str]) -> Path:
    """The GGUF of a model."""
    doit("prepare", *words)
    command = plan(*words)["cmd"]
    return Path(command[command.index("--model") + 1])


@dataclass(frozen=True)
class Bench:
    """What both are given."""

    folder: Path
    models: Mapping[str, Path]
    clients: Sequence[Sequence[Request]]
    need: dict[str, int]  # bytes by model, by our books
    budget: int  # bytes

    def fewest(self, results: Sequence[Result]) -> int:
        return oracle([result.model for result in results], self.need, self.budget)

    def watched(self) -> contextlib.AbstractContextManager[Watch]:
        return watched(self.budget, {str(path) for path in self.models.values()})


def bench(folder: Path, seconds: float, seed: int) -> Bench:
    if not (REPOSITORY / "run" / "tiny-llama").exists():
        tiny_llama.make(REPOSITORY / "run" / "tiny-llama")
    models = {name: prepared(model.words) for name, model in MODELS.items()}
    clients = [requests_of(client, seconds, seed) for client in range(CLIENTS)]
    file = folder / "needs.toml"
    write(file, models, None, free_port())
    doit("up", f"config={file}")  # only to learn what each takes
    entries = books.read(files.folder(Home(REPOSITORY), str(file)))
    doit("down", f"config={file}")
    need = {name: entries[name].need["ram"] for name in models}
    budget = need["a"] + need["b"] + max(need["d"], need["e"])
    return Bench(folder, models, clients, need, budget)


def ours(given: Bench, swap_wait: str) -> None:
    port, file = free_port(), given.folder / f"demand-{swap_wait}.toml"
    at = files.folder(Home(REPOSITORY), str(file))
    write(file, given.models, given.budget, port, swap_wait)
    doit("up", f"config={file}")
    try:
        with given.watched() as watch:
            results = asyncio.run(replay(port, given.clients))
        name = f"wait {swap_wait} s" if swap_wait else "gateway"
        show(name, results, loads(at), given.fewest(results), watch)
        if not swap_wait:
            compare_starts(at, file)
    finally:
        doit("down", f"config={file}")


def loads(at: files.Folder) -> int:
    """How often the supervisor has said that a model loads."""
    return len(re.findall(r" [a-f]: loading$", at.log.read_text("utf-8"), re.M))


def compare_starts(at: files.Folder, file: Path) -> None:
    """Each model loaded by itself, and its server started by hand in the same state."""
    wanted = files.read_wanted(at)
    assert wanted
    servers = {server.name: server for server in wanted.instances if server.name in MODELS}
    loading, starting = 0.0, 0.0
    for name, server in servers.items():
        taken, bare = [], []
        for _ in range(STARTS):
            for other in servers:
                doit("unload", f"config={file}", f"name={other}")
            doit("load", f"config={file}", f"name={name}")
            taken.append(books.read(at)[name].load_seconds)
        for other in servers:
            doit("unload", f"config={file}", f"name={other}")
        for _ in range(STARTS):
            port = free_port()
            words = [str(port) if word == str(server.port) else word for word in server.command]
            with running(words, port) as seconds:
                bare.append(seconds)
        load, start = statistics.median(taken), statistics.median(bare)
        print(f"{name:>8} loads in {load:.2f} s, bare {start:.2f} s, ratio {load / start:.2f}")
        loading, starting = loading + load, starting + start
    ratio = loading / starting
    print(f"     all load in {loading:.2f} s, bare {starting:.2f} s, ratio {ratio:.2f}")


def router(given: Bench) -> None:
    """llama-server's router, with AT_ONCE models."""
    port, folder = free_port(), given.folder
    file, log = folder / "router.toml", folder / "router.log"
    write(file, given.models, None, port)
    servers = [
        convert({**server, "start": BOOT}, Server)
        for server in plan(f"config={file}")
        if server["engine"] != GATEWAY
    ]
    preset = folder / "preset.ini"
    text = router_preset(servers, GatewaySettings())
    preset.write_text(text.replace("load-on-startup = true\n", ""), encoding="utf-8")
    words = [servers[0].executable]
    words += router_arguments(preset, AT_ONCE, GatewaySettings(port=port))
    words += ["--log-file", str(log)]
    with running(words, port), given.watched() as watch:
        results = asyncio.run(replay(port, given.clients))
    spawned = log.read_text("utf-8", "replace") if log.exists() else ""
    count = len(re.findall(r"spawning server instance", spawned))
    show("router", results, count, given.fewest(results), watch)


def main() -> None:
    named = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
    seconds = float(next((word for word in sys.argv[1:] if "=" not in word), 600))
    seed = int(named.get("seed", "1"))
    with tempfile.TemporaryDirectory() as temporary:
        given = bench(Path(temporary), seconds, seed)
        print(f"{CLIENTS} clients, {len(MODELS)} models, {seconds:g} s, seed {seed}")
        for swap_wait in ("", named.get("swap_wait", "0")):
            ours(given, swap_wait)
        router(given)


if __name__ == "__main__":
    main()
