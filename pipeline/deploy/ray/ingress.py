"""The gateway as Serve's ingress, as an actor of Serve."""

from __future__ import annotations

import asyncio
from typing import Any

import anyio
from msgspec import convert
from starlette.applications import Starlette
from starlette.types import Receive, Scope, Send

from pipeline.core import paths
from pipeline.core.process.lifetime import end_with_parent
from pipeline.serve.gateway.app import app
from pipeline.serve.gateway.settings import GatewaySettings, check
from pipeline.serve.supervisor.state import Folder

from .config import IngressConfig
from .connection import ServeConnection
from .leases import LeasingProxy
from .view import ClusterView


class Ingress:
    """The gateway of all servers of a file."""

    def __init__(self) -> None:
        end_with_parent()  # Ray's own way waits for all threads
        self._view = ClusterView(Folder(paths.home().run / "ray"))
        self._app = _Application()
        self._settings: GatewaySettings | None = None
        self._beside: asyncio.Task[None] | None = None  # what runs beside the requests

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Called by Serve at the start, and where the configuration has changed: requests under
        way go on. Raises UsageError, and msgspec's ValidationError."""
        config = convert(user_config, IngressConfig)
        check(config.settings)
        self._view.take(config.servers)
        if config.settings == self._settings:
            return
        gateway = app(self._view, config.settings, LeasingProxy)
        if self._beside:
            self._beside.cancel()
        self._beside = asyncio.ensure_future(_run(gateway))
        self._app.gateway, self._settings = gateway, config.settings

    def __serve_build_asgi_app__(self) -> Any:
        """Serve's name for what makes the application of an ingress."""
        return self._app


class _Application:
    """Hands requests to the gateway as it is configured now."""

    gateway: Starlette | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _live(receive, send)
        elif scope["type"] == "http" and self.gateway:
            connection = ServeConnection(send, scope["method"])
            await self.gateway({**scope, "connection": connection}, receive, connection.send)


async def _run(gateway: Starlette) -> None:
    async with gateway.router.lifespan_context(gateway):
        await anyio.sleep_forever()


async def _live(receive: Receive, send: Send) -> None:
    """Take part in Serve's start and end."""
    for state in ("startup", "shutdown"):
        await receive()
        await send({"type": f"lifespan.{state}.complete"})
