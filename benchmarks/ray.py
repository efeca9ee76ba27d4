"""Through Ray's ingress over our own gateway over asking directly; prompts evaluated again with
and without the choice of replicas by prefix; and how long a replica takes to answer.

    .venv/bin/python benchmarks/ray.py [rounds] [model=…]

Three nodes on this machine, each with a home of its own, and Ray in its environment, which is made
where it is missing. The model is by default the tests' tiny one, which answers faster than any real
one: what stands in between shows as nothing else does. The best round of each counts.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from common import REPOSITORY, free_port, is_ready, post, running  # first: see there
from fakes import hub as hubs
from fakes import tiny_llama
from gateway import measure, server_command

sys.path.append(str(REPOSITORY / "tests" / "deploy" / "ray"))
from ray_tools import Cluster, config, server

from pipeline.core.paths import Home
from pipeline.deploy.ray import environment
from pipeline.deploy.ray.config import Resources
from pipeline.serve.server import Server
from pipeline.serve.supervisor import state as files

ROUNDS = 5
CONVERSATIONS, TURNS = 6, 4
SYSTEM = "You are a helpful assistant. " * 10  # that all conversations share
TEXT = "Tell me more of that, and of what follows from it, as well as you can. " * 3
# Serve's own choice of a replica is that of two at random.
ROUTERS: dict[str, dict[str, Any]] = {
    "by prefix": {},
    "round robin": {
        "request_router_class": "ray.serve.experimental.round_robin_router:RoundRobinRouter"
    },
}


FILE = """[instance.bench.model]
ref = "org/bench"
[instance.bench.server]
ctx_size = 16384
parallel = 16
"""


def begin(cluster: Cluster, replicas: int, node: str, router: dict[str, Any]) -> float:
    """Deploy `bench` anew on nodes of this kind; seconds until its replicas answer."""
    cluster.call("deploy", config={"applications": []})
    while cluster.status():
        time.sleep(0.1)
    needed = Resources(cpus=1, custom={node: 1})
    bench = server("bench", FILE, replicas=(replicas,) * 2, slots=16, resources=needed)
    made = config([bench], cluster.port)
    if router:
        made["applications"][0]["deployments"][0]["request_router_config"] = router
    start = time.monotonic()
    cluster.call("deploy", config=made)
    cluster.wait_until_running("bench", replicas, 300)
    seconds = time.monotonic() - start
    while not is_ready(cluster.port):
        time.sleep(0.1)
    return seconds


def evaluated(url: str) -> tuple[int, int]:
    """Prompt tokens that were evaluated, and tokens of all prompts, of conversations that take
    turns."""
    new = all_tokens = 0
    talks: list[list[dict[str, str]]] = [
        [{"role": "system", "content": SYSTEM}] for _ in range(CONVERSATIONS)
    ]
    for turn in range(TURNS):
        for number, messages in enumerate(talks):
            messages.append({"role": "user", "content": f"{number} {turn}: {TEXT}"})
            body = {"model": "bench", "messages": messages, "max_tokens": 8, "temperature": 0}
            answer = post(f"{url}/v1/chat/completions", body)
            new += answer["timings"]["prompt_n"]
            all_tokens += answer["usage"]["prompt_tokens"]
            content = answer["choices"][0]["message"]["content"] or "."
            messages.append({"role": "assistant", "content": content})
    return new, all_tokens


def compare_routers(cluster: Cluster) -> None:
    """Print how many prompt tokens two replicas evaluate."""
    for name, router in ROUTERS.items():
        begin(cluster, 2, "worker", router)
        new, all_tokens = evaluated(cluster.url)
        print(f"{name}: {new:,} of {all_tokens:,} prompt tokens evaluated")


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    made = environment.installed(Home(REPOSITORY))
    made.make(why="for the benchmark")
    with tempfile.TemporaryDirectory(prefix="ray-") as short, ExitStack() as started:
        folder, bins = Path(short), os.environ.get("LLAMA_SERVER_BINS_DIR", "")
        model = sys.argv[2].removeprefix("model=") if len(sys.argv) > 2 else ""
        if not model:
            model = str(REPOSITORY / "run" / "tiny-llama")
            if not Path(model).exists():
                tiny_llama.make(Path(model))
        ports = {name: free_port() for name in ("direct", "gateway")}
        command = server_command(model, ports["direct"])
        file = Path(command[command.index("--model") + 1])
        (folder / "hub" / "org" / "bench").mkdir(parents=True)
        shutil.copy(file, folder / "hub" / "org" / "bench" / "bench.gguf")
        hub = started.enter_context(hubs.start(folder / "hub"))
        bins = bins or str(Path(command[0]).parent)
        env = {"LLAMA_SERVER_BINS_DIR": bins, "HF_ENDPOINT": hub.endpoint}
        cluster = Cluster(made.python, folder, env)
        started.callback(cluster.close)
        for name in ("head", "a", "b"):
            (folder / name).mkdir()
            cluster.add(name, folder / name, CPU=4, **({} if name == "head" else {"worker": 9}))
        cluster.call("start", port=cluster.port)
        size = f"{file.stat().st_size / 1e6:.0f} MB"
        for what in (f"cold node, which fetches {size},", "warm node"):
            seconds = begin(cluster, 1, "a", {})
            print(f"a replica answers on a {what} after {seconds:.1f} s", flush=True)
        at = files.Folder(folder / "gateway")
        at.path.mkdir()
        instance = Server(
            name="bench", executable="", cmd=(), folder="", log_file="", port=ports["direct"]
        )
        files.write_wanted(at, files.DesiredState(config="bench", instances=(instance,)))
        seen = files.ServerStatus(name="bench", state=files.READY)
        files.write_state(at, files.State(pid=1, started=0.0, asked=0, instances=(seen,)))
        settings = json.dumps({"port": ports["gateway"]})
        gateway = [sys.executable, "-m", "pipeline.serve.gateway", str(at.path), settings]
        with running(command, ports["direct"]), running(gateway, ports["gateway"]):
            measure({**ports, "ray": cluster.port}, rounds)
        compare_routers(cluster)


if __name__ == "__main__":
    main()
