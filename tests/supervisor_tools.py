"""A configuration of stand-ins, and what is left of it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import REPOSITORY, free_port, wait_for
from msgspec.structs import replace

from pipeline.serve.server import Server
from pipeline.serve.supervisor import control, liveness, marker, status, usage
from pipeline.serve.supervisor.policy import Timing
from pipeline.serve.supervisor.state import DesiredState, Folder, ServerStatus, read_state
from pipeline.serve.supervisor.usage import ServerUse, Usage

SERVER = str(REPOSITORY / "tests" / "fakes" / "server.py")
QUICK = Timing(probe_every=0.3, steady_after=60, longest_pause=0.5)


def stand_in(folder: Path, name: str, *switches: str, **more: Any) -> Server:
    """An instance that is a stand-in with these switches."""
    port = more.pop("port", None) or free_port()
    return Server(
        name=name,
        executable=sys.executable,
        cmd=(SERVER, "--host", "127.0.0.1", "--port", str(port), *switches),
        folder=str(folder),
        log_file=str(folder / "logs" / f"{name}.log"),
        port=port,
        **{"restart_pause": 0.05, "max_restarts": 2, "probe_timeout": 0.0, **more},
    )


@dataclass
class Servers:
    """A configuration under way; all of it ends with the test."""

    at: Folder
    timing: Timing = QUICK
    instances: tuple[Server, ...] = ()
    told: list[tuple[str, ServerStatus]] = field(default_factory=list)

    def up(self, *instances: Server, **more: Any) -> dict[str, ServerStatus]:
        """Those that are not ready."""
        self.instances = instances
        wanted = DesiredState(config=str(self.at.path), instances=instances, **more)
        failed = control.up(self.at, wanted, report=self.report, timing=self.timing)
        return {one.name: seen for one, seen in failed}

    def report(self, instance: Server, seen: ServerStatus) -> None:
        self.told.append((instance.name, seen))

    def down(self, *names: str) -> list[str]:
        return control.down(self.at, names)

    def state(self) -> dict[str, ServerStatus]:
        state = read_state(self.at)
        return {one.name: one for one in state.instances} if state else {}

    def pids(self) -> dict[str, int | None]:
        return {name: seen.pid for name, seen in self.state().items()}

    def until(self, name: str, *states: str, reason: str = "") -> ServerStatus:
        def reached() -> ServerStatus | None:
            seen = self.state().get(name)
            return seen if seen and seen.state in states and reason in seen.reason else None

        try:
            return wait_for(reached)  # type: ignore[no-any-return]
        except AssertionError:
            raise AssertionError(f"{name} is no {states}: {self.state()}\n{self.log()}") from None

    def supervisor(self) -> psutil.Process:
        state = liveness.living(self.at)
        assert state is not None, self.log()
        return psutil.Process(state.pid)

    def kill_supervisor(self) -> None:
        process = self.supervisor()
        process.send_signal(signal.SIGKILL)
        wait_for(lambda: not liveness.living(self.at))

    def log(self) -> str:
        return self.at.log.read_text("utf-8") if self.at.log.exists() else ""

    def rows(self) -> dict[str, status.Row]:
        return {row.name: row for row in status.ps(self.at)}

    def processes(self) -> list[psutil.Process]:
        return [one for found in marker.marked(self.at).values() for one in found]

    def running(self) -> list[psutil.Process]:
        found = marker.marked(self.at)
        return [one for value, processes in found.items() if "/" in value for one in processes]

    def nothing_left(self) -> None:
        """No process, no port, no lock."""
        wait_for(lambda: not self.processes())
        assert not liveness.is_running(self.at)
        for one in self.instances:
            with socket.socket() as probe:
                assert probe.connect_ex(("127.0.0.1", one.port)) != 0, f"{one.port} is in use"


class Gateway:
    """What this process tells the supervisor, as a gateway would."""

    def __init__(self, servers: Servers) -> None:
        self.at, self.uses = servers.at, dict[str, ServerUse]()

    def tells(self, name: str, **use: Any) -> None:
        self.uses[name] = ServerUse(**{"last": time.monotonic(), **use})
        pid = os.getpid()
        usage.write(self.at, Usage(pid=pid, started=marker.start_time(pid), servers=self.uses))

    def waits(self, name: str, seconds: float = 0) -> None:
        self.tells(name, waiting=1, since=time.monotonic() - seconds)

    def has_seen(self, servers: Servers, name: str) -> None:
        """It sends no more requests to a server that unloads, and got all its answers."""
        self.tells(name, closed=servers.until(name, "unloading").ready_at)


def on_demand(servers: Servers, *names: str, **more: Any) -> list[Any]:
    return [stand_in(servers.at.path, name, **{"start": "demand", **more}) for name in names]


def states(servers: Servers) -> dict[str, str]:
    return {name: status.state for name, status in servers.state().items()}


def loads(servers: Servers, gateway: Gateway, name: str, **use: Any) -> None:
    """A request for it comes, waits, and is answered."""
    gateway.waits(name)
    servers.until(name, "ready")
    gateway.tells(name, **use)


@contextlib.contextmanager
def servers_at(path: Path) -> Iterator[Servers]:
    servers = Servers(Folder(path))
    try:
        yield servers
    finally:
        for _ in range(3):
            marker.end(servers.at, lambda value: True, [os.getpid()])


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Servers]:
    """An empty configuration, in a folder with a space and a letter beyond ASCII."""
    with servers_at(tmp_path / "run ü" / "one") as servers:
        yield servers


@pytest.fixture
def gateway(servers: Servers) -> Gateway:
    return Gateway(servers)


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Servers]:
    """Another configuration."""
    with servers_at(tmp_path / "run ü" / "other") as servers:
        yield servers


def changed(instance: Server, *switches: str) -> Server:
    """The same, started with more switches."""
    return replace(instance, cmd=(*instance.cmd, *switches))


def grandchild(note: Path) -> int:
    """Its pid, once it has begun."""
    return int(wait_for(lambda: note.exists() and note.read_text()))


def lives(pid: int) -> bool:
    """Whether a process runs; one that has ended and is not asked how does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
