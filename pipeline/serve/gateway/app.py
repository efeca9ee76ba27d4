"""The routes, what the gateway answers itself, and its process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from urllib.parse import quote

import anyio
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

from pipeline.core import log
from pipeline.core.process import allow_many_files
from pipeline.serve.guard.refusal import Refused
from pipeline.serve.guard.request import MAX_HEAD
from pipeline.serve.health import require_free
from pipeline.serve.stopping import asked_to_stop

from . import answers, counters
from .connection import Connection
from .dashboard import Dashboard
from .guard import OPEN, Guard, Origins, rules
from .loading import Loading
from .ollama.endpoints import Ollama
from .page import NO_STREAMS, NO_TOOLS, Page
from .proxy import CLIENT_GONE, Proxy
from .remote import RemoteView
from .servers import ANY, PATHS, View, find, nearest_path
from .settings import GatewaySettings, as_instance, check
from .upstream import Engines, Keys

KEEP_ALIVE_SECONDS = 65  # longer than clients keep idle connections, so that they close them


class OwnEndpoints:
    """What the gateway answers itself."""

    def __init__(self, proxy: Proxy, page: Page, engines: Engines, board: Dashboard) -> None:
        self._proxy, self._page = proxy, page
        self._engines, self._board = engines, board
        self._view = proxy.view

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
        return JSONResponse(answers.models(servers, await self._engines.details(servers.targets)))

    async def model(self, request: Request) -> Response:
        """One of them, looked up as for a request."""
        name = request.path_params["name"]
        if not name:
            raise HTTPException(404)
        targets = find(self._view.now(), name, ANY, self._proxy.settings.models)
        return JSONResponse(answers.model(name, targets, await self._engines.details(targets)))

    async def metrics(self, request: Request) -> Response:
        """The gateway's counters, and the metrics of all servers that have any."""
        targets = self._view.now().targets
        lines = [
            *self._proxy.counters.lines(),
            *counters.ready_lines({target.name: target.is_ready for target in targets}),
            *counters.memory_lines(*await self._board.processes()),
            *counters.merge_metrics(await self._engines.metrics()),
        ]
        text = "\n".join(lines) + "\n"
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")


async def to_its_root(request: Request) -> Response:
    """`/upstream/chat` leads to `/upstream/chat/`, from where a page finds its own files."""
    query = request.url.query
    root = f"./{quote(request.path_params['server'])}/"  # relative: also behind a prefix
    return RedirectResponse(f"{root}?{query}" if query else root)


def app(view: View, settings: GatewaySettings, forwards: type[Proxy] = Proxy) -> Starlette:
    """The gateway of these servers."""
    proxy = forwards(view, Keys(), counters.Counters(), settings)
    page, loading = Page(proxy), Loading(proxy)
    engines = Engines(proxy.view, proxy.keys)
    board = Dashboard(proxy, engines)
    own = OwnEndpoints(proxy, page, engines, board)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with anyio.create_task_group() as group:
            group.start_soon(proxy.demand.report)
            group.start_soon(board.sampling)
            if isinstance(view, RemoteView):
                group.start_soon(view.watch)
            yield
            group.cancel_scope.cancel()

    async def refused(request: Request, error: Exception) -> Response:
        allow = error.headers if isinstance(error, HTTPException) else None  # of a wrong method
        if isinstance(error, HTTPException):
            why = "there is no" if error.status_code == 404 else f"no {request.method} for"
            path = request.scope["path"]
            near = nearest_path(path) if error.status_code == 404 else ""
            error = Refused(error.status_code, f"{why} {path}{near}")
        elif not isinstance(error, Refused):
            error = Refused(500, "internal error; see the gateway's log")
        proxy.counters.requests["", error.status] += 1
        answer = answers.error(error, request)
        answer.headers.update(allow or {})
        return answer

    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=CLIENT_GONE)  # while it sent its request; nobody reads this

    made = Starlette(
        routes=[
            *(Route(path, proxy, methods=["POST"]) for path in PATHS),
            Route("/", own.index),
            *(Route(path, own.health) for path in OPEN),
            *(Route(path, own.models) for path in ("/v1/models", "/models")),
            Route("/v1/models/{name:path}", own.model),
            Route("/metrics", own.metrics),
            Route("/upstream/{server}", to_its_root),
            Route("/upstream/{server}/{path:path}", proxy),
            Route("/running", loading.running),
            Route("/scaling/{server}", loading.scaling),
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
            *Ollama(proxy, engines).routes(),
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
        exception_handlers={
            **dict.fromkeys((Refused, HTTPException, Exception), refused),
            ClientDisconnect: gone,
        },
        lifespan=lifespan,
    )
    made.router.redirect_slashes = False  # another path, as for llama-server
    return made


def run(view: View, settings: GatewaySettings) -> None:
    """Serve until SIGINT or SIGTERM. Raises UsageError or PipelineError where it cannot start."""
    check(settings)
    allow_many_files()  # a client's connection takes one, a request two
    require_free(settings.host, settings.port)
    config = uvicorn.Config(
        app(view, settings),
        host=settings.host,
        port=settings.port,
        access_log=False,
        log_config=None,
        log_level="error",
        server_header=False,
        http=Connection,
        h11_max_incomplete_event_size=MAX_HEAD,
        ws="none",
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=settings.stop_timeout,  # type: ignore[arg-type]
    )
    log.info(f"gateway on {as_instance(view.at, settings).shown_url}")
    # uvicorn raises the signal that stopped it again; a requested stop ends with status 0
    with asked_to_stop("SIGINT", "SIGTERM", "SIGBREAK"):
        uvicorn.Server(config).run()
