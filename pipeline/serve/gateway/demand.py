"""What this gateway reports to the supervisor: which servers its requests use, and wait for."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Hashable

import anyio

from pipeline.core import log
from pipeline.serve.placing import used_again
from pipeline.serve.supervisor import marker, usage
from pipeline.serve.supervisor.state import ASLEEP, STOPPING, UNLOADING
from pipeline.serve.supervisor.usage import ServerUse, Usage

from .servers import Target, Targets, View

REPORT_SECONDS = 0.05  # between two reports
ORDER_SECONDS = 120.0  # that an order to load counts where no supervisor carries it out
LAST_AWAITED = (ASLEEP, UNLOADING, STOPPING)  # of servers with one name, after those that load


def awaited(targets: Targets) -> Target | None:
    """The server among `targets` that a request waits for; None where none will get ready."""
    pending = [target for target in targets if target.is_pending]
    ranks = {state: rank for rank, state in enumerate(LAST_AWAITED, 1)}
    return min(pending, key=lambda target: ranks.get(target.state, 0), default=None)


class Demand:
    """The requests of this gateway, by server. Written only where servers are unloaded."""

    def __init__(self, view: View, in_flight: Counter[str]) -> None:
        self._at, self._view, self._in_flight = view.at, view, in_flight
        self._waiting: dict[Hashable, tuple[str, float]] = {}  # by request: the server, since when
        self._last: dict[str, float] = {}
        self._recent: dict[str, float] = {}  # see placing.used_again
        self._keep: dict[str, float] = {}
        self._ordered: dict[str, float] = {}  # by server, until when a client's order counts
        self._reported: Usage | None = None
        self._news = anyio.Event()
        self.changed = anyio.Event()  # set at the next change of any server's state

    def waits(self, request: Hashable, target: Target | None, seconds: float) -> None:
        """A request waits for a server, and has done so for some seconds."""
        if target and self._waiting.get(request, ("",))[0] != target.name:
            self._waiting[request] = target.name, time.monotonic() - seconds
            self._news.set()

    def waits_no_more(self, request: Hashable) -> None:
        self._waiting.pop(request, None)

    def order(self, target: Target) -> None:
        """A client wants a server loaded, with no request for it yet."""
        self._ordered[target.name] = time.monotonic() + ORDER_SECONDS

    def requests(self, target: Target) -> int:
        """How many requests, waiting ones included, and orders this gateway has for a server."""
        name = target.name
        waiting = sum(name == server for server, _ in self._waiting.values())
        ordered = self._ordered.get(name, 0.0) > time.monotonic()
        return self._in_flight[name] + waiting + ordered

    def used(self, target: Target, keep: float | None = None) -> None:
        """A request has begun or ended. `keep`: the seconds for which it wants the server to stay
        loaded after it; below 0: for ever."""
        self._last[target.name] = now = time.monotonic()
        self._recent[target.name] = used_again(self._recent.get(target.name, 0.0), now)
        if keep is not None:
            self._keep[target.name] = keep
        else:
            self._keep.pop(target.name, None)

    async def report(self) -> None:
        """Report to the supervisor whatever has changed, and let the requests that wait know what
        it has changed, until cancelled."""
        before, pid = self._view.now(), os.getpid()
        started = marker.start_time(pid)
        try:
            while True:
                with anyio.move_on_after(REPORT_SECONDS):
                    await self._news.wait()
                self._news = anyio.Event()
                if (servers := self._view.now()) is not before:
                    before = servers
                    self.changed.set()
                    self.changed = anyio.Event()
                is_needed = self._reported or servers.unloads or self._waiting
                if is_needed and self._view.is_supervised:
                    uses = {target.name: self._use(target) for target in servers.targets}
                    self._write(Usage(pid=pid, started=started, servers=uses))
                await anyio.sleep(REPORT_SECONDS / 5)
        finally:
            usage.remove(self._at)

    def _write(self, now: Usage) -> None:
        if now == self._reported:
            return
        try:
            usage.write(self._at, now)
        except OSError as error:
            log.info(f"{self._at.usage}: {error.strerror}; trying again")
        else:
            self._reported = now

    def _use(self, target: Target) -> ServerUse:
        waiting = [since for name, since in self._waiting.values() if name == target.name]
        return ServerUse(
            waiting=len(waiting),
            since=min(waiting, default=0.0),
            in_flight=self._in_flight[target.name],
            last=self._last.get(target.name, 0.0),
            recent=self._recent.get(target.name, 0.0),
            keep=self._keep.get(target.name),
            closed=target.ready_at if target.state == UNLOADING else None,
        )
