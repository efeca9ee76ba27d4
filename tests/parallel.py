"""Tests side by side: which of them one worker keeps together, what comes first, what is shared.

`./doitw test` starts several workers (pytest-xdist), each of them a process with fixtures of its
own. A test that is marked with `xdist_group` goes where its group goes; the rest is decided here.
"""

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

# What takes longest, with what it waits for: begun last, it would be all that still runs.
FIRST = (
    "test_packing.py",
    "test_vulkan.py",
    "images",
    "infer-dev",
    "test_kill.py",
)


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


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in its own
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give each test its group, and put the longest groups first."""
    for item in items:
        if not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(group(item)))
    items.sort(key=rank)  # stable: within a group the order stays


def group(item: pytest.Item) -> str:
    """Tests share a fixture of their file, or are so short that they go as a file; a slow one that
    shares nothing goes alone."""
    name = item.path.name
    if item.get_closest_marker("slow") and not shares_fixture(item):
        return item.nodeid
    return name


def shares_fixture(item: pytest.Item) -> bool:
    found = item._fixtureinfo.name2fixturedefs.values()  # type: ignore[attr-defined]
    return any(one.scope in ("module", "class") for every in found for one in every)


def rank(item: pytest.Item) -> int:
    """The longest groups, other slow tests, and quick ones to fill the gaps at the end."""
    mark = item.get_closest_marker("xdist_group")
    assert mark
    for number, name in enumerate(FIRST):
        if mark.args[0] == name or item.path.name == name:
            return number
    return len(FIRST) + (not item.get_closest_marker("slow"))
