"""When each model was last served: a small file per model in `run/served/`, written once a server
of it is ready."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path

from pipeline.core.store import json_file, receipts, stat_cache

from .server import VLLM, Server

SMALL = 1 << 20  # bytes, up to which a file that is only touched counts as unchanged
WRITTEN = ("--log-file", "--lookup-cache-dynamic", "-lcd")  # by the server itself


def record(run: Path, server: Server) -> None:
    """Record that `server` is ready, in the home's `run`, unless that cannot be written."""
    file = server.argument("--model")
    if file:
        path = os.path.realpath(Path(server.folder, file))
        with suppress(OSError):
            entry = {"file": path, "server": server.name, "at": receipts.now()}
            json_file.write_private(place(run, path), entry)


def at(run: Path, file: Path) -> str:
    """When `file` was served last, as receipts write a time; empty: never, as far as known."""
    path = os.path.realpath(file)
    entry = json_file.read(place(run, path), lambda data: (str(data["file"]), str(data["at"])))
    return entry[1] if entry and entry[0] == path else ""


def files(server: Server) -> list[Path]:
    """The files that the command line of `server` names, links followed; the program too."""
    paths = [Path(server.folder, server.executable), *server.named_paths]
    return [path for each in paths if (path := Path(os.path.realpath(each))).is_file()]


def contents(server: Server) -> str:
    """A digest that changes where a file is replaced that the server reads: `files`, the key file,
    and those in the folder of a vLLM's model. A small file counts by what it holds, a large one by
    its size and time; what the server itself writes, such as a log, does not count."""
    written = [os.path.realpath(Path(server.folder, server.argument(x))) for x in WRITTEN]
    named = [*files(server), *map(Path, filter(None, [server.api_key_file]))]
    if server.engine == VLLM and (model := server.argument("--model")):
        named += sorted(Path(server.folder, model).glob("*.*"))
    digest = hashlib.sha256()
    for file in dict.fromkeys(named):
        if str(file) not in written:
            with suppress(OSError):
                size, time = stat_cache.stamp(file)
                held = file.read_bytes() if size <= SMALL else f"{size} {time}".encode()
                digest.update(hashlib.sha256(os.fsencode(file)).digest())
                digest.update(hashlib.sha256(held).digest())
    return digest.hexdigest()[:16]


def place(run: Path, path: str | Path) -> Path:
    """Where the record of the model at `path`, links followed, is kept."""
    digest = hashlib.sha256(os.fsencode(path)).hexdigest()
    return run / "served" / f"{digest[:16]}.json"
