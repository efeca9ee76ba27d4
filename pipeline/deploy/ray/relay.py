"""Connections from other nodes, passed on to this node's server.

The server listens where only this node reaches it. The relay listens on the node's own address, and
lets a request through that carries the key of a lease, or the relay's own. The lease of a request
is over when its connection is: it cannot outlive a gateway that has died.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from pipeline.serve.guard.refusal import Refused
from pipeline.serve.guard.relay import Address, ClientSide

HEADER = "x-llama-pipeline-lease"
UNUSED_SECONDS = 30.0  # until a lease ends that no connection has used
NO_LEASE = Refused(401, "the request carries no lease of this replica", closes=True)


class GrantedLease:
    """The right to send one request."""

    def __init__(self) -> None:
        self.key = secrets.token_urlsafe(24)
        self.over = asyncio.Event()
        self.connection: LeasedConnection | None = None


class Relay:
    """Listens for the requests of gateways. `server` returns where the server listens."""

    def __init__(self, server: Callable[[], Address]) -> None:
        self.server = server
        self.key = secrets.token_urlsafe(24)  # for questions, which are not counted
        self.port = 0
        self.connections: set[ClientSide] = set()
        self._leases: dict[str, GrantedLease] = {}

    async def listen(self, host: str) -> None:
        """Listen on `host`, on a free port."""
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_server(lambda: LeasedConnection(self), host, 0)
        self.port = self._listener.sockets[0].getsockname()[1]

    def close(self) -> None:
        """Listen no more, and cut what is open."""
        self._listener.close()
        for connection in [*self.connections]:
            connection.transport.abort()

    @contextmanager
    def lease(self) -> Iterator[GrantedLease]:
        """A lease for as long as the block runs. At its end its connection is closed."""
        lease = GrantedLease()
        self._leases[lease.key] = lease
        timer = asyncio.get_running_loop().call_later(UNUSED_SECONDS, self._end_unused, lease)
        try:
            yield lease
        finally:
            timer.cancel()
            del self._leases[lease.key]
            if lease.connection:
                lease.connection.transport.abort()

    def _end_unused(self, lease: GrantedLease) -> None:
        if not lease.connection:
            lease.over.set()

    def admit(self, key: str, connection: LeasedConnection) -> GrantedLease | None:
        """The lease with this key, taken by `connection`; None for the relay's own key. Raises
        Refused."""
        if hmac.compare_digest(key.encode(), self.key.encode()):
            return None
        lease = self._leases.get(key)
        if lease is None or lease.over.is_set() or lease.connection not in (None, connection):
            raise NO_LEASE
        lease.connection = connection
        return lease


class LeasedConnection(ClientSide):
    """A connection from a gateway. It checks its own requests, in the place of `Rules`."""

    _lease: GrantedLease | None = None

    def __init__(self, relay: Relay) -> None:
        super().__init__(self, relay.server, relay.connections)
        self._relay = relay

    def refusal(self, method: str, headers: Mapping[str, str]) -> Refused | None:
        """Why a request is refused; None where its key is right."""
        try:
            self._lease = self._relay.admit(headers.get(HEADER, ""), self)
        except Refused as refused:
            return refused
        return None

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        if self._lease:
            self._lease.over.set()
