"""The routes, what the gateway answers itself, and its process."""

from __future__ import annotations

import ipaddress
import re
import signal
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from urllib.parse import urlsplit

import anyio
import httpx2
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from pipeline.core import log
from pipeline.serve.health import require_free
from pipeline.serve.keys import is_loopback
from pipeline.serve.supervisor.state import Folder

from . import answers, counters
from .answers import Refused
from .keys import Keys
from .page import Feed, Page, Props, is_open
from .proxy import Proxy
from .routing import ANY, PATHS, find
from .servers import Target, View
from .settings import GatewaySettings, as_instance, check
from .upstream import authorization, client

# Web pages of this machine: the only ones that may send requests.
LOCAL_ORIGIN = re.compile(r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?")
METRICS_SECONDS = 2.0
GRACE_SECONDS = 0.5  # for answers in flight at a stop
KEEP_ALIVE_SECONDS = 65  # longer than clients keep idle connections, so that they close them
OPEN = ("/health", "/v1/health")  # need no key
INVALID_PATH = Refused(404, "there is no such path")
CROSS_SITE = Refused(403, "requests from other sites' pages are refused unless an API key is set")
NO_KEY = Refused(401, "the API key is missing or wrong", "invalid_api_key")


class Guard:
    """Lets requests without a valid key through to /health and the web page alone. Where no key is
    set, refuses those that other sites' pages send."""

    def __init__(self, app: ASGIApp, keys: Keys, settings: GatewaySettings) -> None:
        self._app = app
        self._keys = keys
        self._file = settings.api_key_file
        self._is_local = is_loopback(settings.host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Request(scope).headers
            if not scope["path"].isprintable():
                await answers.error(INVALID_PATH, anthropic=False)(scope, receive, send)
                return
            if self._file is None and self._is_cross_site(headers):
                await answers.error(CROSS_SITE, anthropic=False)(scope, receive, send)
                return
            allowed = self._file is None or self._keys.allow(self._file, headers)
            scope["allowed"] = allowed
            if not (allowed or scope["path"] in OPEN or is_open(scope)):
                anthropic = answers.is_anthropic(scope["path"], headers)
                await answers.error(NO_KEY, anthropic=anthropic)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _is_cross_site(self, headers: Mapping[str, str]) -> bool:
        """Whether another site's page sent this: by its Origin, or by DNS rebinding its Host."""
        host = headers.get("host", "")
        name = urlsplit(f"//{host}").hostname or ""
        if self._is_local and not (name == "localhost" or _is_address(name)):
            return True
        origin = headers.get("origin", "")
        return (
            bool(origin) and not LOCAL_ORIGIN.fullmatch(origin) and urlsplit(origin).netloc != host
        )


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class OwnEndpoints:
    """What the gateway answers itself."""

    def __init__(
        self,
        view: View,
        keys: Keys,
        counts: counters.Counters,
        proxy: Proxy,
        page: Page,
        patterns: Mapping[str, str],
    ) -> None:
        self._view = view
        self._patterns = patterns
        self._keys = keys
        self._counts = counts
        self._proxy = proxy
        self._page = page

    async def index(self, request: Request) -> Response:
        """llama.cpp's page, where a server has it for this client; else a short description."""
        with suppress(Refused):
            return await self._page.file(request)
        names = list(self._view.now().by_name)
        models = {"models": names} if request.scope["allowed"] else {}
        return JSONResponse({"name": "llama-pipeline gateway", **models})

    async def health(self, request: Request) -> Response:
        """The overall state; that of each server for clients with a key."""
        detailed = request.scope["allowed"]
        status, body = answers.health(self._view.now(), detailed=detailed)
        return JSONResponse(body, status)

    async def models(self, request: Request) -> Response:
        """All names and aliases."""
        return JSONResponse(answers.models(self._view.now()))

    async def model(self, request: Request) -> Response:
        """One of them, looked up as for a request."""
        name = request.path_params["name"]
        targets = find(self._view.now(), name, ANY, self._patterns)
        return JSONResponse(answers.model(name, targets))

    async def telemetry(self, request: Request) -> Response:
        """Accepted and dropped."""
        return JSONResponse({})

    async def metrics(self, request: Request) -> Response:
        """The gateway's counters, and the metrics of all servers that have any."""
        targets = self._view.now().targets
        texts: dict[str, str] = {}
        async with anyio.create_task_group() as group:
            for target in targets:
                if target.is_ready:
                    group.start_soon(self._fetch_metrics, target, texts)
        texts = {target.name: texts[target.name] for target in targets if target.name in texts}
        lines = [
            *self._counts.lines(),
            *counters.ready_lines({target.name: target.is_ready for target in targets}),
            *counters.merge_metrics(texts),
        ]
        text = "\n".join(lines) + "\n"
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def _fetch_metrics(self, target: Target, texts: dict[str, str]) -> None:
        try:
            answer = await self._proxy.client.get(
                f"{target.instance.url}/metrics",
                headers=authorization(target.instance.api_key_file, self._keys),
                timeout=METRICS_SECONDS,
            )
        except httpx2.TransportError:
            return
        if answer.status_code == 200:
            texts[target.name] = answer.text


def app(at: Folder, settings: GatewaySettings) -> Starlette:
    """The gateway of the configuration in `at`."""
    view, keys, counts = View(at), Keys(), counters.Counters()
    proxy = Proxy(view, keys, counts, settings)
    page = Page(view, proxy)
    own = OwnEndpoints(view, keys, counts, proxy, page, settings.models)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with client() as proxy.client:
            yield

    async def refused(request: Request, error: Exception) -> Response:
        path = request.scope["path"]
        if isinstance(error, HTTPException):
            message = f"there is no {path}" if error.status_code == 404 else error.detail
            error = Refused(error.status_code, message)
        elif not isinstance(error, Refused):
            error = Refused(500, "internal error; see the gateway's log")
        counts.requests["", error.status] += 1
        anthropic = answers.is_anthropic(path, request.headers)
        return answers.error(error, anthropic=anthropic)

    return Starlette(
        routes=[
            *(Route(path, proxy, methods=["POST"]) for path in PATHS),
            Route("/", own.index),
            *(Route(path, own.health) for path in OPEN),
            *(Route(path, own.models) for path in ("/v1/models", "/models")),
            Route("/v1/models/{name:path}", own.model),
            Route("/metrics", own.metrics),
            # For llama.cpp's page.
            Route("/props", Props(view, proxy), methods=["GET"]),
            Route("/models/load", page.load, methods=["POST"]),
            Route("/models/sse", Feed(view), methods=["GET"]),
            Route("/tools", page.nothing),
            Route("/v1/streams/lookup", page.nothing, methods=["POST"]),
            # Claude Code's telemetry.
            Route("/api/event_logging/{rest:path}", own.telemetry, methods=["POST"]),
            Route("/api/claude_code/{rest:path}", own.telemetry, methods=["POST"]),
            Route("/{name:page_file}", page.file),
        ],
        middleware=[
            Middleware(
                CORSMiddleware,
                allow_origin_regex=LOCAL_ORIGIN.pattern,
                allow_methods=["*"],
                allow_headers=["*"],
            ),
            Middleware(Guard, keys=keys, settings=settings),
        ],
        exception_handlers={Refused: refused, HTTPException: refused, Exception: refused},
        lifespan=lifespan,
    )


def run(at: Folder, settings: GatewaySettings) -> None:
    """Serve until SIGINT or SIGTERM. Raises UsageError or PipelineError where it cannot start."""
    check(settings)
    require_free(settings.host, settings.port)
    config = uvicorn.Config(
        app(at, settings),
        host=settings.host,
        port=settings.port,
        access_log=False,
        log_config=None,
        log_level="error",
        server_header=False,
        ws="none",
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=GRACE_SECONDS,  # type: ignore[arg-type]
    )
    log.info(f"gateway on {as_instance(at, settings).url}")
    with _signals_handled():
        uvicorn.Server(config).run()


@contextmanager
def _signals_handled() -> Iterator[None]:
    """uvicorn raises the signal that stopped it again at its end; ignore that one, so that a
    requested stop ends with status 0."""
    names = ("SIGINT", "SIGTERM", "SIGBREAK")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {number: signal.signal(number, lambda _, frame: None) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
