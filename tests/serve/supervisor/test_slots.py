"""What keeps conversations over an unload, on files and a stand-in for llama-server's slots."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from msgspec.structs import replace

from pipeline.serve.server import Server
from pipeline.serve.supervisor import slots
from pipeline.serve.supervisor.state import Folder


class Slots(BaseHTTPRequestHandler):
    """Answers as llama-server does for its slots; writes a file of 100 bytes for each."""

    folder: ClassVar[Path]
    filled: ClassVar[list[int]] = [0, 2]
    failing: ClassVar[set[str]] = set()  # actions
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        listed = [
            {"id": n, **({"n_prompt_tokens": 9} if n in self.filled else {})} for n in range(3)
        ]
        self.reply(200, listed)

    def do_POST(self) -> None:
        name = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["filename"]
        action = self.path.rpartition("=")[2]
        self.asked.append(f"{self.path} {name}")
        if action == "save":
            (self.folder / name).write_bytes(b"x" * 100)
        self.reply(500 if action in self.failing else 200, {})

    def reply(self, status: int, body: object) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    model = tmp_path / "model ü.gguf"
    model.write_bytes(b"GGUF")
    at = Folder(tmp_path / "run" / "instances" / "many")
    with ThreadingHTTPServer(("127.0.0.1", 0), Slots) as fake:
        threading.Thread(target=fake.serve_forever, daemon=True).start()
        told: dict[str, Any] = {"folder": str(tmp_path), "log_file": "/x", "executable": "x"}
        cmd = ("--model", str(model), "--ctx-size", "512")
        made = slots.saving(
            Server(name="chat", cmd=cmd, port=fake.server_port, start="demand", **told), at
        )
        assert slots.are_ours(made, at)
        Slots.folder = Path(made.argument(slots.OPTION))
        Slots.folder.mkdir(parents=True)
        monkeypatch.setattr(Slots, "asked", [])
        monkeypatch.setattr(Slots, "failing", set())
        yield made
        fake.shutdown()


def kept(server: Server) -> list[str]:
    return sorted(path.name for path in Path(server.argument(slots.OPTION)).iterdir())


def test_what_was_saved_comes_back(server: Server) -> None:
    key = slots.key(server)
    assert slots.save(server, 1000) == 2
    assert kept(server) == [f"{key}-0.slot", f"{key}-2.slot"], "the third one is empty"
    assert slots.restore(server) == 2
    restores = [each for each in Slots.asked if "restore" in each]
    assert sorted(restores) == [f"/slots/{n}?action=restore {key}-{n}.slot" for n in (0, 2)]
    assert len(kept(server)) == 2, "should it crash, they are there again"


def test_nothing_comes_back_to_another_model_or_other_options(server: Server) -> None:
    slots.save(server, 1000)
    longer = replace(server, cmd=(*server.cmd, "--rope-scale", "2"))
    assert slots.restore(longer) == 0
    moved = replace(server, port=server.port, cmd=("--port", "1", "--host", "::1", *server.cmd))
    assert slots.restore(moved) == 2, "another address changes nothing"
    model = Path(server.argument("--model"))
    model.write_bytes(b"GGUF2")
    assert slots.restore(server) == 0
    assert slots.save(server, 1000) == 2 and len(kept(server)) == 2, "the old ones are gone"


def test_a_log_that_grows_and_another_key_change_nothing(server: Server, tmp_path: Path) -> None:
    log, key = tmp_path / "own.log", tmp_path / "a.key"
    options = ("--log-file", str(log), "--api-key-file", str(key))
    server = replace(server, cmd=(*server.cmd, *options))
    for file in (log, key):
        file.write_text("before")
    slots.save(server, 1000)
    for file in (log, key):
        file.write_text("and after")
    assert slots.restore(server) == 2


def test_a_limit_of_bytes_over_all_servers(server: Server) -> None:
    other = Slots.folder.parent / "other"
    other.mkdir()
    for number in range(3):
        file = other / f"k-{number}.slot"
        file.write_bytes(b"y" * 100)
        os.utime(file, (number, number))
    slots.save(server, 350)
    assert [path.name for path in other.iterdir()] == ["k-2.slot"], "the oldest go"
    slots.save(server, 100)
    assert list(other.iterdir()) == [] and len(kept(server)) == 1
    slots.save(server, 99)
    assert kept(server) == []


def test_what_cannot_be_saved_or_read_is_no_trouble(server: Server) -> None:
    slots.save(server, 1000)
    before = kept(server)
    Slots.failing = {"save"}
    assert slots.save(server, 1000) == 0
    assert kept(server) == before, "what was there stays, and no part is left"
    Slots.failing = {"restore"}
    assert slots.restore(server) == 0 and kept(server) == []
    gone = replace(server, port=1)
    assert slots.save(gone, 1000) == 0 and slots.restore(gone) == 0
    (Slots.folder / f"{slots.key(gone)}-9.slot").mkdir()
    assert slots.restore(gone) == 0, "what cannot be removed does not keep it from being ready"


def test_who_saves_any(server: Server) -> None:
    at = Folder(Path(server.argument(slots.OPTION)).parents[1])
    bare = replace(server, cmd=("--model", "m.gguf"))
    assert slots.saving(bare, at).cmd[2:] == (slots.OPTION, str(at.path / "slots" / "chat"))
    assert slots.saving(replace(bare, start="boot", idle_timeout=9.0), at) != bare
    for other in (
        {"start": "boot"},
        {"kind": "embedding"},
        {"engine": "vllm"},
        {"cmd": ("--mmproj", "p.gguf")},
        {"cmd": (slots.OPTION, "/own")},
    ):
        unchanged = replace(bare, **other)
        assert slots.saving(unchanged, at) == unchanged
        assert not slots.are_ours(unchanged, at)
