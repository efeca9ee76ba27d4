"""A gateway as a real process, and what it asks: stand-ins or real servers, and their states."""

from __future__ import annotations

import json
import os
import signal
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import forked
import httpx2
from conftest import REPOSITORY, free_port, wait_for
from forked import Started
from msgspec.structs import replace

from pipeline.serve.server import Server
from pipeline.serve.supervisor.state import (
    DesiredState,
    Folder,
    ServerStatus,
    State,
    write_state,
    write_wanted,
)

# Nothing here speaks TLS, and to load this machine's certificates takes longer than a request.
NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
UPSTREAM = REPOSITORY / "tests" / "fakes" / "upstream.py"


def instance(name: str, port: int = 1, **more: Any) -> Server:
    told: dict[str, Any] = {"executable": "x", "cmd": (), "folder": "/", "log_file": "/x"}
    return Server(**(told | {"name": name, "port": port} | more))


class Site:
    """A configuration's folder, the servers that run for it, and its gateway."""

    def __init__(self, path: Path) -> None:
        self.at = Folder(path / "földer of one")
        self.path = path
        self.instances: dict[str, Server] = {}
        self.seen: dict[str, ServerStatus] = {}
        self.processes: dict[str, Started | subprocess.Popen[bytes]] = {}
        self.asked = 1
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"

    # The folder

    def write(self) -> None:
        self.at.path.mkdir(exist_ok=True)
        wanted = DesiredState(
            config="x", instances=tuple(self.instances.values()), asked=self.asked
        )
        write_wanted(self.at, wanted)
        write_state(
            self.at,
            State(pid=1, started=0.0, asked=self.asked, instances=tuple(self.seen.values())),
        )

    def says(self, name: str, state: str, reason: str = "", **more: Any) -> None:
        """What the supervisor would write about `name`."""
        status = ServerStatus(name=name, state=state, asked=self.asked, reason=reason, **more)
        self.seen[name] = status
        self.write()

    def add(self, name: str, *, state: str = "ready", **more: Any) -> Server:
        """An instance, of which nothing runs."""
        self.instances[name] = instance(name, free_port(), **more)
        self.says(name, state)
        return self.instances[name]

    def change(self, name: str, **more: Any) -> None:
        self.instances[name] = replace(self.instances[name], **more)
        self.write()

    # The servers

    def record(self, name: str) -> list[dict[str, Any]]:
        file = self.path / f"{name}.record"
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        return [json.loads(line) for line in lines]

    def events(self, name: str, event: str) -> list[dict[str, Any]]:
        return [one for one in self.record(name) if one["event"] == event]

    def run(self, name: str, *switches: object) -> None:
        """Start the stand-in of an instance that was added."""
        port = self.instances[name].port
        words = ["--port", port, "--name", name, "--record", self.path / f"{name}.record"]
        self.start_python(name, [str(word) for word in (UPSTREAM, *words, *switches)])
        wait_for(lambda: reached(f"http://127.0.0.1:{port}/health"))

    def upstream(self, name: str, *switches: object, state: str = "ready", **more: Any) -> Server:
        """An instance whose stand-in runs."""
        added = self.add(name, state=state, **more)
        self.run(name, *switches)
        return added

    def start(self, name: str, command: list[str]) -> subprocess.Popen[bytes]:
        with (self.path / f"{name}.out").open("ab") as out:
            self.processes[name] = subprocess.Popen(
                command, cwd=REPOSITORY, stdout=out, stderr=out, stdin=subprocess.DEVNULL
            )
        return self.processes[name]

    def start_python(self, name: str, words: list[str]) -> Started | subprocess.Popen[bytes]:
        with (self.path / f"{name}.out").open("ab") as out:
            self.processes[name] = forked.start(words, out.fileno(), out.fileno(), os.environ)
        return self.processes[name]

    def kill(self, name: str) -> None:
        self.processes[name].kill()
        self.processes[name].wait()

    def output(self, name: str = "gateway") -> str:
        return (self.path / f"{name}.out").read_text("utf-8", "replace")

    # The gateway

    def gateway(self, **settings: object) -> None:
        self.write()
        words = [str(self.at.path), json.dumps({"port": self.port, **settings}, default=str)]
        process = self.start_python("gateway", ["-m", "pipeline.serve.gateway", *words])

        def up() -> bool:
            assert process.poll() is None, self.output()
            return reached(f"{self.url}/health")

        wait_for(up)

    def post(self, path: str, body: dict[str, Any], **more: Any) -> httpx2.Response:
        return httpx2.post(self.url + path, json=body, timeout=60, verify=NO_TLS, **more)

    def get(self, path: str, **more: Any) -> httpx2.Response:
        return httpx2.get(self.url + path, timeout=60, verify=NO_TLS, **more)

    def chat(self, model: str | None = None, **do: Any) -> httpx2.Response:
        body = {"messages": [], "do": do} | ({"model": model} if model else {})
        return self.post("/v1/chat/completions", body)

    def metric(self, line: str) -> float:
        """The value of a line of /metrics; 0 where it is missing."""
        for one in self.get("/metrics").text.splitlines():
            if one.startswith(line + " "):
                return float(one.rpartition(" ")[2])
        return 0

    def close(self) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()
            process.wait()


def reached(url: str) -> bool:
    return status(url) != 0


def status(url: str) -> int:
    """Of the answer; 0 for none."""
    try:
        return httpx2.get(url, timeout=5, verify=NO_TLS).status_code
    except httpx2.TransportError:
        return 0


@contextmanager
def site(path: Path) -> Iterator[Site]:
    one = Site(path)
    try:
        yield one
    finally:
        one.close()


def stop(process: Started | subprocess.Popen[bytes]) -> int:
    process.send_signal(signal.SIGTERM if os.name != "nt" else signal.CTRL_BREAK_EVENT)
    return process.wait(timeout=60)
