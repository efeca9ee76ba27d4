"""Access to the gateway: API keys, origins of pages, host names."""

from __future__ import annotations

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from pipeline.serve.guard.refusal import Refused
from pipeline.serve.guard.request import MAX_HEAD, TOO_LONG
from pipeline.serve.guard.rules import Rules

from . import answers, dashboard
from .page import is_open
from .settings import GatewaySettings
from .upstream import Keys

OPEN = ("/health", "/v1/health")  # need no key
INVALID_PATH = Refused(404, "there is no such path")
NO_KEY = Refused(401, "the API key is missing or wrong", "invalid_api_key")


def rules(settings: GatewaySettings) -> Rules:
    """The rules for origins and host names."""
    return Rules(
        settings.host,
        settings.origins,
        settings.hosts,
        who="the gateway",
        place="{key} in [gateway]",
        needs_key=settings.api_key_file is not None,
    )


class Origins:
    """Refuses requests that a page of another site sends, or may have sent, unless a key protects
    the servers; and paths that a proxy in front could read in another way."""

    def __init__(self, app: ASGIApp, settings: GatewaySettings) -> None:
        self._app = app
        self._rules = rules(settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (refused := self._refusal(scope)):
            await answers.error(refused, Request(scope))(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> Refused | None:
        if not scope["path"].isprintable():
            return INVALID_PATH
        if _head_bytes(scope) > MAX_HEAD:  # h11 takes a longer one where it comes at once
            return TOO_LONG
        return self._rules.refusal(scope["method"], Request(scope).headers)


def _head_bytes(scope: Scope) -> int:
    target = len(scope.get("raw_path", b"")) + len(scope.get("query_string", b""))
    return target + sum(len(name) + len(value) for name, value in scope["headers"])


class Guard:
    """Lets requests without a valid key through to /health and the web page alone."""

    def __init__(self, app: ASGIApp, keys: Keys, settings: GatewaySettings) -> None:
        self._app = app
        self._keys = keys
        self._file = settings.api_key_file

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            request = Request(scope)
            scope["allowed"] = self._file is None or self._keys.allow(self._file, request.headers)
            is_public = scope["path"] in (*OPEN, *dashboard.OPEN) or is_open(scope)
            if not (scope["allowed"] or is_public):
                await answers.error(NO_KEY, request)(scope, receive, send)
                return
        await self._app(scope, receive, send)
