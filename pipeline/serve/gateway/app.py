"""The routes, what the gateway answers itself, and its process."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

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

from pipeline.core import log
from pipeline.serve.guard.refusal import Refused
from pipeline.serve.health import require_free
from pipeline.serve.server import LLAMA_CPP
from pipeline.serve.stopping import asked_to_stop
from pipeline.serve.supervisor.state import Folder

from . import answers, counters
from .connection import Connection
from .dashboard import Dashboard
from .guard import OPEN, Guard, Origins, rules
from .loading import Loading
from .ollama.endpoints import Ollama
from .page import NO_STREAMS, NO_TOOLS, Page
from .proxy import Proxy
from .routing import ANY, PATHS, find
from .servers import Target, Targets, View
from .settings import GatewaySettings, as_instance, check
from .upstream import Keys, authorization, client

FETCH_SECONDS = 2.0  # for a server to answer a question of ours
GRACE_SECONDS = 0.5  # for answers in flight at a stop
KEEP_ALIVE_SECONDS = 65  # longer than clients keep idle connections, so that they close them


class OwnEndpoints:
    """What the gateway answers itself."""

    def __init__(self, proxy: Proxy, page: Page) -> None:
        self._proxy, self._page = proxy, page
        self._view = proxy.view
        self._known: dict[str, dict[str, Any]] = {}  # by server, what it says of its model
        self._seen: dict[str, Target] = {}  # and in which state it said so

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
        servers = self._view.now()
        return JSONResponse(answers.models(servers, await self.details(servers.targets)))

    async def model(self, request: Request) -> Response:
        """One of them, looked up as for a request."""
        name = request.path_params["name"]
        if not name:
            raise HTTPException(404)
        targets = find(self._view.now(), name, ANY, self._proxy.settings.models)
        return JSONResponse(answers.model(name, targets, await self.details(targets)))

    async def metrics(self, request: Request) -> Response:
        """The gateway's counters, and the metrics of all servers that have any."""
        targets = self._view.now().targets
        texts = await self.engine_metrics()
        lines = [
            *self._proxy.counters.lines(),
            *counters.ready_lines({target.name: target.is_ready for target in targets}),
            *counters.merge_metrics(texts),
        ]
        text = "\n".join(lines) + "\n"
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def engine_metrics(self) -> dict[str, str]:
        """The metrics of all servers that have any, by name."""
        return await self._fetch_all("/metrics", self._view.now().targets)

    async def details(self, targets: Targets) -> dict[str, dict[str, Any]]:
        """What each llama-server says of its model, which does not change while it is ready."""
        named = {target.name: target for target in targets if target.instance.engine == LLAMA_CPP}
        new = [target for name, target in named.items() if self._seen.get(name) != target]
        for name, text in (await self._fetch_all("/v1/models", new)).items():
            with suppress(ValueError):
                self._known[name] = answers.details(json.loads(text))
                self._seen[name] = named[name]
        return {name: self._known[name] for name in named if self._seen.get(name) == named[name]}

    async def _fetch_all(self, path: str, targets: Sequence[Target]) -> dict[str, str]:
        """What all ready servers answer to a request for `path`, those left out that fail."""
        texts: dict[str, str] = {}

        async def fetch(target: Target) -> None:
            with suppress(httpx2.TransportError):
                answer = await self._proxy.client.get(
                    f"{target.instance.url}{path}",
                    headers=authorization(target.instance.api_key_file, self._proxy.keys),
                    timeout=FETCH_SECONDS,
                )
                if answer.status_code == 200:
                    texts[target.name] = answer.text

        async with anyio.create_task_group() as group:
            for target in targets:
                if target.is_ready:
                    group.start_soon(fetch, target)
        return {target.name: texts[target.name] for target in targets if target.name in texts}


def app(at: Folder, settings: GatewaySettings) -> Starlette:
    """The gateway of the configuration in `at`."""
    proxy = Proxy(View(at), Keys(), counters.Counters(), settings)
    page, loading = Page(proxy), Loading(proxy)
    own = OwnEndpoints(proxy, page)
    board = Dashboard(at, proxy, own.engine_metrics)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with client() as proxy.client, anyio.create_task_group() as group:
            group.start_soon(proxy.demand.report)
            group.start_soon(board.sampling)
            yield
            group.cancel_scope.cancel()

    async def refused(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            why = "there is no" if error.status_code == 404 else f"no {request.method} for"
            error = Refused(error.status_code, f"{why} {request.scope['path']}")
        elif not isinstance(error, Refused):
            error = Refused(500, "internal error; see the gateway's log")
        proxy.counters.requests["", error.status] += 1
        return answers.error(error, request)

    made = Starlette(
        routes=[
            *(Route(path, proxy, methods=["POST"]) for path in PATHS),
            Route("/", own.index),
            *(Route(path, own.health) for path in OPEN),
            *(Route(path, own.models) for path in ("/v1/models", "/models")),
            Route("/v1/models/{name:path}", own.model),
            Route("/metrics", own.metrics),
            Route("/upstream/{server}/{path:path}", proxy),
            Route("/running", loading.running),
            Route("/models/load", loading.load, methods=["POST"]),
            Route("/models/unload", loading.unload, methods=["POST"]),
            Route("/unload", loading.unload_all, methods=["GET", "POST"]),
            *board.routes,
            # For llama.cpp's page.
            Route("/props", page.props),
            Route("/models/sse", page.feed),
            Route("/tools", NO_TOOLS, methods=["GET", "POST"]),
            Route("/v1/streams/lookup", NO_STREAMS, methods=["POST"]),
            # Claude Code's telemetry: accepted and dropped.
            Route("/api/event_logging/{rest:path}", JSONResponse({}), methods=["POST"]),
            Route("/api/claude_code/{rest:path}", JSONResponse({}), methods=["POST"]),
            *Ollama(proxy, own.details).routes(),
            Route("/{name:page_file}", page.file),
        ],
        middleware=[
            Middleware(Origins, settings=settings),
            Middleware(
                CORSMiddleware,
                allow_origin_regex=rules(settings).origins.pattern,
                allow_methods=["*"],
                allow_headers=["*"],
                allow_private_network=True,
            ),
            Middleware(Guard, keys=proxy.keys, settings=settings),
        ],
        exception_handlers={Refused: refused, HTTPException: refused, Exception: refused},
        lifespan=lifespan,
    )
    made.router.redirect_slashes = False  # another path, as for llama-server
    return made


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
        http=Connection,
        ws="none",
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=GRACE_SECONDS,  # type: ignore[arg-type]
    )
    log.info(f"gateway on {as_instance(at, settings).url}")
    # uvicorn raises the signal that stopped it again; a requested stop ends with status 0
    with asked_to_stop("SIGINT", "SIGTERM", "SIGBREAK"):
        uvicorn.Server(config).run()
