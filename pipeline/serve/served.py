"""When a model was served last: written once a server of it is ready, in `run/served/`, one small
file a model."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path

from pipeline.core.store import json_file, receipts

from .server import Server


def record(run: Path, server: Server) -> None:
    """Record that `server` is ready. `run` is the home's. No server ends because this fails."""
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
    words = [server.executable, *server.cmd]
    words += [str(path) for path, _ in server.adapters]
    words += [value for word in server.cmd if (value := word.partition("=")[2])]
    paths = [Path(os.path.realpath(Path(server.folder, word))) for word in dict.fromkeys(words)]
    return [path for path in paths if path.is_file()]


def place(run: Path, path: str | Path) -> Path:
    """Where the record of a file is, whose real path this is."""
    digest = hashlib.sha256(os.fsencode(path)).hexdigest()
    return run / "served" / f"{digest[:16]}.json"
