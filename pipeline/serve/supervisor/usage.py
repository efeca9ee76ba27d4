"""What gateways report to the supervisor: which servers their requests use, and wait for.

Each gateway replaces a small file of its own. The supervisor unloads a server in two steps, so that
no request is cut: its state becomes `unloading`, and it is stopped once every gateway has seen that
and has no request under way there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from msgspec import Struct, convert, to_builtins

from pipeline.core.store import json_file
from pipeline.serve.server import Server

from . import marker
from .state import Folder, Pid, Stamp, Time, stamp

SILENT_SECONDS = 5.0  # a gateway that reports nothing for so long is not waited for


class ServerUse(Struct, frozen=True, kw_only=True):
    """How a server is used. Times are those of time.monotonic(), which is the same for all
    processes of a machine, and which no change of the clock moves."""

    waiting: int = 0  # requests that wait until it is loaded
    since: Time = 0.0  # when the oldest of them came
    in_flight: int = 0  # requests that it is answering
    last: Time = 0.0  # when one last began or ended
    recent: Time = 0.0  # that, later if many did: see placing.used_again
    keep: float | None = None  # seconds to stay loaded after the last request, as that request
    # asked for; below 0: for ever; None: its idle_timeout
    closed: Time | None = None  # the `ready_at` of a server that gets no more requests


def idle_limit(server: Server, use: ServerUse, *, was_used: bool) -> float | None:
    """The seconds without a request after which a server is unloaded; None: it stays. `was_used`:
    it has had a request since it was loaded."""
    if server.pinned:
        return None
    if was_used and use.keep is not None:
        return use.keep if use.keep >= 0 else None
    return server.idle_timeout or None


class Usage(Struct, frozen=True, kw_only=True):
    """How one gateway uses the servers, by name."""

    pid: Pid
    started: Time  # of the process, as psutil's create_time gives it
    servers: Mapping[str, ServerUse] = {}


def since_1970(monotonic: float) -> float:
    """That time of time.monotonic() in seconds since 1970, for people."""
    return time.time() - (time.monotonic() - monotonic)


def write(at: Folder, usage: Usage) -> None:
    """Replace the report of a gateway. Raises OSError."""
    json_file.write_private(_file(at, usage.pid), to_builtins(usage))


def remove(at: Folder) -> None:
    """Remove the report of this process."""
    with suppress(OSError):
        _file(at, os.getpid()).unlink()


def _file(at: Folder, pid: int) -> Path:
    return at.usage / f"{pid}.json"


class Gateways:
    """The gateways that run, each read again when its file changes."""

    def __init__(self, at: Folder) -> None:
        self._at = at
        self._read: dict[Path, tuple[Stamp, Usage]] = {}
        self.usages: list[Usage] = []

    def read(self) -> None:
        """Read what has changed; forget gateways that have ended."""
        files = {path: stamp(path) for path in sorted(self._at.usage.glob("*.json"))}
        for path, now in files.items():
            is_new = path not in self._read or self._read[path][0] != now
            if is_new and (usage := json_file.read(path, lambda data: convert(data, Usage))):
                self._read[path] = now, usage
        for path, (_, usage) in list(self._read.items()):
            if path not in files or not marker.find(usage.pid, usage.started, self._at.marker):
                del self._read[path]
                with suppress(OSError):
                    path.unlink()
        self.usages = [usage for _, usage in self._read.values()]

    def use(self, name: str) -> ServerUse:
        """How all gateways together use a server."""
        uses = [usage.servers[name] for usage in self.usages if name in usage.servers]
        latest = max(uses, key=lambda use: use.last, default=ServerUse())
        return ServerUse(
            waiting=sum(use.waiting for use in uses),
            since=min((use.since for use in uses if use.waiting), default=0.0),
            in_flight=sum(use.in_flight for use in uses),
            last=latest.last,
            recent=max((use.recent for use in uses), default=0.0),
            keep=latest.keep,
        )

    def have_left(self, name: str, ready_at: float | None, seconds: float) -> bool:
        """Whether no gateway sends requests to the server that was ready at `ready_at` and has been
        unloading for `seconds`, and all that it got are answered."""
        uses = [usage.servers.get(name, ServerUse()) for usage in self.usages]
        is_late = seconds >= SILENT_SECONDS
        return all(not use.in_flight and (use.closed == ready_at or is_late) for use in uses)
