"""What several gateways of the same servers count together: an autoscaler asks any of them."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Sequence
from urllib.parse import quote, urlsplit

import anyio
import msgspec
from msgspec import Struct
from msgspec.structs import replace

from pipeline.serve.guard.refusal import Refused
from pipeline.serve.server import GATEWAY, elsewhere

from .servers import Target
from .settings import GatewaySettings
from .upstream import PATH_SAFE, Keys, NoAnswer, ask, authorization

ANSWER_SECONDS = 2.0  # less than KEDA waits for an answer
ONLY = "only"  # in the query: what this gateway counts, without its peers


class GatewayRequests(Struct, frozen=True):
    """The requests of one gateway, which `gateway` tells from its peers."""

    requests: int
    gateway: str


class Peers:
    """The gateways at `settings.peers`, whose names may have many addresses."""

    def __init__(self, settings: GatewaySettings, keys: Keys) -> None:
        self._settings, self._keys = settings, keys
        self.id = secrets.token_hex(8)

    async def total(self, name: str, own: int) -> int:
        """The requests for a server at all gateways; this one has `own` of them. One that cannot be
        reached is gone, and its requests with it. Raises Refused where none can be found."""
        counts = {self.id: own}
        path = f"/scaling/{quote(name, safe=PATH_SAFE)}?{ONLY}=1"
        headers = authorization(self._settings.api_key_file, self._keys)

        async def add(peer: Target) -> None:
            try:
                answer = await ask(peer, path, headers, ANSWER_SECONDS)
                count = msgspec.json.decode(answer.kept, type=GatewayRequests)
            except (NoAnswer, msgspec.DecodeError):
                return
            counts.setdefault(count.gateway, count.requests)

        peers = [peer for url in self._settings.peers for peer in await _addresses(url)]
        async with anyio.create_task_group() as group:
            for peer in peers:
                group.start_soon(add, peer)
        return sum(counts.values())


async def _addresses(url: str) -> Sequence[Target]:
    """A peer at each address of a URL's host. Raises Refused."""
    parts = urlsplit(url)
    try:
        found = await anyio.getaddrinfo(parts.hostname, parts.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise Refused(503, f"gateway.peers: {url}: {error}") from None
    server = elsewhere(GATEWAY, port=parts.port or 80)
    hosts = dict.fromkeys(str(address[0]) for *_, address in found)
    return [Target(instance=replace(server, host=host), state="") for host in hosts]
