"""A site to download from, over real HTTP, and the ways in which the tests do it."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
from core_tools import child
from fakes import hub

from pipeline.core.download import Content, Downloads, Location
from pipeline.core.errors import PipelineError

PIECE = 64 * 1024
SIZE = 16 * PIECE + 1234


@dataclass(frozen=True)
class Site:
    """A hub with one repository, reached as a CDN is."""

    running: hub.Running
    folder: Path
    commit: str

    def data(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    def content(self, name: str) -> Content:
        data = self.data(name)
        return Content(size=len(data), sha256=hashlib.sha256(data).hexdigest())

    def location(self, name: str) -> Location:
        return Location(url=f"{self.running.cdn}/org/model/{self.commit}/{name}")

    def fault(self, kind: str, name: str = "big.gguf", **options: Any) -> None:
        self.running.control(faults=[{"kind": kind, "path": name, "at": "cdn", **options}])

    def sent(self, name: str = "big.gguf") -> int:
        return sum(entry["sent"] for entry in self.running.log() if entry["path"].endswith(name))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A site with some files of SIZE bytes, a long one, a small one and an empty one."""
    root = tmp_path_factory.mktemp("hub")
    folder = root / "org" / "model"
    folder.mkdir(parents=True)
    chance = random.Random(1)
    for name in ("big.gguf", "other.gguf", "third.gguf"):
        (folder / name).write_bytes(chance.randbytes(SIZE))
    (folder / "long.gguf").write_bytes(chance.randbytes(10 * 1024 * 1024))
    (folder / "small.json").write_bytes(b"{}\n" * 100)
    (folder / "empty.json").write_bytes(b"")
    with hub.start(root) as running:
        with urllib.request.urlopen(f"{running.endpoint}/api/models/org/model") as answer:
            commit = json.load(answer)["sha"]
        yield Site(running, folder, commit)


@pytest.fixture
def site(served: Site) -> Site:
    """The same, with no faults and an empty log."""
    served.running.control(reset=True, clear_log=True)
    return served


def downloads(client: httpx2.Client, **options: Any) -> Downloads:
    given = {"title": "fetching", "total": SIZE, "timeout": 0.5, "connections": 4}
    return Downloads(client, **{**given, "piece": PIECE, "pause": 0.01, **options})


def fetch(site: Site, made: Path, name: str = "big.gguf", **options: Any) -> str:
    content = options.pop("content", None) or site.content(name)
    locate = options.pop("locate", lambda: site.location(name))
    with httpx2.Client() as client, downloads(client, **options) as all_files:
        return all_files.get(name, content, locate, made)


def journal(made: Path) -> Path:
    return made.with_name(f"{made.name}.pieces")


def assert_whole(site: Site, made: Path, name: str = "big.gguf") -> None:
    assert made.read_bytes() == site.data(name)


def leave_partial(site: Site, made: Path) -> int:
    """A download that failed after some pieces; how many bytes are still missing."""
    site.fault("status500", skip=2)
    with pytest.raises(PipelineError):
        fetch(site, made, connections=1)
    site.running.control(reset=True)
    missing = SIZE - site.sent()
    assert 0 < missing < SIZE
    site.running.control(clear_log=True)
    return missing


# What a process of its own does: fetch one file with many small pieces.
PROGRAM = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import httpx2
from pipeline.core.download import Content, Downloads, Location
caller, url, size, sha256, made = sys.argv[1:]
with (
    httpx2.Client() as client,
    ThreadPoolExecutor() as pool,
    Downloads(
        client, title="fetching", total=int(size), timeout=30, connections=4,
        piece=65536, pause=0.01,
    ) as downloads,
):
    print("begun", flush=True)
    content = Content(size=int(size), sha256=sha256)
    what = ("big.gguf", content, lambda: Location(url=url), Path(made))
    downloads.get(*what) if caller == "main" else pool.submit(downloads.get, *what).result()
"""


def start(
    content: Content, url: str, made: Path, caller: str = "main"
) -> AbstractContextManager[subprocess.Popen[str]]:
    """PROGRAM, which says "begun" before it fetches."""
    return child(PROGRAM, caller, url, content.size, content.sha256, made)
