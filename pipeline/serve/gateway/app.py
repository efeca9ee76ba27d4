"""The paths, and what the gateway answers itself."""

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
from .fleet import Target, View
from .keys import Keys
from .page import Feed, Page, Props, is_open
from .proxy import Proxy
from .routing import ANY, PATHS, find
from .settings import GatewaySettings, as_instance, check
from .upstream import authorisation, client

# The only pages that may ask.
HERE = re.compile(r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?")
METRICS_SECONDS = 2.0
GRACE_SECONDS = 0.5  # for answers under way when it is asked to stop
KEEP_ALIVE_SECONDS = 65  # longer than clients keep a connection, so that they close it
OPEN = ("/health", "/v1/health")  # without a key
ODD_PATH = Refused(404, "there is no such path")
ELSEWHERE = Refused(403, "a web page of another site may not ask; an API key lets its server in")
NO_KEY = Refused(401, "the API key is missing or wrong", "invalid_api_key")


class Guard:
    """Lets nothing through without a key but /health, and the page itself; where there is no key,
    no web page from elsewhere."""

    def __init__(self, app: ASGIApp, keys: Keys, settings: GatewaySettings) -> None:
        self._app = app
        self._keys = keys
        self._file = settings.api_key_file
        self._is_local = is_loopback(settings.host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Request(scope).headers
            if not scope["path"].isprintable():
                await answers.error(ODD_PATH, anthropic=False)(scope, receive, send)
                return
            if self._file is None and self._is_elsewhere(headers):
                await answers.error(ELSEWHERE, anthropic=False)(scope, receive, send)
                return
            allowed = self._file is None or self._keys.allow(self._file, headers)
            scope["allowed"] = allowed
            if not (allowed or scope["path"] in OPEN or is_open(scope)):
                anthropic = answers.is_anthropic(scope["path"], headers)
                await answers.error(NO_KEY, anthropic=anthropic)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _is_elsewhere(self, headers: Mapping[str, str]) -> bool:
        """Whether a page of another site asks: it says so, or its name was led to this machine."""
        host = headers.get("host", "")
        name = urlsplit(f"//{host}").hostname or ""
        if self._is_local and not (name == "localhost" or _is_address(name)):
            return True
        origin = headers.get("origin", "")
        return bool(origin) and not HERE.fullmatch(origin) and urlsplit(origin).netloc != host


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class Own:
    """What the gateway answers itself."""

    def __init__(
        self,
        view: View,
        keys: Keys,
        counted: counters.Counters,
        proxy: Proxy,
        page: Page,
        patterns: Mapping[str, str],
    ) -> None:
        self._view = view
        self._patterns = patterns
        self._keys = keys
        self._counted = counted
        self._proxy = proxy
        self._page = page

    async def index(self, request: Request) -> Response:
        """llama.cpp's page, where an instance has it for this client; else what this is."""
        with suppress(Refused):
            return await self._page.file(request)
        names = list(self._view.now().groups)
        told = {"models": names} if request.scope["allowed"] else {}
        return JSONResponse({"name": "llama-pipeline gateway", **told})

    async def health(self, request: Request) -> Response:
        """The state of each instance, to those who have the key."""
        detailed = request.scope["allowed"]
        status, body = answers.health(self._view.now(), detailed=detailed)
        return JSONResponse(body, status)

    async def models(self, request: Request) -> Response:
        """All names and aliases."""
        return JSONResponse(answers.models(self._view.now()))

    async def model(self, request: Request) -> Response:
        """One of them, found as a request for it would be."""
        name = request.path_params["name"]
        group = find(self._view.now(), name, ANY, self._patterns)
        return JSONResponse(answers.model(name, group))

    async def telemetry(self, request: Request) -> Response:
        """Taken, and forgotten."""
        return JSONResponse({})

    async def metrics(self, request: Request) -> Response:
        """The gateway's counters and the metrics of all instances that give any."""
        targets = self._view.now().targets
        texts: dict[str, str] = {}
        async with anyio.create_task_group() as group:
            for target in targets:
                if target.is_ready:
                    group.start_soon(self._ask_metrics, target, texts)
        texts = {one.name: texts[one.name] for one in targets if one.name in texts}
        lines = [
            *self._counted.lines(),
            *counters.states({one.name: one.is_ready for one in targets}),
            *counters.merged(texts),
        ]
        text = "\n".join(lines) + "\n"
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def _ask_metrics(self, target: Target, texts: dict[str, str]) -> None:
        try:
            answer = await self._proxy.client.get(
                f"{target.instance.url}/metrics",
                headers=authorisation(target.instance.api_key_file, self._keys),
                timeout=METRICS_SECONDS,
            )
        except httpx2.TransportError:
            return
        if answer.status_code == 200:
            texts[target.name] = answer.text


def app(at: Folder, settings: GatewaySettings) -> Starlette:
    """The gateway of the configuration in `at`."""
    view, keys, counted = View(at), Keys(), counters.Counters()
    proxy = Proxy(view, keys, counted, settings)
    page = Page(view, proxy)
    own = Own(view, keys, counted, proxy, page, settings.models)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with client() as proxy.client:
            yield

    async def refused(request: Request, why: Exception) -> Response:
        path = request.scope["path"]
        if isinstance(why, HTTPException):
            told = f"there is no {path}" if why.status_code == 404 else why.detail
            why = Refused(why.status_code, told)
        elif not isinstance(why, Refused):
            why = Refused(500, "the gateway failed; its log says why")
        counted.requests["", why.status] += 1
        anthropic = answers.is_anthropic(path, request.headers)
        return answers.error(why, anthropic=anthropic)

    return Starlette(
        routes=[
            *(Route(path, proxy, methods=["POST"]) for path in PATHS),
            Route("/", own.index),
            *(Route(path, own.health) for path in OPEN),
            *(Route(path, own.models) for path in ("/v1/models", "/models")),
            Route("/v1/models/{name:path}", own.model),
            Route("/metrics", own.metrics),
            # What llama.cpp's page asks for.
            Route("/props", Props(view, proxy), methods=["GET"]),
            Route("/models/load", page.load, methods=["POST"]),
            Route("/models/sse", Feed(view), methods=["GET"]),
            Route("/tools", page.nothing),
            Route("/v1/streams/lookup", page.nothing, methods=["POST"]),
            # What Claude Code reports about itself.
            Route("/api/event_logging/{rest:path}", own.telemetry, methods=["POST"]),
            Route("/api/claude_code/{rest:path}", own.telemetry, methods=["POST"]),
            Route("/{name:page_file}", page.file),
        ],
        middleware=[
            Middleware(
                CORSMiddleware,
                allow_origin_regex=HERE.pattern,
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
    with _stop_is_no_failure():
        uvicorn.Server(config).run()


@contextmanager
def _stop_is_no_failure() -> Iterator[None]:
    """uvicorn raises the signal that stopped it again once it has ended, for who was there
    before it; that one takes no notice."""
    names = ("SIGINT", "SIGTERM", "SIGBREAK")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {number: signal.signal(number, lambda _, frame: None) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
