"""Ray on this machine: a cluster of its own for one configuration, or a node of a larger one."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct

from pipeline.core import capacity
from pipeline.core.errors import PipelineError
from pipeline.core.process import last_lines, start_detached
from pipeline.core.store.publish import remove

from .cluster import Cluster, ClusterGone
from .config import CPU, GPU, MEMORY
from .environment import COMMAND, make_token, with_token
from .nodes import ClusterNode

if TYPE_CHECKING:
    import psutil

LOOPBACK = "127.0.0.1"
GCS_PORT, DASHBOARD_PORT = 6379, 8265  # Ray's own, of a head that others join
OBJECT_STORE = 128 * 1024**2  # bytes: requests and answers do not pass through it
OWN_MEMORY = 1024**3  # bytes of Ray's processes on a node
OF_ANOTHER = ("RAY_ADDRESS", "RAY_AUTH_TOKEN")  # of a cluster that the user may have beside it
START_SECONDS = 120.0
STOP_SECONDS = 30.0
POLL_SECONDS = 0.5


class LocalRay(Struct, frozen=True, kw_only=True):
    """A Ray that was started here. `started` is when its process began, in seconds since 1970."""

    pid: int
    started: float
    folder: str  # of its session and sockets
    token_file: str

    def process(self) -> psutil.Process | None:
        """Its process; None where it is gone."""
        import psutil

        with suppress(psutil.Error):
            process = psutil.Process(self.pid)
            is_it = abs(process.create_time() - self.started) < 2
            return process if is_it and process.status() != psutil.STATUS_ZOMBIE else None
        return None

    def stop(self) -> bool:
        """End it with all that it started; whether it was there. Raises PipelineError."""
        import psutil

        process = self.process()
        if process is not None:
            with suppress(psutil.Error):
                started = process.children(recursive=True)
                process.send_signal(signal.SIGTERM)
                _, left = psutil.wait_procs([process, *started], STOP_SECONDS)
                for each in left:
                    each.kill()
                _, left = psutil.wait_procs(left, STOP_SECONDS)
                if left:
                    raise PipelineError(
                        f"Ray's processes do not end: {', '.join(str(each.pid) for each in left)}",
                        "end them by hand",
                    )
        remove(Path(self.folder))
        return process is not None


def here(
    gpus: int, custom: Mapping[str, float], ip: str = LOOPBACK, cpus: float = 0
) -> ClusterNode:
    """This machine as a node, with the memory that is free now but for Ray's own, and at least so
    many processors: alone it shares what it has, as with `up`, and nothing waits for another."""
    memory = max(0, capacity.memory() - OBJECT_STORE - OWN_MEMORY)
    processors = math.ceil(max(cpus, capacity.processors()))
    resources = {CPU: float(processors), GPU: float(gpus), MEMORY: float(memory)}
    return ClusterNode(ip=ip, resources={**resources, **custom})


def node_words(node: ClusterNode) -> list[str]:
    """The words of `ray start` that say what a node has."""
    custom = {n: count for n, count in node.resources.items() if n not in (CPU, GPU, MEMORY)}
    return [
        *([f"--node-ip-address={node.ip}"] if node.ip else []),  # else Ray finds it
        f"--num-cpus={node.resources[CPU]:.0f}",
        f"--num-gpus={node.resources[GPU]:.0f}",
        f"--memory={node.resources[MEMORY]:.0f}",
        f"--object-store-memory={OBJECT_STORE}",
        *([f"--resources={json.dumps(custom)}"] if custom else []),
    ]


def head_words(node: ClusterNode, port: int, dashboard: int) -> list[str]:
    """The words of `ray start` for a head, behind Ray's program."""
    return [
        *("start", "--head", "--block", "--disable-usage-stats"),
        *node_words(node),
        f"--port={port}",
        f"--dashboard-host={node.ip}",
        f"--dashboard-port={dashboard}",
    ]


def join_words(node: ClusterNode, head: str) -> list[str]:
    """The same for a node that joins the head at an address."""
    words = ("start", "--block", "--disable-usage-stats", f"--address={head}")
    return [*words, *node_words(node)]


def start(
    python: Path, node: ClusterNode, env: Mapping[str, str], output: Path, token_file: Path
) -> tuple[LocalRay, str]:
    """Start a cluster of one node in the background, which wants the token in a file; the Ray and
    its dashboard's address. Its output is appended to the file `output`. Raises PipelineError."""
    gcs, dashboard, client, agent = _free_ports(4)
    # A socket's path has at most 107 bytes: macOS' own temporary folder is too deep.
    base = "/tmp" if os.name != "nt" else None  # noqa: S108
    folder = Path(tempfile.mkdtemp(prefix="llama-ray-", dir=base))
    words = [
        *(str(python), *COMMAND, *head_words(node, gcs, dashboard)),
        f"--ray-client-server-port={client}",
        f"--dashboard-agent-listen-port={agent}",
        f"--temp-dir={folder}",
    ]
    output.parent.mkdir(parents=True, exist_ok=True)
    make_token(token_file)
    kept = {name: value for name, value in env.items() if name not in OF_ANOTHER}
    env = {**kept, **with_token(token_file)}
    process = start_detached(words, log=output, env=env, cwd=folder)
    ray = LocalRay(
        pid=process.pid,
        started=_start_time(process.pid),
        folder=str(folder),
        token_file=str(token_file),
    )
    return ray, f"http://{node.ip}:{dashboard}"


def wait(ray: LocalRay, cluster: Cluster, output: Path) -> None:
    """Return once the cluster answers. Raises PipelineError where it ended, or takes too long."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            if cluster.nodes():
                return
            why = "it has no node yet"
        except ClusterGone as error:
            why = error.message
        except PipelineError as error:  # the dashboard answers before all of its parts do
            why = error.message
        if ray.process() is None:
            why = "it has ended"
        elif time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
            continue
        raise PipelineError(
            f"Ray did not start: {why}:\n{last_lines(output, 8)}", f"its output is in {output}"
        )


def _start_time(pid: int) -> float:
    import psutil

    with suppress(psutil.Error):
        return float(psutil.Process(pid).create_time())
    return time.time()


def _free_ports(count: int) -> Sequence[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind((LOOPBACK, 0))
        return [each.getsockname()[1] for each in sockets]
