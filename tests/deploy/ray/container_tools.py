"""A cluster of containers of the project's own image, on a private network of Docker's engine."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from conftest import REPOSITORY, wait_for
from engines import Docker
from fakes import hub as hubs

from pipeline.core.errors import PipelineError
from pipeline.deploy.ray.cluster import Cluster, ReplicaDetails
from pipeline.serve.server import GATEWAY

FAKES = REPOSITORY / "tests" / "fakes"
HUB, HEAD = 2, 10  # the last numbers of the addresses of the hub and of the head
TOKEN = "/run/ray-token"
PORT = 9000  # of the gateway
# Each node has its own CPUs: two, so that the head's servers leave some for the gateway.
PROCESSORS = "--cpuset-cpus=0-1"


class Containers:
    """Nodes of a cluster, by name; each has an address and a disk of its own."""

    def __init__(self, docker: Docker, image: str, folder: Path) -> None:
        self.docker, self.image = docker, image
        self.name = f"test-{uuid.uuid4().hex[:8]}"
        self.token = secrets.token_hex(32)
        self._token_file = folder / "token"
        self._token_file.write_text(self.token)
        self.network = self._made_network()
        self.addresses: dict[str, str] = {}
        self._made = 0  # containers
        self.hub = ""

    def _made_network(self) -> str:
        """The first three numbers of a new network's addresses."""
        for _ in range(20):
            network = f"10.{200 + secrets.randbelow(50)}.{secrets.randbelow(250)}"
            create = ("network", "create", "--internal", f"--subnet={network}.0/24", self.name)
            with contextlib.suppress(AssertionError):  # it is somebody else's
                self.docker(*create)
                return network
        raise AssertionError("no network can be made")

    @property
    def url(self) -> str:
        """Of the gateway on the head."""
        return f"http://{self.addresses['head']}:{PORT}"

    @property
    def dashboard(self) -> str:
        return f"http://{self.addresses['head']}:8265"

    @contextmanager
    def hub_of(self, root: Path) -> Iterator[hubs.Running]:
        """A hub of the models in `root`, which the nodes and this machine reach."""
        words = ("run", "--rm", "--interactive", f"--name={self.name}-hub")
        network = (f"--network={self.name}", f"--ip={self.network}.{HUB}")
        mounts = (f"--volume={FAKES}:/fakes:ro", f"--volume={root}:/hub:ro")
        program = ("/fakes/hub.py", "--root=/hub", f"--host={self.network}.{HUB}")
        whole = (*words, *network, *mounts, "--entrypoint=python3", self.image, *program)
        with hubs.running(self.docker.cli(*whole)) as hub:
            self.hub = hub.endpoint
            yield hub

    def start(self, name: str) -> None:
        """Start a node as docs/cluster.md says; the first one is the head."""
        head = self.addresses.get("head")
        node = f"{head}:6379" if head else "head"
        token = (f"--volume={self._token_file}:{TOKEN}:ro", f"--env=RAY_AUTH_TOKEN_PATH={TOKEN}")
        words = ("doit", "ray", f"node={node}", f"host={self._next_address}")
        self.run(name, "--restart=always", *token, words=words)
        wait_for(lambda: self._has(name), 300)

    @property
    def _next_address(self) -> str:
        return f"{self.network}.{HEAD + self._made}"

    def run(self, name: str, *flags: str, words: Sequence[str]) -> None:
        """Start a container of the image, with these flags of Docker's and this command."""
        self.addresses[name] = self._next_address
        self._made += 1
        self.docker(
            *("run", "--detach", f"--name={self._container(name)}", f"--hostname={name}"),
            *(f"--network={self.name}", f"--ip={self.addresses[name]}", "--shm-size=256m"),
            *(PROCESSORS, f"--env=HF_ENDPOINT={self.hub}", *flags, self.image, *words),
        )

    def succeeds(self, name: str, command: str) -> bool:
        """Whether a command line does in a container, as a probe of Kubernetes runs it."""
        inside = self.docker.cli("exec", self._container(name), "bash", "-c", command)
        return subprocess.run(inside, capture_output=True).returncode == 0

    def _has(self, name: str) -> bool:
        try:
            return name in self.alive()
        except PipelineError:  # the head has just started
            return False

    def _container(self, name: str) -> str:
        return f"{self.name}-{name}"

    @property
    def cluster(self) -> Cluster:
        return Cluster(self.dashboard, self.token)

    def alive(self) -> set[str]:
        """The nodes that the cluster has."""
        names = {address: name for name, address in self.addresses.items()}
        return {names[node.ip] for node in self.cluster.nodes() if node.ip in names}

    def replicas(self, app: str) -> dict[str, list[ReplicaDetails]]:
        """The running replicas of an application, by node."""
        found = self.cluster.serves().applications[app].replicas
        running = [each for each in found if each.state == "RUNNING"]
        return {
            name: [each for each in running if each.node_ip == address]
            for name, address in self.addresses.items()
        }

    def serves(self, name: str) -> list[str]:
        """The applications that have a running replica on a node, but for the gateway."""
        apps = self.cluster.serves().applications
        return [app for app in apps if app != GATEWAY for _ in self.replicas(app)[name]]

    def pids(self, app: str) -> set[tuple[str, int | None]]:
        """The running replicas of an application: node, and number within its container."""
        return {(name, each.pid) for name, found in self.replicas(app).items() for each in found}

    def models(self, name: str) -> dict[str, str]:
        """The SHA-256 of each GGUF on a node, by its file's name."""
        find = "find /data -name '*.gguf' -exec sha256sum {} +"
        lines = self.docker("exec", self._container(name), "sh", "-c", find).splitlines()
        return {path.rpartition("/")[2]: digest for digest, path in map(str.split, lines)}

    def processes(self, name: str, program: str = "") -> list[int]:
        """The processes of a node, or those of a program, by their numbers on this machine."""
        top = self.docker("top", self._container(name), "-eo", "pid,comm", check=False)
        rows = [line.split(None, 1) for line in top.splitlines()[1:]]
        return [int(pid) for pid, command in rows if not program or command == program]

    def kill(self, name: str, program: str) -> None:
        """Kill the only process of a program on a node."""
        (pid,) = self.processes(name, program)
        os.kill(pid, signal.SIGKILL)

    def kill_within(self, name: str, pid: int | None) -> None:
        """Kill a process by its number within the container."""
        self.docker("exec", self._container(name), "sh", "-c", f"kill -9 {pid}")

    def cut(self, name: str) -> None:
        """Take a node off the network."""
        self.docker("network", "disconnect", self.name, self._container(name))

    def connect(self, name: str) -> None:
        """Put it back, at its address."""
        address = f"--ip={self.addresses[name]}"
        self.docker("network", "connect", address, self.name, self._container(name))

    def remove(self, name: str) -> None:
        """Kill a node with all that runs on it, for good."""
        self.docker("rm", "--force", "--volumes", self._container(name))
        del self.addresses[name]

    def logs(self, folder: Path) -> None:
        """Copy what the nodes have said."""
        for name in self.addresses:
            to = folder / name
            to.mkdir(parents=True)
            (to / "output.txt").write_text(self.docker("logs", self._container(name), check=False))
            path = f"{self._container(name)}:/tmp/ray/session_latest/logs"
            self.docker("cp", "--follow-link", path, str(to), check=False)

    def close(self) -> None:
        for name in [*self.addresses]:
            self.remove(name)
        self.docker("rm", "--force", f"{self.name}-hub", check=False)
        self.docker("network", "rm", self.name)
        self.docker("volume", "rm", "--force", f"{self.name}-data")


@contextmanager
def containers(docker: Docker, image: str, models: Path, folder: Path) -> Iterator[Containers]:
    """None yet, and a hub of the models in a folder; their logs are kept in `folder`."""
    made = Containers(docker, image, folder)
    try:
        with made.hub_of(models):
            yield made
    finally:
        made.logs(folder / "logs")
        made.close()
