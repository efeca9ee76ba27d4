"""llama.cpp's own page, for all instances: it takes the gateway for llama-server's router mode.

The files of the page come from an instance that has them. They are open to everyone, as
llama-server's own are; whatever the page asks for then wants the key.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterator

import anyio
import httpx2
from starlette.convertors import Convertor, register_url_convertor
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from pipeline.core.errors import doitw
from pipeline.serve.server import LLAMA_CPP

from .answers import Refused, status
from .fleet import Fleet, Target, View
from .proxy import Proxy
from .request_body import asked, read_body
from .routing import CHAT
from .upstream import NOT_PASSED_BACK, kept

# A file beside index.html, or in a folder of the page's own. No path of an API looks like it.
FILE = (
    r"(?:(?:_app|recommended-mcp)/(?:[\w-]{1,100}/){0,8})?"
    r"[\w-][\w.-]{0,200}\.(?:html|js|css|json|ico|svg|png|webmanifest)"
)
ASKED_WITH = (b"accept-encoding", b"if-none-match")
FILE_SECONDS = 5.0  # for each step: everyone may ask, so nothing may pile up
LOOK_SECONDS = 0.5
ALIVE_SECONDS = 15.0  # a feed says something so often, or what stands between would close it
ROUTER = {
    "role": "router",
    "model_alias": "llama-pipeline",
    "model_path": "none",
    "default_generation_settings": {"params": {}, "n_ctx": 0},
    "ui_settings": {},
    "build_info": "llama-pipeline gateway",
    "cors_proxy_enabled": False,
}


class PageFile(Convertor[str]):
    """The name of a file of the page, in a route."""

    regex = FILE

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("page_file", PageFile())


def is_open(scope: Scope) -> bool:
    """Whether a request is for the page itself, which everyone may have."""
    path = scope["path"]
    return scope["method"] in ("GET", "HEAD") and bool(re.fullmatch(f"/(?:{FILE})?", path))


def holders(fleet: Fleet) -> list[Target]:
    """The instances that may have the page, those for chat first."""
    ready = [one for one in fleet.targets if one.is_ready and one.instance.engine == LLAMA_CPP]
    return sorted(ready, key=lambda one: one.instance.kind != CHAT)


class Page:
    """The page's files, and what it asks of a router."""

    def __init__(self, view: View, proxy: Proxy) -> None:
        self._view = view
        self._proxy = proxy

    async def file(self, request: Request) -> Response:
        """A file of the page, as the first instance that has it gives it. Raises Refused."""
        for target in holders(self._view.now()):
            found = await self._ask(target, request)
            if found is not None:
                return found
        raise Refused(404, f"no instance that is ready has {request.scope['path']}")

    async def _ask(self, target: Target, request: Request) -> Response | None:
        headers = [one for one in request.headers.raw if one[0].lower() in ASKED_WITH]
        headers.append((b"connection", b"close"))
        url = f"{target.instance.url}{request.scope['path']}"
        limits = {"timeout": httpx2.Timeout(FILE_SECONDS).as_dict()}
        sent = httpx2.Request("GET", url, headers=headers, extensions=limits)
        try:
            answer = await self._proxy.client.send(sent, stream=True)
            try:
                # as it is: packed, mostly
                body = b"".join([block async for block in answer.aiter_raw()])
            finally:
                await answer.aclose()
        except (httpx2.TransportError, httpx2.InvalidURL):
            return None
        if answer.status_code >= 400:  # 415: it has it packed only, and the client cannot unpack
            return None
        kind = answer.headers.get("content-type", "")
        if request.scope["path"] == "/" and answer.status_code == 200 and "text/html" not in kind:
            return None
        given = Response(body, answer.status_code)
        given.raw_headers = [
            one
            for one in kept(answer.headers.raw, NOT_PASSED_BACK)
            if not one[0].startswith(b"access-control-")
        ]
        return given

    async def load(self, request: Request) -> Response:
        """What the page asks for before it asks a model that is not ready. Raises Refused."""
        name = asked("", await read_body(request)).model or ""
        group = self._view.now().groups.get(name)
        if not group or not any(one.is_ready or one.is_coming for one in group):
            raise Refused(400, f"{name} is not running; start it: {doitw('up')}")
        return JSONResponse({"success": True})  # it is on its way, and the feed says when

    async def nothing(self, request: Request) -> Response:
        """The tools of the server, or the answers that can be taken up again after a break: there
        are none."""
        return JSONResponse([])


class Feed:
    """What becomes of the models, as it happens."""

    def __init__(self, view: View) -> None:
        self._view = view

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = StreamingResponse(self._changes(), media_type="text/event-stream")
        try:
            await answer(scope, receive, send)
        except asyncio.CancelledError:  # uvicorn's, when it stops
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _changes(self) -> AsyncIterator[str]:
        before = self._states()
        silent = ALIVE_SECONDS  # a first word, so that the page knows that it is heard
        while True:
            now = self._states()
            events = list(_events(before, now))
            if not events and silent >= ALIVE_SECONDS:
                events = [": \n\n"]
            for event in events:
                yield event
            silent = 0.0 if events else silent + LOOK_SECONDS
            before = now
            await anyio.sleep(LOOK_SECONDS)

    def _states(self) -> dict[str, str]:
        return {name: status(group) for name, group in self._view.now().groups.items()}


class Props:
    """`/props`: of a model its own, without one the router's."""

    def __init__(self, view: View, proxy: Proxy) -> None:
        self._view = view
        self._proxy = proxy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        name = Request(scope).query_params.get("model", "")
        group = self._view.now().groups.get(name)
        if group and group[0].instance.kind != CHAT:  # the page leaves it out
            told = {**ROUTER, "role": "model", "model_alias": name, "ui": False}
            await JSONResponse(told)(scope, receive, send)
        elif name:
            await self._proxy(scope, receive, send)
        else:
            await JSONResponse(ROUTER)(scope, receive, send)


def _events(before: dict[str, str], now: dict[str, str]) -> Iterator[str]:
    if before.keys() != now.keys():
        yield _event("", "models_reload")
    for name in now:
        if name in before and before[name] != now[name]:
            yield _event(name, "status_change", status=now[name])


def _event(model: str, event: str, **data: str) -> str:
    return f"data: {json.dumps({'model': model, 'event': event, 'data': data})}\n\n"
