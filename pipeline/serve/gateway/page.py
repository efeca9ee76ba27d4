"""llama.cpp's own web page, for all servers: to it the gateway looks like llama-server's router.

The page's files come from a server that has them. They need no key, as with llama-server itself;
all that the page then asks for does.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterator, Mapping

import anyio
from starlette.convertors import PathConvertor, register_url_convertor
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from pipeline.serve.guard.refusal import Refused
from pipeline.serve.server import LLAMA_CPP

from .answers import router_status
from .proxy import Proxy
from .servers import CHAT, ServerList, Target
from .upstream import EVENTS, UNBUFFERED, NoAnswer, ask, returned_headers

# A file beside index.html, or in one of the page's folders. No API path looks like this.
FILE = (
    r"(?:(?:_app|recommended-mcp)/(?:[\w-]{1,100}/){0,8})?"
    r"[\w-][\w.-]{0,200}\.(?:html|js|css|json|ico|svg|png|webmanifest)"
)
FORWARDED = (b"accept-encoding", b"if-none-match")
FILE_SECONDS = 10.0  # no key is needed, so requests must not pile up
POLL_SECONDS = 0.5
KEEP_ALIVE_SECONDS = 15.0  # a silent event stream would be closed by proxies in between
ROUTER = {
    "role": "router",
    "model_alias": "llama-pipeline",
    "model_path": "none",
    "default_generation_settings": {"params": {}, "n_ctx": 0},
    "ui_settings": {},
    "build_info": "llama-pipeline gateway",
    "cors_proxy_enabled": False,
}
# No interrupted answers that could be resumed, and no tools: as a llama-server without any answers.
NO_STREAMS = JSONResponse([])
NO_TOOLS = JSONResponse(
    {"error": {"message": "this feature is disabled", "type": "feature_disabled"}}, 403
)


class PageFile(PathConvertor):
    """A file of the page, as part of a route."""

    regex = FILE


register_url_convertor("page_file", PageFile())


def is_open(scope: Scope) -> bool:
    """Whether a request is for the page itself, which needs no key."""
    path = scope["path"]
    return scope["method"] in ("GET", "HEAD") and bool(re.fullmatch(f"/(?:{FILE})?", path))


def page_servers(servers: ServerList) -> list[Target]:
    """The servers that may have the page, those for chat first."""
    ready = [
        target
        for target in servers.targets
        if target.is_ready and target.instance.engine == LLAMA_CPP
    ]
    return sorted(ready, key=lambda target: target.instance.kind != CHAT)


class Events(StreamingResponse):
    """Server-sent events, whose end the client sees as one when uvicorn stops."""

    def init_headers(self, headers: Mapping[str, str] | None = None) -> None:
        super().init_headers(headers)
        self.raw_headers.append(UNBUFFERED)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except asyncio.CancelledError:
            await send({"type": "http.response.body", "body": b"", "more_body": False})


class Page:
    """The page's files, and the router's endpoints that it uses."""

    def __init__(self, proxy: Proxy) -> None:
        self._proxy, self._view = proxy, proxy.view

    async def file(self, request: Request) -> Response:
        """A file of the page, from the first server that has it. Raises Refused."""
        for target in page_servers(self._view.now()):
            response = await self._fetch(target, request)
            if response is not None:
                return response
        raise Refused(404, f"no ready server has {request.scope['path']}")

    async def _fetch(self, target: Target, request: Request) -> Response | None:
        path = request.scope["path"]
        headers = [*target.headers]
        headers += [header for header in request.headers.raw if header[0].lower() in FORWARDED]
        try:
            answer = await ask(target, path, headers, FILE_SECONDS)
        except NoAnswer:
            return None
        if answer.status >= 400:  # 415: its file is compressed, and the client cannot read it
            return None
        if path == "/" and answer.status == 200 and not answer.has_type("text/html"):
            return None
        response = Response(answer.kept, answer.status)  # as it is: mostly compressed
        response.raw_headers = returned_headers(answer.headers)
        return response

    async def props(self, request: Request) -> Response | Proxy:
        """`/props`: those of the named model, or else the router's."""
        name = request.query_params.get("model", "")
        targets = self._view.now().by_name.get(name)
        if targets and targets[0].instance.kind != CHAT:  # the page hides it
            return JSONResponse({**ROUTER, "role": "model", "model_alias": name, "ui": False})
        return self._proxy if name else JSONResponse(ROUTER)

    async def feed(self, request: Request) -> Response:
        """Changes of the models' states."""
        return Events(self._changes(), media_type=EVENTS)

    async def _changes(self) -> AsyncIterator[str]:
        before = self._states()
        silent = KEEP_ALIVE_SECONDS  # a comment comes first: the page knows it is connected
        while True:
            now = self._states()
            events = list(_events(before, now))
            if not events and silent >= KEEP_ALIVE_SECONDS:
                events = [": \n\n"]
            for event in events:
                yield event
            silent = 0.0 if events else silent + POLL_SECONDS
            before = now
            await anyio.sleep(POLL_SECONDS)

    def _states(self) -> dict[str, str]:
        servers = self._view.now()
        return {name: router_status(targets) for name, targets in servers.by_name.items()}


def _events(before: dict[str, str], now: dict[str, str]) -> Iterator[str]:
    if before.keys() != now.keys():
        yield _event("", "models_reload")
    for name in now:
        if name in before and before[name] != now[name]:
            yield _event(name, "status_change", status=now[name])


def _event(model: str, event: str, **data: str) -> str:
    return f"data: {json.dumps({'model': model, 'event': event, 'data': data})}\n\n"
