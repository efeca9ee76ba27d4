"""The memory that each server takes: computed before its first load, measured after it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from threading import Event, Thread

from msgspec import Struct, convert, to_builtins
from msgspec.structs import replace

from pipeline.core.store import json_file
from pipeline.serve.placing import Bytes
from pipeline.serve.server import GATEWAY, Server

from . import sleep
from .memory import in_use
from .state import DesiredState, Folder, ServerStatus


class Account(Struct, frozen=True, kw_only=True):
    """The memory of one server, in bytes by device."""

    command: str  # a digest: figures of another command line do not count
    need: Bytes  # what it is counted with
    measured: Bytes = {}  # the most that was seen in use
    asleep: Bytes = {}  # last seen in use by its process while that slept
    load_seconds: float = 0.0  # that its last load took


NO_ACCOUNT = Account(command="", need={})  # of a server that is not counted


def read(at: Folder) -> dict[str, Account]:
    """The entries by server, as the supervisor last wrote them."""
    return json_file.read(at.books, lambda data: convert(data, dict[str, Account])) or {}


class Books:
    """The entries of all servers. A thread measures: drivers are slow to answer."""

    def __init__(self, at: Folder, news: Event) -> None:
        self._at, self._news = at, news
        self.entries = read(at)
        self._is_kept = False  # where all servers stay loaded there is nothing to count
        self._computed: Mapping[str, Bytes] = {}
        self._seen: dict[str, float] = {}  # by server, the load that was entered
        self._measured: list[tuple[str, str, Bytes, bool]] = []  # by name and command; asleep?

    def open(self, wanted: DesiredState) -> None:
        """Take over what is computed for the wanted servers."""
        self._is_kept = wanted.unloads
        if self._is_kept and wanted.needs is not self._computed:
            self._computed = wanted.needs
            servers = {x.name: x for x in wanted.instances if x.engine != GATEWAY}
            self.entries = {name: self._entry(server) for name, server in servers.items()}
            self._write()

    def _entry(self, server: Server) -> Account:
        command, computed = digest(server), self._computed.get(server.name, {})
        before = self.entries.get(server.name, NO_ACCOUNT)
        if before.command != command:
            return Account(command=command, need=computed)
        return replace(before, need=most(computed, before.measured))

    def need(self, name: str) -> Bytes:
        """The memory that a server is counted with, loaded or not."""
        return self.entries.get(name, NO_ACCOUNT).need

    def held_asleep(self, server: Server) -> Bytes:
        """The memory that its process keeps asleep; until that is measured, the most it can be."""
        entry = self.entries.get(server.name, NO_ACCOUNT)
        if entry.asleep or not entry.need:
            return entry.asleep
        on_cards = sum(count for device, count in entry.need.items() if device != "ram")
        weights = min(on_cards, sleep.weights(server) or on_cards)
        return {"ram": entry.need.get("ram", 0) + weights}

    def load_seconds(self, name: str) -> float:
        return self.entries.get(name, NO_ACCOUNT).load_seconds

    def loaded(self, server: Server, status: ServerStatus) -> None:
        """Enter how long a load took, once for each, and measure what it takes."""
        if status.ready_at and self._seen.get(server.name) != status.ready_at:
            self._seen[server.name] = status.ready_at
            if entry := self.entries.get(server.name):
                self.entries[server.name] = replace(entry, load_seconds=status.load_seconds)
            self.measure(server, status)

    def measure(self, server: Server, status: ServerStatus, *, is_asleep: bool = False) -> None:
        """Measure what a server takes that runs, or sleeps, in a thread."""
        if not self._is_kept:
            return
        pid, name, command = status.pid, server.name, digest(server)

        def run() -> None:
            if pid and (used := in_use(pid)):
                self._measured.append((name, command, used, is_asleep))
                self._news.set()

        Thread(target=run, daemon=True).start()

    def settle(self) -> None:
        """Enter what was measured meanwhile."""
        if not self._measured:
            return
        while self._measured:
            name, command, used, is_asleep = self._measured.pop()
            entry = self.entries.get(name, NO_ACCOUNT)
            if entry.command != command:
                continue
            if is_asleep:
                self.entries[name] = replace(entry, asleep=used)
            else:
                seen = most(entry.measured, used)
                self.entries[name] = replace(entry, measured=seen, need=most(entry.need, seen))
        self._write()

    def _write(self) -> None:
        with suppress(OSError):  # they are written again with the next change
            json_file.write_private(self._at.books, to_builtins(self.entries))


def digest(server: Server) -> str:
    """A digest of what decides how much memory a server takes."""
    text = json.dumps([server.command, sorted(server.env.items())])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def most(first: Bytes, second: Bytes) -> dict[str, int]:
    """The larger figure of each device."""
    devices = dict.fromkeys((*first, *second))
    return {device: max(first.get(device, 0), second.get(device, 0)) for device in devices}
