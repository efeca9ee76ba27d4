"""A cluster of several Ray nodes on this machine, and clients that ask it all the time."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx2
import psutil
from conftest import REPOSITORY, free_port, wait_for, with_programs
from gateway_tools import NO_TLS
from msgspec import to_builtins

from pipeline.deploy.ray.config import ClusterPlan, ClusterServer, Resources
from pipeline.serve.gateway.settings import GatewaySettings
from pipeline.serve.server import Server

DRIVER = Path(__file__).with_name("cluster_driver.py")


@dataclass(frozen=True)
class Node:
    name: str
    home: Path
    id: str


class Cluster:
    """Nodes with a home each, driven through a process in Ray's environment."""

    def __init__(self, python: Path, folder: Path, env: dict[str, str]) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.nodes: dict[str, Node] = {}
        self._log = (folder / "driver.log").open("w")
        self.process = subprocess.Popen(
            [python, DRIVER],
            env={
                **os.environ,
                **env,
                "PYTHONPATH": str(REPOSITORY),
                "RAY_TMPDIR": str(folder),
                "RAY_USAGE_STATS_ENABLED": "0",
                "RAY_health_check_failure_threshold": "2",  # a dead node is seen after 6 s, not 15
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def call(self, command: str, /, **arguments: Any) -> Any:
        """Have the driver do this; its answer."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps([command, arguments]) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, Path(self._log.name).read_text()[-3000:]
        answer = json.loads(line)
        assert "error" not in answer, answer["error"]
        return answer["answer"]

    def add(self, name: str, home: Path, **resources: float) -> Node:
        """Start a node."""
        env = {"LLAMA_PIPELINE_HOME": str(home)}
        made = self.call("add", name=name, env=env, resources={**resources, name: 100})
        self.nodes[name] = Node(name, home, made["id"])
        return self.nodes[name]

    def status(self) -> dict[str, Any]:
        answer: dict[str, Any] = self.call("status")
        return answer

    def replicas(self, app: str) -> list[dict[str, Any]]:
        """The running replicas of an application."""
        replicas = self.status().get(app, {"replicas": []})["replicas"]
        return [replica for replica in replicas if replica["state"] == "RUNNING"]

    def wait_until_running(self, app: str, count: int, seconds: float = 120) -> list[Any]:
        """So many running replicas."""

        def running() -> list[Any] | None:
            replicas = self.replicas(app)
            return replicas if len(replicas) == count else None

        try:
            replicas: list[Any] = wait_for(running, seconds)
        except AssertionError:
            raise AssertionError(f"{app}: {json.dumps(self.status(), indent=1)}") from None
        return replicas

    def node_of(self, replica: dict[str, Any]) -> Node:
        return next(node for node in self.nodes.values() if node.id == replica["node"])

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()
        self._log.close()


def llama_servers(of: int | Path) -> list[psutil.Process]:
    """The servers below a process, or of a node's home."""
    if isinstance(of, int):
        found = psutil.Process(of).children(recursive=True)
        return [process for process in found if process.name() == "llama-server"]
    return [process for process in left(of) if process.name() == "llama-server"]


def left(home: Path) -> list[psutil.Process]:
    """All processes of a node, by its home in their command line."""
    found = []
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
            if any(str(home) in word for word in words) and process.status() != "zombie":
                found.append(process)
        except psutil.Error:
            continue
    return found


def hub_folder(built: Path, gguf: Path, folder: Path) -> Path:
    """What a hub serves: a real model as org/chat, and a tiny one as org/small."""
    root = folder / "hub"
    demo = with_programs(built, folder / "demo")
    demo("prepare", "model=demo")
    (chat,) = (demo.home / "models").rglob("*.gguf")
    for name, file in (("chat", chat), ("small", gguf)):
        (root / "org" / name).mkdir(parents=True)
        os.link(file, root / "org" / name / f"{name}.gguf")
    return root


def server(name: str, text: str, lock: str = "", **more: Any) -> ClusterServer:
    """A server as `ray` would describe it."""
    given: dict[str, Any] = {"slots": 2, "replicas": (1, 1), "resources": Resources(cpus=1)}
    record = Server(name=name, executable="", cmd=(), folder="", log_file="", stop_timeout=5)
    return ClusterServer(server=record, text=text, lock=lock, **(given | more))


def config(servers: list[ClusterServer], port: int) -> dict[str, Any]:
    """What is deployed, with times for a test. The gateway runs on the head."""
    settings = GatewaySettings(port=port, comment_seconds=1.0)
    made = ClusterPlan(
        configuration="models.toml",
        servers=tuple(servers),
        settings=settings,
        ingresses=1,
        ingress=Resources(cpus=0.1, custom={"head": 1}),
    ).body
    for app in made["applications"]:
        (deployment,) = app["deployments"]
        deployment["health_check_period_s"] = 1.0
        deployment["graceful_shutdown_timeout_s"] = 20.0
        if "placement_group_bundles" not in deployment:
            deployment["max_replicas_per_node"] = 1
        if scaling := deployment.get("autoscaling_config"):
            scaling |= {"upscale_delay_s": 0.1, "downscale_delay_s": 3.0, "look_back_period_s": 2.0}
            scaling["metrics_interval_s"] = 0.5
    plain: dict[str, Any] = to_builtins(made)
    return plain


@dataclass
class Outcome:
    """One request: when it was sent, and how it ended."""

    began: float
    ended: float
    model: str
    end: str  # done, error, or what went wrong
    detail: str = ""


@dataclass
class Load:
    """Clients that ask for streams all the time."""

    url: str
    outcomes: list[Outcome] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def running(self, clients: dict[str, int], tokens: int) -> Iterator[Load]:
        """`clients` of each model, while the block runs."""
        threads = [
            threading.Thread(target=self._ask, args=(model, number, tokens), daemon=True)
            for model, count in clients.items()
            for number in range(count)
        ]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            for thread in threads:
                thread.join(120)

    def _ask(self, model: str, number: int, tokens: int) -> None:
        with httpx2.Client(verify=NO_TLS, trust_env=False, timeout=120) as client:
            turns = 0
            while not self._stop.is_set():
                turns += 1
                began = time.monotonic()
                end, detail = stream(client, self.url, model, f"{number} {turns}: hello", tokens)
                self.outcomes.append(Outcome(began, time.monotonic(), model, end, detail))
                if end != "done":
                    time.sleep(0.2)

    @property
    def lost(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.end != "done"]


def stream(client: httpx2.Client, url: str, model: str, text: str, tokens: int) -> tuple[str, str]:
    """How a streamed answer ends, and its last line."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": tokens,
        "stream": True,
        "ignore_eos": True,
    }
    last = ""
    try:
        with client.stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
            for line in answer.iter_lines():
                last = line or last
                if line.startswith("data:") and '"error"' in line:
                    return "error", line
            if answer.status_code != 200:
                return f"status {answer.status_code}", last
    except httpx2.HTTPError as error:
        return f"{type(error).__name__}: {error}", last
    return ("done" if last == "data: [DONE]" else "silence"), last


def require_few_lost(outcomes: list[Outcome], steps: list[tuple[float, str]]) -> None:
    """What was lost was in flight at what was killed, at most its slots at a time, and its client
    was told."""
    lost = [each for each in outcomes if each.end != "done"]
    told = "\n".join(f"{each.began - steps[0][0]:.1f} {each}" for each in lost)
    told += "\n" + "\n".join(f"{at - steps[0][0]:.1f} {name}" for at, name in steps)
    told += f"\n{len(outcomes)} requests"
    assert all(each.end == "error" for each in lost), told
    for (start, name), (end, _) in pairwise(steps):
        during = [each for each in lost if start <= each.ended < end]
        kills = any(word in name for word in ("killed", "removed", "cut off"))
        assert len(during) <= (3 if kills else 0), told
