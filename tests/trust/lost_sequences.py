"""How other things than files and folders are published, and all sequences: see lost_store.py."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

from lost_environments import CONVERTER, ENVIRONMENT
from lost_store import (
    AGAIN,
    COPIED,
    FILE,
    FIRST_FILE,
    NEW,
    OLD,
    RECEIPTS,
    SOURCE,
    STAT_CACHE,
    TAKEN_AWAY,
    Sequence,
    content,
    folder_sequence,
    is_version,
    recipe,
    use_file,
)

from pipeline.bins.compile import active, cmake
from pipeline.core.download.attempt import Attempt
from pipeline.core.download.partial import Partial, discard
from pipeline.core.paths import Home
from pipeline.core.store import artifacts, locks, publish
from pipeline.deploy.kubernetes import folder as kubernetes
from pipeline.models import lockfile
from pipeline.serve.server import Server
from pipeline.serve.supervisor import books, slots, state

# Documents


def locked(version: str) -> dict[str, object]:
    files = [{"name": f"{version}-{n}", "size": 1, "sha256": "0" * 64} for n in range(60)]
    fixed = {"name": "m", "kind": "gguf", "precision": "f16", "source": {"type": "hf"}}
    return {"asked": {"model": version}, "files": files, **fixed}


def after_lock_file(top: Path) -> str:
    entries = lockfile.read(top / "pipeline.lock")  # UsageError where it is torn
    assert entries in ([locked(OLD)], [locked(NEW), locked(OLD)])
    return NEW if len(entries) == 2 else OLD


LOCK_FILE = Sequence(
    before=lambda top: lockfile.write(top / "pipeline.lock", locked(OLD)),
    act=lambda top: lockfile.write(top / "pipeline.lock", locked(NEW)),
    after=after_lock_file,
)


def switched(version: str) -> active.Active:
    return active.Active(active=active.Revision(commit=version * 10, tree="0" * 40, name=version))


def after_switch(top: Path) -> str:
    current = active.read(Home(top))  # PipelineError where it is torn
    assert current in (switched(OLD), switched(NEW))
    return NEW if current == switched(NEW) else OLD


SWITCH = Sequence(
    before=lambda top: (top / "bins").mkdir() or active.write(Home(top), switched(OLD)),
    act=lambda top: active.write(Home(top), switched(NEW)),
    after=after_switch,
)


def manifests(version: str) -> dict[str, str]:
    names = ("a.server.yaml", "kustomization.yaml", "only-in-" + version)
    return dict.fromkeys(names, f"{kubernetes.MARK}\n{version * 3000}\n")


def after_manifests(top: Path) -> str:
    target = top / "k8s ü"
    found = {path.name: path.read_text() for path in target.iterdir()} if target.exists() else {}
    verdict = NEW if found == manifests(NEW) else OLD if found == manifests(OLD) else AGAIN
    assert verdict != AGAIN or (not found and (top / ".k8s ü.old").exists()), "torn"
    kubernetes.write(manifests(NEW), target)
    assert {path.name: path.read_text() for path in target.iterdir()} == manifests(NEW)
    return verdict


MANIFESTS = Sequence(
    before=lambda top: kubernetes.write(manifests(OLD), top / "k8s ü") and None,
    act=lambda top: kubernetes.write(manifests(NEW), top / "k8s ü") and None,
    after=after_manifests,
)


# The supervisor: not flushed, for after a power cut nothing runs that it speaks of; but what is
# torn must be seen


def desired(version: str) -> state.DesiredState:
    servers = [
        Server(
            name=f"{version}-{n}", folder="/", log_file="/log", executable="/x", cmd=("--port", "1")
        )
        for n in range(40)
    ]
    return state.DesiredState(config=version, instances=tuple(servers))


def actual(version: str) -> state.State:
    servers = [state.ServerStatus(name=f"{version}-{n}", state=state.READY) for n in range(60)]
    return state.State(pid=1, started=1.0, asked=1, instances=tuple(servers))


def accounts(version: str) -> dict[str, books.Account]:
    return {f"{version}-{n}": books.Account(command="c" * 16, need={"ram": n}) for n in range(90)}


def write_states(top: Path, version: str) -> None:
    at = state.Folder(top / "instances" / "a")
    state.write_wanted(at, desired(version))
    state.write_state(at, actual(version))
    books.json_file.write_private(at.books, books.to_builtins(accounts(version)))


def after_states(top: Path) -> str:
    at = state.Folder(top / "instances" / "a")
    wanted = state.read_wanted(at)
    assert wanted in (None, desired(OLD), desired(NEW))
    assert state.read_state(at) in (None, actual(OLD), actual(NEW))
    assert books.read(at) in ({}, accounts(OLD), accounts(NEW))
    state.remove_unfinished(at)
    write_states(top, NEW)
    return AGAIN if wanted is None else wanted.config


SUPERVISOR = Sequence(
    before=lambda top: write_states(top, OLD),
    act=lambda top: write_states(top, NEW),
    after=after_states,
    lasts=False,
    notices=True,
)


# Conversations, which llama-server writes and reads: it would not see that a block is lost


def chat_server(top: Path) -> Server:
    model = top / "model.gguf"
    server = Server(
        name="chat", folder=str(top), log_file="/log", executable="/x", start="demand",
        cmd=("--model", str(model)),
    )  # fmt: skip
    return slots.saving(server, state.Folder(top / "instances" / "a"))


def save_slots(top: Path, version: str) -> None:
    """As llama-server answers: slot 0 holds a prompt, and is written into the file named."""
    folder = Path(chat_server(top).argument(slots.OPTION))
    folder.mkdir(parents=True, exist_ok=True)

    def ask(server: Server, path: str, body: object = None, **_: object) -> tuple[int, str]:
        if isinstance(body, dict):
            (folder / str(body["filename"])).write_bytes(content("slot", version))
        return 200, '[{"id": 0, "n_prompt_tokens": 9}]'

    with patch.object(slots.health, "ask", ask):
        assert slots.save(chat_server(top), 10**6) == 1


def before_slots(top: Path) -> None:
    (top / "model.gguf").write_bytes(b"GGUF")
    save_slots(top, OLD)


def after_slots(top: Path) -> str:
    folder = Path(chat_server(top).argument(slots.OPTION))
    (file,) = folder.glob(f"{slots.key(chat_server(top))}-*.slot")
    data = file.read_bytes()
    assert data in (content("slot", OLD), content("slot", NEW)), "a conversation is torn"
    return NEW if data == content("slot", NEW) else OLD


SLOTS = Sequence(before=before_slots, act=lambda top: save_slots(top, NEW), after=after_slots)


# A build folder, in which Ninja takes a file for made by its time

LISTS = """
cmake_minimum_required(VERSION 3.20)
project(stand_in LANGUAGES NONE)
add_custom_command(OUTPUT made.o
  COMMAND ${CMAKE_COMMAND} -E copy "${CMAKE_SOURCE_DIR}/object" made.o)
