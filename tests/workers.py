"""A worker of the tests: ports of its own, and what it shares with the others."""

from __future__ import annotations

import os
import random
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")  # such as gw3; empty without workers
NUMBER = int(WORKER.removeprefix("gw") or 0)
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))

# Below those that systems give to outgoing connections, above those that the examples name.
LOWEST_PORT, HIGHEST_PORT = 10_000, 32_000
PORTS: set[int] = set()  # that were handed out
DICE = random.SystemRandom()  # two runs at once seldom ask for the same one


def free_port() -> int:
    """One that nothing listens on, another one each time, and never one of another worker."""
    while True:
        port = DICE.randrange(LOWEST_PORT // WORKERS + 1, HIGHEST_PORT // WORKERS) * WORKERS
        port += NUMBER
        if port in PORTS:
            continue
        with socket.socket() as probe:
            if os.name == "posix":  # elsewhere that would take a port that is in use
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        PORTS.add(port)
        return port


def shared(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that `make` fills once for all workers of this run. For reading only."""
    top = factory.getbasetemp()
    folder = (top.parent if WORKER else top) / "shared" / name
    folder.parent.mkdir(exist_ok=True)
    done = folder.with_name(f"{name}.done")
    with FileLock(folder.with_name(f"{name}.lock")):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            done.touch()
    return folder
