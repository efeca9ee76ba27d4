"""Conversations that outlive their server: llama-server's slots, saved before it is unloaded and
restored once it is loaded again, so that no part of their prompts is computed twice.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from threading import Thread

from msgspec.structs import replace

from pipeline.core.store.publish import publish_file
from pipeline.core.store.stat_cache import stamp
from pipeline.core.text import plural
from pipeline.serve import health, served
from pipeline.serve.server import DEMAND, LLAMA_CPP, Server

from .state import Folder

OPTION = "--slot-save-path"
FOLDER = "slots"  # of a configuration's folder; in it one for each server
PATIENCE = 30.0  # seconds for a server to write or read one slot
# Options that change nothing of what a slot holds, nor does what is in the files that they name.
INDIFFERENT = (
    *("--host", "--port", "--alias", "--api-key-file", "--ssl-key-file", "--ssl-cert-file"),
    *("--log-file", "--lookup-cache-dynamic", "--threads", OPTION),
)


def saving(server: Server, at: Folder) -> Server:
    """The server with a folder for its slots, if it is for chat and unloaded at times. One with a
    projector cannot save any."""
    comes_back = server.start == DEMAND or server.idle_timeout
    is_chat = server.engine == LLAMA_CPP and server.kind == "chat"
    if not (comes_back and is_chat) or {OPTION, "--mmproj"}.intersection(server.cmd):
        return server
    return replace(server, cmd=(*server.cmd, OPTION, str(at.path / FOLDER / server.name)))


def are_ours(server: Server, at: Folder) -> bool:
    """Whether we save its slots."""
    return server.argument(OPTION) == str(at.path / FOLDER / server.name)


class Slots:
    """The slots of a running server. Makes their folder; `log` gets a line."""

    def __init__(self, server: Server, at: Folder, log: Callable[[str], None]) -> None:
        self._server, self._log = server, log
        self._saving: Thread | None = None
        self._are_ours = are_ours(server, at)
        if self._are_ours:
            Path(server.argument(OPTION)).mkdir(mode=0o700, parents=True, exist_ok=True)

    def restore(self) -> None:
        """Restore what was saved."""
        if self._are_ours and (count := restore(self._server)):
            self._log(f"restored {plural(count, 'conversation')}")

    def are_saved(self, limit: int) -> bool:
        """Whether they are saved, within `limit` bytes; begins that, in a thread of its own."""
        if not (self._are_ours and limit):
            return True
        if self._saving is None:
            self._saving = Thread(target=save, args=(self._server, limit), daemon=True)
            self._saving.start()
        return not self._saving.is_alive()


def save(server: Server, limit: int) -> int:
    """Replace the files in the server's folder by its slots that hold something; of all servers
    together the latest `limit` bytes stay. Returns how many slots were saved: none where the server
    cannot (one with a projector), or the disk is full."""
    folder, own = Path(server.argument(OPTION)), key(server)
    saved = []
    for slot in _filled(server):
        part, file = folder / f".{own}-{slot}.part", folder / f"{own}-{slot}.slot"
        if _do(server, slot, "save", part.name):
            with suppress(OSError):
                publish_file(part, file)  # flushed: the server would not see that a block is lost
                saved.append(file)
        part.unlink(missing_ok=True)
    if saved:
        _remove(file for file in folder.glob("*.slot") if file not in saved)
    limit_bytes(folder.parent, limit)
    return len(saved)


def restore(server: Server) -> int:
    """Have the server read its saved slots, if model, program and options are still the same.
    Returns how many slots that were. What it cannot read is removed."""
    restored = 0
    for file in Path(server.argument(OPTION)).glob(f"{key(server)}-*.slot"):
        if _do(server, file.stem.rpartition("-")[2], "restore", file.name):
            restored += 1
        else:
            _remove([file])
    return restored


def forget(at: Folder) -> None:
    """Remove what was saved of a configuration."""
    shutil.rmtree(at.path / FOLDER, ignore_errors=True)


def key(server: Server) -> str:
    """A digest of all that a slot depends on: the program, the model's files and the options."""
    options = [
        word
        for before, word in pairwise(["", *server.cmd])
        if before not in INDIFFERENT and word not in INDIFFERENT
    ]
    indifferent = [
        os.path.realpath(Path(server.folder, word))
        for before, word in pairwise(server.cmd)
        if before in INDIFFERENT
    ]
    files = [(str(x), stamp(x)) for x in served.files(server) if str(x) not in indifferent]
    identity = json.dumps([server.executable, options, files])
    return hashlib.sha256(identity.encode()).hexdigest()[:16]


def limit_bytes(top: Path, limit: int) -> None:
    """Remove the oldest slots below `top`, as long as all have more than `limit` bytes."""
    files = []
    for file in top.glob("*/*.slot"):
        with suppress(OSError):
            info = file.stat()
            files.append((info.st_mtime, info.st_size, file))
    total = sum(size for _, size, _ in files)
    for _, size, file in sorted(files):
        if total <= limit:
            return
        total -= size
        _remove([file])


def _filled(server: Server) -> list[int]:
    """The slots that hold a prompt; none where the server does not tell."""
    with suppress(OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        status, text = health.ask(server, "/slots", timeout=PATIENCE)
        if status == 200:
            return [int(slot["id"]) for slot in json.loads(text) if slot.get("n_prompt_tokens")]
    return []


def _do(server: Server, slot: int | str, action: str, file: str) -> bool:
    with suppress(OSError):
        path = f"/slots/{slot}?action={action}"
        return health.ask(server, path, {"filename": file}, timeout=PATIENCE)[0] == 200
    return False


def _remove(files: Iterable[Path]) -> None:
    for file in files:
        with suppress(OSError):
            file.unlink()
