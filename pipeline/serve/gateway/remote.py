"""A gateway without a supervisor: its servers run elsewhere, on a cluster perhaps, and a file lists
them.

Whoever runs them starts and stops them. The gateway looks at their `/health`, holds requests for
those that do not answer yet, and says how many requests each has: an autoscaler starts them by it.
"""

from __future__ import annotations

from pathlib import Path
from time import time
from urllib.parse import urlsplit

import anyio
import msgspec
from msgspec import Struct, field
from msgspec.structs import replace

from pipeline.core import log
from pipeline.core.errors import UsageError
from pipeline.serve.server import BOOT, DEMAND, LLAMA_CPP, Server, elsewhere
from pipeline.serve.supervisor.state import ASLEEP, LOADING, READY, Folder

from .servers import ServerList, Target, View, of_targets
from .settings import GatewaySettings
from .upstream import NoAnswer, ask

LOOK_SECONDS = 1.0  # between two looks at a server
ANSWER_SECONDS = 2.0  # for its health


class RemoteServer(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A server at an address. `start` is `demand` where it may be scaled to no replica. Times in
    seconds."""

    url: str
    engine: str = LLAMA_CPP
    kind: str = "chat"
    aliases: tuple[str, ...] = ()
    api_key_file: str | None = None
    ready_timeout: float = 600.0
    start: str = BOOT

    def server(self, name: str, folder: Path) -> Server:
        """The record of it; a relative path starts in `folder`. Raises ValueError for its URL."""
        url = urlsplit(self.url)
        if url.scheme != "http" or not url.hostname or url.query or url.fragment:
            raise ValueError("must be such as http://chat:8080")
        url.hostname.encode("idna")
        return elsewhere(
            name,
            engine=self.engine,
            kind=self.kind,
            host=url.hostname,
            port=url.port or 80,
            prefix=url.path.rstrip("/"),
            aliases=self.aliases,
            api_key_file=_inside(folder, self.api_key_file),
            ready_timeout=self.ready_timeout,
            start=self.start,
        )


class RemoteFile(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The file: the gateway's settings, and the servers by name."""

    gateway: GatewaySettings = field(default_factory=GatewaySettings)
    servers: dict[str, RemoteServer]


def read(file: Path) -> tuple[GatewaySettings, RemoteView]:
    """The settings and servers of a file. Raises UsageError."""
    try:
        content = msgspec.toml.decode(file.read_bytes(), type=RemoteFile)
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}", "name a file that can be read") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: {error}", "docs/gateway.md lists the keys") from None
    servers = []
    for name, remote in content.servers.items():
        try:
            servers.append(remote.server(name, file.parent))
        except ValueError as error:
            raise UsageError(f"{file}: servers.{name}.url = {remote.url}: {error}") from None
    for url in content.gateway.peers:
        try:
            RemoteServer(url=url).server("peer", file.parent)
        except ValueError as error:
            raise UsageError(f"{file}: gateway.peers: {url}: {error}") from None
    if content.gateway.pull:
        raise UsageError(f"{file}: gateway.pull: the servers run elsewhere; leave it out")
    key_file = _inside(file.parent, content.gateway.api_key_file)
    settings = replace(content.gateway, api_key_file=key_file)
    return settings, RemoteView(Folder(file.parent), servers)


def _inside(folder: Path, path: str | None) -> str | None:
    return None if path is None else str(folder / path)


class RemoteView(View):
    """The servers of a file, in the state that their health tells. `watch` must run."""

    is_supervised = False

    def __init__(self, at: Folder, servers: list[Server]) -> None:
        super().__init__(at)
        self._targets = {
            server.name: Target(instance=server, state=_silent(server)) for server in servers
        }
        self._servers = of_targets(tuple(self._targets.values()))

    def now(self) -> ServerList:
        """The current list."""
        return self._servers

    async def watch(self) -> None:
        """Look at every server, for ever."""
        async with anyio.create_task_group() as group:
            for name in self._targets:
                group.start_soon(self._watch, name)

    async def _watch(self, name: str) -> None:
        while True:
            before = self._targets[name]
            state, reason = await _health(before)
            if (state, reason) != (before.state, before.reason):
                ready_at = time() if state == READY else None
                now = replace(before, state=state, reason=reason, ready_at=ready_at)
                self._targets[name] = now
                self._servers = of_targets(tuple(self._targets.values()))
                log.info(f"{name} is {state}" + (f": {reason}" if reason else ""))
            await anyio.sleep(LOOK_SECONDS)


async def _health(target: Target) -> tuple[str, str]:
    """The server's state, and why it is not ready."""
    try:
        answer = await ask(target, "/health", (), ANSWER_SECONDS)
    except NoAnswer as error:
        return _silent(target.instance), str(error)
    return (READY, "") if answer.status == 200 else (LOADING, f"answers {answer.status}")


def _silent(server: Server) -> str:
    """The state of a server that does not answer: whoever runs it starts it again."""
    return ASLEEP if server.start == DEMAND else LOADING
