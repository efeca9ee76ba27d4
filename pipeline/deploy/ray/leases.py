"""Requests of the gateway on a cluster: each gets a lease of a replica from Serve, and is sent to
that replica's relay.

Serve chooses the replica, counts its leases as requests under way, and holds those for which there
is none: it starts one, or waits until one has room.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import anyio
from msgspec import convert

from pipeline.core import log
from pipeline.serve.gateway.proxy import ForwardedRequest, Proxy
from pipeline.serve.gateway.servers import Target, Targets
from pipeline.serve.gateway.upstream import Answer, NoAnswer

from . import prefix
from .view import ClusterView, ReplicaAddress


class ReplicaLease:
    """A lease of a replica: first awaited, then held. `changed` is set when it comes, and when
    there will be none."""

    def __init__(self, name: str, handle: Any, hashes: Sequence[int]) -> None:
        """Ask Serve for a replica of the instance `name`."""
        self.name = name
        self.address: ReplicaAddress | None = None
        self.failure = ""  # why there is none, or none any more
        self.changed = asyncio.Event()
        self.when_lost: Callable[[], object] = lambda: None  # called where it fails while held
        self._responses = handle.options(stream=True).lease.remote(list(hashes))
        self._task = asyncio.ensure_future(self._hold())

    async def _hold(self) -> None:
        try:
            async for address in self._responses:
                self.address = convert(address, ReplicaAddress)
                self.changed.set()
        except Exception as error:  # of the replica, or of Ray where the replica or its node died
            lines = str(error).strip().splitlines()
            self.failure = lines[-1] if lines else type(error).__name__
            if self.address:
                self.when_lost()
        self.changed.set()

    def close(self) -> None:
        """Give it back."""
        self._responses.cancel()
        self._task.cancel()


class LeasingProxy(Proxy):
    """A proxy whose servers are the replicas of a ClusterView."""

    view: ClusterView

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._leases: dict[int, ReplicaLease] = {}  # by request
        self._loads: dict[str, asyncio.Task[None]] = {}  # by server, until it is loaded

    def load(self, target: Target) -> None:
        """Have Serve start a replica where there is none: for a lease, which is given back."""
        if target.name not in self._loads:
            lease = ReplicaLease(target.name, self.view.handle(target.name), [])
            self._loads[target.name] = asyncio.ensure_future(self._load(target, lease))

    async def _load(self, target: Target, lease: ReplicaLease) -> None:
        try:
            with anyio.move_on_after(target.instance.ready_timeout):
                await lease.changed.wait()
        finally:
            lease.close()
            del self._loads[target.name]
        if lease.failure:
            log.info(f"{target.name} was not loaded: {lease.failure}")

    async def _answer(self, call: ForwardedRequest) -> None:
        try:
            await super()._answer(call)
        finally:
            self._release(call)

    def _choose(self, call: ForwardedRequest, targets: Targets) -> Target | None:
        """The replica of which Serve has given this request a lease; until then None."""
        lease = self._leases.get(id(call))
        if lease and lease.failure:
            self._release(call)
            target = next((each for each in targets if each.name == lease.name), targets[0])
            self._note(call, target, NoAnswer(lease.failure, loads=True))
            lease = None
        if lease is None:
            least_busy = self._least_busy(
                [each for each in targets if each.is_ready or each.is_pending]
            )
            if least_busy is None:
                return None
            # Where it failed once, another replica may do better than the one with its prompt.
            hashes = [] if call.failures else prefix.hashes(call.body.body)
            lease = ReplicaLease(least_busy.name, self.view.handle(least_busy.name), hashes)
            self._leases[id(call)] = lease
        if (address := lease.address) is None:
            return None
        self.view.reached(lease.name, address)
        return next(address.target(t, address.lease) for t in targets if t.name == lease.name)

    def _is_coming(self, call: ForwardedRequest, targets: Targets) -> bool:
        return id(call) in self._leases or super()._is_coming(call, targets)

    async def _changed(self, call: ForwardedRequest) -> None:
        if lease := self._leases.get(id(call)):
            await lease.changed.wait()
        else:
            await super()._changed(call)

    async def _send(self, call: ForwardedRequest, target: Target) -> None:
        try:
            await super()._send(call, target)
        finally:
            self._release(call)

    async def _forward(self, call: ForwardedRequest, target: Target) -> Answer:
        """As for any server, but a node that is gone closes no connection: Ray tells of it."""
        lease = self._leases[id(call)]
        with anyio.CancelScope() as scope:
            lease.when_lost = scope.cancel
            answer = await super()._forward(call, target)
            lease.when_lost = answer.close
            return answer
        raise NoAnswer(f"was lost ({lease.failure})", sent=True)

    def _release(self, call: ForwardedRequest) -> None:
        if lease := self._leases.pop(id(call), None):
            lease.close()