add_custom_target(program ALL DEPENDS made.o)
"""


def build(top: Path) -> cmake.Work:
    return cmake.Work(
        source=top / "source",
        folder=top / "build",
        options=(),
        targets=("program",),
        made_with=["compiler"],
        backend="cpu",
        root=top,
        jobs=1,
        log=top / "log",
        speeds=top / "speeds.json",
    )


def before_build(top: Path) -> None:
    (top / "source").mkdir()
    (top / "source" / "CMakeLists.txt").write_text(LISTS)
    (top / "source" / "object").write_bytes(content("object", NEW))
    for name in ("log", "speeds.json"):
        (top / name).write_text("{}")


def after_build(top: Path) -> str:
    """What stays in the folder once the next build begins, in another time of the machine."""
    made, boot = top / "build" / "made.o", cmake._boot
    cmake._boot = lambda: "another\n"
    try:
        cmake.begin(build(top))
    finally:
        cmake._boot = boot
    if not made.exists():
        return AGAIN
    assert made.read_bytes() == content("object", NEW), "a torn object passes for made"
    return NEW


BUILD = Sequence(
    before=before_build,
    act=lambda top: cmake.compile_all(build(top)) and None,
    after=after_build,
)

# A download: its pieces and their journal are not flushed, its sha256 is proven before it is
# published

PIECE = 4096


class Served:
    """The server's side of a download."""

    halted = threading.Event()

    def read(self, start: int, stop: int) -> Iterator[bytes]:
        yield content("model", NEW)[start:stop]

    def halt(self) -> None:
        self.halted.set()


def download(target: Path) -> None:
    data, made = content("model", NEW), publish.part(target)
    digest = hashlib.sha256(data).hexdigest()
    with locks.only_one(target):
        partial = Partial(made, {"sha256": digest, "blob": ""}, len(data), PIECE)
        run = Attempt(Served(), partial, lambda job: job(), lambda *_, **__: None)
        run.ask([[n] for n in range(partial.count) if n not in partial.done])
        assert run.digest() == digest, "what an earlier run left was used unseen"
        artifacts.publish(target, recipe(NEW), source={}, sha256=digest, seconds=0)
        discard(made)


def after_download(top: Path) -> str:
    target = top / "gguf" / "model"
    verdict = use_file(target)
    if verdict == AGAIN:
        download(target)
        assert is_version(target, NEW)
    return verdict


DOWNLOAD = Sequence(
    before=lambda top: (top / "gguf").mkdir(),
    act=lambda top: download(top / "gguf" / "model"),
    after=after_download,
)

ALL = {
    "a file": FILE,
    "a folder": folder_sequence(True),
    "a folder with one receipt": folder_sequence(False),
    "the lock file": LOCK_FILE,
    "the supervisor's state": SUPERVISOR,
    "a stat cache": STAT_CACHE,
    "a download": DOWNLOAD,
    "saved slots": SLOTS,
    "taken away": TAKEN_AWAY,
    "copied": COPIED,
    "a file, first": FIRST_FILE,
    "receipts": RECEIPTS,
    "a folder, first": folder_sequence(True, first=True),
    "a folder without exchange": folder_sequence(True, exchange=False),
    "a folder with one receipt, without exchange": folder_sequence(False, exchange=False),
    "a source tree": SOURCE,
    "a switch of llama.cpp": SWITCH,
    "manifests": MANIFESTS,
    "a build": BUILD,
    "the converter's environment": CONVERTER,
    "the project's environment": ENVIRONMENT,
}
ALWAYS = ("a file", "a folder with one receipt", "saved slots")  # in each run of the tests
