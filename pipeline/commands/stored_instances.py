"""`instances = "models"` in a file: an instance for each model on disk, loaded on demand."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import count
from typing import Any

from pipeline.core.errors import UsageError, doitw
from pipeline.core.paths import Home
from pipeline.models import on_disk
from pipeline.serve.config.configuration import wrong_name
from pipeline.serve.server import DEMAND, LLAMA_CPP
from pipeline.serve.supervisor.state import Folder, read_wanted

FIRST_PORT = 9001  # after the gateway's usual one


def tables(home: Home, at: Folder, written: Mapping[str, Any]) -> dict[str, Any]:
    """The tables of these instances, by name, over which those that are `written` in the file are
    laid. Each keeps the port that it has now. Raises UsageError where no model is on disk."""
    models = [each for each in on_disk.look(home).models if each.kind == "model"]
    if not models:
        raise UsageError(
            'master.instances = "models": no model is on disk',
            f"prepare one first: {doitw('prepare model=…')}",
        )
    often = Counter(model.name for model in models)
    files = {
        model.name if often[model.name] == 1 else f"{model.name}-{model.quant}": model.files[0]
        for model in models
    }
    wanted = read_wanted(at)
    kept = {server.name: server.port for server in wanted.instances} if wanted else {}
    free = _free_ports({*kept.values(), *_ports(written)})
    return {
        name: {
            "control": {"engine": LLAMA_CPP, "start": DEMAND},
            "model": {"ref": str(file)},
            "server": {"port": kept.get(name) or next(free)},
        }
        for name, file in files.items()
        if not wrong_name(name)
    }


def _ports(table: Mapping[str, Any]) -> Iterator[int]:
    """All ports that a file names."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _ports(value)
        elif key == "port" and isinstance(value, int):
            yield value


def _free_ports(taken: set[int]) -> Iterator[int]:
    for port in count(FIRST_PORT):
        if port in taken:
            continue
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):  # nobody answers
                yield port
