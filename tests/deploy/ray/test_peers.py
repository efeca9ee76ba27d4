"""Files of models from other nodes: each node here is a home of its own."""

from __future__ import annotations

import hashlib
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import free_port, wait_for

from pipeline.core.paths import Home
from pipeline.deploy.ray import peers
from pipeline.deploy.ray.peers import FETCHER, HOLDER, ModelPeers, is_here
from pipeline.models import fetch
from pipeline.models.resolve import ModelFile, Resolved

HOST = "127.0.0.1"
CONTENT = b"weights" * 1_000_000
NAME = "sub folder/m ü.gguf"


class Head:
    """What all nodes see."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.lock = threading.Lock()

    def put(self, key: str, value: str, *, overwrite: bool = True) -> bool:
        with self.lock:
            if key in self.values and not overwrite:
                return False
            self.values[key] = value
            return True

    def get(self, key: str) -> str | None:
        return self.values.get(key)

    def delete(self, key: str) -> None:
        self.values.pop(key, None)

    def keys(self, prefix: str) -> list[str]:
        return [key for key in [*self.values] if key.startswith(prefix)]


class Node:
    """A node, whose hub cannot be reached."""

    def __init__(self, head: Head, home: Path, content: bytes = CONTENT) -> None:
        self.peers = ModelPeers(head, HOST)
        folder = Home(home).models / "gguf" / "org__m__1"
        file = ModelFile(NAME, len(content), hashlib.sha256(content).hexdigest())
        self.model = Resolved(
            kind="gguf",
            name="org/m",
            slug=folder.name,
            folder=folder,
            local=False,
            source={"type": "hf", "ref": "org/m", "revision": "1" * 40},
            files=(file,),
            precision="Q8_0",
        )
        self.file = folder / NAME

    def fetch(self, content: bytes = CONTENT) -> None:
        """Have the files, as after a download from the hub."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_bytes(content)
        fetch.fetch(self.model)
        assert is_here(self.model)

    def offer(self) -> None:
        """Have the files, and serve them."""
        self.fetch()
        with self.peers.bring([self.model]):
            pass


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"http://{HOST}:{free_port()}")
    monkeypatch.setenv("http_proxy", f"http://{HOST}:{free_port()}")  # leads to no node
    monkeypatch.setattr(peers, "ASK_SECONDS", 0.02)
    monkeypatch.setattr(peers, "WATCH_SECONDS", 0.02)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[list[Node]]:
    head = Head()
    made = [Node(head, tmp_path / f"nöde {number}") for number in range(3)]
    yield made
    for node in made:
        node.peers.close()


@pytest.fixture
def head(nodes: list[Node]) -> Head:
    return nodes[0].peers._store  # type: ignore[return-value]


def test_a_node_gets_the_files_from_one_that_has_them(nodes: list[Node], head: Head) -> None:
    first, second, _ = nodes
    first.offer()
    with second.peers.bring([second.model]):
        assert is_here(second.model)
        assert second.file.read_bytes() == CONTENT
    assert head.keys(FETCHER) == []  # nobody is to ask the hub
    assert len(head.keys(HOLDER)) == 2
    first.peers.close()
    assert len(head.keys(HOLDER)) == 1


def test_one_asks_the_hub_and_the_others_wait_for_it(nodes: list[Node]) -> None:
    first, *others = nodes
    over = threading.Barrier(len(others) + 1)

    def bring(node: Node) -> None:
        with node.peers.bring([node.model]):
            over.wait(60)

    with first.peers.bring([first.model]):
        assert not is_here(first.model)  # this one is to ask the hub
        threads = [threading.Thread(target=bring, args=(node,), daemon=True) for node in others]
        for thread in threads:
            thread.start()
        assert over.n_waiting == 0  # they wait
        first.fetch()
        over.wait(60)  # they have it while the server of the first is still starting
    for thread, node in zip(threads, others, strict=True):
        thread.join(60)
        assert node.file.read_bytes() == CONTENT


def test_one_takes_the_place_of_one_that_falls_silent(
    nodes: list[Node], head: Head, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "SILENT_SECONDS", 0.5)
    head.put(f"{FETCHER}/{nodes[0].model.slug}/0", "a node that died")
    asked, over = list[Node](), threading.Event()

    def bring(node: Node) -> None:
        with node.peers.bring([node.model]):
            if not is_here(node.model):
                asked.append(node)
                over.wait(60)
                node.fetch()

    threads = [threading.Thread(target=bring, args=(node,), daemon=True) for node in nodes]
    for thread in threads:
        thread.start()
    wait_for(lambda: asked)
    time.sleep(1.5)  # the others wait for longer than it took to replace the first one
    over.set()
    for thread in threads:
        thread.join(60)
    assert len(asked) == 1
    assert all(node.file.read_bytes() == CONTENT for node in nodes)


def test_one_that_looks_while_the_files_are_offered_does_not_ask_the_hub(
    nodes: list[Node], head: Head, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has seen nobody that has them, and then nobody that fetches them."""
    first, second, _ = nodes
    keys = head.keys

    def slow(prefix: str) -> list[str]:
        seen = keys(prefix)
        monkeypatch.setattr(head, "keys", keys)
        first.offer()
        return seen

    monkeypatch.setattr(head, "keys", slow)
    with second.peers.bring([second.model]):
        assert second.file.read_bytes() == CONTENT
    assert keys(FETCHER) == []


def test_a_node_that_is_gone_is_not_asked_again(nodes: list[Node], head: Head) -> None:
    first, second, _ = nodes
    gone = f"{HOLDER}/{first.model.slug}/http://{HOST}:{free_port()}/key"
    head.put(gone, "")
    with second.peers.bring([second.model]):
        assert not is_here(second.model)
    assert head.get(gone) is None


def test_other_bytes_are_not_taken(nodes: list[Node], head: Head) -> None:
    first, second, _ = nodes
    first.offer()
    first.file.write_bytes(CONTENT[:-1] + b"!")
    with second.peers.bring([second.model]):
        assert not is_here(second.model)
    assert not second.file.exists()


def test_files_are_served_to_who_knows_the_key_alone(nodes: list[Node], head: Head) -> None:
    first = nodes[0]
    first.offer()
    (key,) = head.keys(HOLDER)
    url = key.split("/", 2)[2]
    path = "/org__m__1/sub%20folder/m%20%C3%BC.gguf"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url + path, timeout=10) as answer:
        assert answer.read() == CONTENT
    base = url.rpartition("/")[0]
    for wrong in (f"{base}/wrong{path}", f"{url}/../..{path}", f"{url}/org__m__1/.state.json"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            opener.open(wrong, timeout=10)
        assert refused.value.code == 404
        refused.value.close()
