"""Who may ask: by key, by origin, by the name that the gateway is asked under.

Without a key, web pages are the danger. Any page may send a request to this machine and name itself
in `Origin`; one whose name is led to this machine (DNS rebinding) is of the same origin, and shows
itself by `Host` alone.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from pipeline.serve.keys import is_loopback

from . import answers, dashboard
from .answers import Refused
from .page import is_open
from .settings import GatewaySettings
from .upstream import Keys

OPEN = ("/health", "/v1/health")  # need no key
INVALID_PATH = Refused(404, "there is no such path")
TWO_LENGTHS = Refused(400, "the request has Content-Length and Transfer-Encoding", closes=True)
NO_KEY = Refused(401, "the API key is missing or wrong", "invalid_api_key")

# Pages of this machine.
LOCAL_ORIGINS = [
    f"{scheme}://{host}{port}"
    for scheme in ("http", "https")
    for host in ("localhost", "*.localhost", "127.0.0.1", "[::1]", "0.0.0.0")  # noqa: S104
    for port in ("", ":*")
]
# Names that no public name server leads anywhere, and that of this machine.
LOCAL_HOSTS = ["localhost", "*.localhost", "*.local", "*.internal", socket.gethostname()]
# As browsers send them. Anything else is from no browser.
ORIGIN = re.compile(r"null|[a-z][a-z0-9+.-]*://[^/?#\s]*")
HOST = re.compile(r"(\[[^\]]*\]|[^:]*)(:\d*)?")


def any_of(patterns: Iterable[str]) -> re.Pattern[str]:
    """Matches what one of `patterns` does; `*` stands for any text."""
    return re.compile(
        "|".join(re.escape(pattern.lower()).replace(r"\*", ".*") for pattern in patterns)
    )


def allowed_origins(settings: GatewaySettings) -> re.Pattern[str]:
    """The origins whose pages may send requests and read the answers."""
    return any_of([*LOCAL_ORIGINS, *settings.origins])


class Origins:
    """Refuses requests that a page of another site sends, or may have sent, unless a key protects
    the servers; and what a proxy in front could read in another way than we do."""

    def __init__(self, app: ASGIApp, settings: GatewaySettings) -> None:
        self._app = app
        self._needs_key = settings.api_key_file is not None
        self._origins = allowed_origins(settings)
        self._any_host = not (settings.hosts or is_loopback(settings.host))
        self._hosts = any_of([*LOCAL_HOSTS, *settings.hosts])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (refused := self._refusal(scope)):
            await answers.error(refused, Request(scope))(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> Refused | None:
        headers = Request(scope).headers
        if not scope["path"].isprintable():
            return INVALID_PATH
        if "content-length" in headers and "transfer-encoding" in headers:
            return TWO_LENGTHS
        host = headers.get("host", "").lower()
        origin = headers.get("origin", "").lower()
        is_preflight = scope["method"] == "OPTIONS" and "access-control-request-method" in headers
        if self._needs_key and not is_preflight:
            return None
        if not (self._needs_key or self._is_own_name(host)):
            return self._not_in("hosts", f"the gateway does not answer to the name {host}")
        is_same_site = origin in (f"http://{host}", f"https://{host}")
        if ORIGIN.fullmatch(origin) and not (is_same_site or self._origins.fullmatch(origin)):
            return self._not_in("origins", f"pages of {origin} may not ask the gateway")
        return None

    def _not_in(self, key: str, what: str) -> Refused:
        instead = "" if self._needs_key else ", or set an API key"
        return Refused(403, f"{what}; add it to {key} in [gateway]{instead}")

    def _is_own_name(self, host: str) -> bool:
        """Whether a browser that asks for `host` cannot have been led here by another site."""
        match = HOST.fullmatch(host)
        name = match[1].rstrip(".") if match else host
        return self._any_host or not name or _is_address(name) or bool(self._hosts.fullmatch(name))


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
            is_page = is_open(scope) or dashboard.is_open(scope["path"])
            if not (scope["allowed"] or scope["path"] in OPEN or is_page):
                await answers.error(NO_KEY, request)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True
