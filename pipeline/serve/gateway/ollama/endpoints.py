"""The routes of Ollama's API."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import suppress
from functools import lru_cache, partial
from typing import Any

import msgspec
from anyio import to_thread
from msgspec import Struct
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from pipeline.core import log
from pipeline.core.text import printable
from pipeline.serve.gateway.page import Events
from pipeline.serve.gateway.proxy import Proxy
from pipeline.serve.gateway.request_body import INLINE_BYTES, parse_body, read_body, seconds
from pipeline.serve.gateway.routing import ANY, CHAT, EMBEDDING, find
from pipeline.serve.gateway.servers import Targets
from pipeline.serve.guard.refusal import Refused
from pipeline.serve.supervisor.usage import Gateways

from . import models, requests
from .exchange import JSON, LINES, Call, Exchange
from .pull import SUCCESS, Pulls, reference, serving
from .replies import Text, Vectors, lines
from .requests import AnyRequest, Translated

# Clients ask for this version of Ollama, or a later one, before they use tools, thinking or
# /v1/responses.
VERSION = "0.13.5"
FILE = "the gateway's file of instances"
# What would change the models, and what to do instead.
REFUSED = {
    "/api/create": f"add an instance to {FILE}",
    "/api/copy": f"give the instance an alias in {FILE}",
    "/api/delete": f"take the instance out of {FILE}",
    "/api/push": "models are not uploaded from here",
    "/api/blobs/{digest}": f"name the model's file in {FILE}",
}

# What ready llama-servers say of their models, by instance.
Details = Callable[[Targets], Awaitable[Mapping[str, Mapping[str, Any]]]]
# Each text once, or again after many others.
log_once = lru_cache(maxsize=256)(log.info)


class Prepared(Struct, frozen=True):
    """A request, what an instance is asked, and what makes the reader of its answer."""

    request: AnyRequest
    asked: Translated
    reply: Callable[[str], Text | Vectors]
    streams: bool = False


Prepare = Callable[[bytes], Prepared]


def chat(body: bytes) -> Prepared:
    request = requests.decoded(body, requests.Chat)
    reply = partial(Text, is_chat=True)
    return Prepared(request, requests.chat(request), reply, request.stream is not False)


def generate(body: bytes) -> Prepared:
    request = requests.decoded(body, requests.Generate)
    reply = partial(Text, is_chat=False)
    return Prepared(request, requests.generate(request), reply, request.stream is not False)


def embed(body: bytes) -> Prepared:
    request = requests.decoded(body, requests.Embed)
    reply = partial(Vectors, dimensions=request.dimensions)
    return Prepared(request, requests.embed(request.input), reply)


def embeddings(body: bytes) -> Prepared:
    """The older form, for one text."""
    request = requests.decoded(body, requests.Embeddings)
    return Prepared(request, requests.embed(request.prompt), partial(Vectors, is_single=True))


class Ollama:
    """Ollama's API before the instances of `proxy`."""

    def __init__(self, proxy: Proxy, details: Details) -> None:
        self._proxy, self._details = proxy, details
        self._pulls = Pulls(proxy.view.at, proxy.settings)

    def routes(self) -> Iterator[Route]:
        for path, kind, prepare in (
            ("/api/chat", CHAT, chat),
            ("/api/generate", CHAT, generate),
            ("/api/embed", EMBEDDING, embed),
            ("/api/embeddings", EMBEDDING, embeddings),
        ):
            yield Route(path, _Forwarded(self, kind, prepare), methods=["POST"])
        yield Route("/api/version", JSONResponse({"version": VERSION}), methods=["GET"])
        yield Route("/api/tags", self._tags)
        yield Route("/api/ps", self._ps)
        yield Route("/api/show", self._show, methods=["POST"])
        yield Route("/api/pull", self._pull, methods=["POST"])
        for path, instead in REFUSED.items():
            yield Route(path, partial(_refuse, instead), methods=["HEAD", "POST", "DELETE"])

    async def begin(
        self, prepared: Prepared, kind: str, scope: Scope, receive: Receive, send: Send
    ) -> Exchange:
        """The exchange that will answer a request. Raises Refused."""
        request, asked = prepared.request, prepared.asked
        model, targets = await self._find(request, kind)
        await self._report(model, targets, request.options or {})
        call = Call(
            path=asked.path,
            model=model,
            reply=prepared.reply(request.asked_for or model),
            streams=prepared.streams,
            keep_alive=seconds(request.keep_alive),
            is_loaded=any(target.is_ready for target in targets),
        )
        return Exchange(self._proxy, call, asked.body, scope, receive, send)

    async def _find(self, request: AnyRequest, kind: str) -> tuple[str, Targets]:
        """The name by which the gateway knows a request's model, and its servers: Ollama's names
        have a tag, which ours need not have. Raises Refused."""
        servers, patterns = self._proxy.view.now(), self._proxy.settings.models
        asked = request.asked_for
        if asked is None:
            targets = find(servers, None, kind, patterns)
            shared = set.intersection(*(set(target.names) for target in targets))
            return next(name for name in targets[0].names if name in shared), targets
        names = (asked, asked.removesuffix(":latest"), f"{asked}:latest", asked.rpartition(":")[0])
        for name in filter(None, names):
            with suppress(Refused):
                return name, find(servers, name, kind, patterns)
        if self._proxy.settings.pull:  # what was pulled is asked for by its reference
            with suppress(Refused, OSError):
                wanted = reference(asked)
                for target in await to_thread.run_sync(serving, wanted, servers.targets):
                    return target.name, servers.by_name[target.name]
        return asked, find(servers, asked, kind, patterns)  # which says why not

    async def _report(self, model: str, targets: Targets, options: Mapping[str, Any]) -> None:
        """Log the options of a request that have no effect."""
        for name in requests.unknown(options):
            log_once(f"{model}: a request's option {printable(name)[:100]} is unknown, and ignored")
        if wanted := requests.context(options):
            said = (await self._details(targets)).values()
            known = [each["meta"]["n_ctx"] for each in said if each.get("meta", {}).get("n_ctx")]
            if known and wanted > min(known):
                log_once(
                    f"{model}: a request's num_ctx of {wanted:,} is ignored, the context has "
                    f"{min(known):,} tokens; a larger one is set by ctx_size in its server table"
                )

    async def _tags(self, request: Request) -> Response:
        """All names and aliases."""
        names = self._proxy.view.now().by_name

        def entries() -> list[dict[str, Any]]:
            return [models.listed(name, targets[0]) for name, targets in names.items()]

        return _document({"models": await to_thread.run_sync(entries)})

    async def _ps(self, request: Request) -> Response:
        """Those that are ready."""
        servers = self._proxy.view.now()
        said = await self._details(servers.targets)

        def entries() -> Iterator[dict[str, Any]]:
            gateways = Gateways(self._proxy.view.at)
            gateways.read()
            for name, targets in servers.by_name.items():
                for target in [target for target in targets if target.is_ready][:1]:
                    use = gateways.use(target.name)
                    yield models.running(name, target, said.get(target.name, {}), use)

        return _document({"models": await to_thread.run_sync(lambda: list(entries()))})

    async def _show(self, request: Request) -> Response:
        shown = requests.decoded(await _body(request), AnyRequest)
        name, targets = await self._find(shown, ANY)
        said = (await self._details(targets)).get(targets[0].name, {})
        return _document(await to_thread.run_sync(models.shown, name, targets[0], said))

    async def _pull(self, request: Request) -> Response:
        """Have a model prepared where that is allowed; one that is here counts as pulled."""
        pulled = requests.decoded(await _body(request), requests.Pull)
        settings, is_here = self._proxy.settings, True
        try:
            await self._find(pulled, ANY)
        except Refused as why:
            if not settings.pull:
                text = f"{why.message}; the gateway downloads no models: add an instance to {FILE}"
                raise Refused(403, f"{text}, or set pull = true in [gateway]") from None
            is_here = False
        if is_here:
            kind = JSON if pulled.stream is False else LINES
            return Response('{"status":"success"}\n', media_type=kind)
        pull = self._pulls.begin(reference(pulled.asked_for or "").text)
        progress = pull.progress(settings.comment_seconds)
        if pulled.stream is not False:
            return Events((lines([each]) async for each in progress), media_type=LINES)
        async for _ in progress:
            pass
        if pull.error:
            raise Refused(500, pull.error)
        return _document(SUCCESS)


class _Forwarded:
    """The ASGI application of a path that an instance answers."""

    def __init__(self, api: Ollama, kind: str, prepare: Prepare) -> None:
        self._api, self._kind, self._prepare = api, kind, prepare

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            # no name for the body, nor for what is made of it: they would stay until the end
            exchange = await self._api.begin(
                await self._prepared(request), self._kind, scope, receive, send
            )
        except ClientDisconnect:
            return
        await exchange.run()

    async def _prepared(self, request: Request) -> Prepared:
        body = await read_body(request)
        if len(body) <= INLINE_BYTES:
            return self._read(body)
        return await to_thread.run_sync(self._read, body)

    def _read(self, body: bytes) -> Prepared:
        """Raises Refused."""
        parse_body(JSON, body)  # for its bounds
        return self._prepare(body)


async def _body(request: Request) -> bytes:
    """A small request's. Raises Refused."""
    body = await read_body(request, INLINE_BYTES)
    parse_body(JSON, body)
    return body


def _document(made: Mapping[str, Any]) -> Response:
    """Numbers that JSON does not have, as a header may hold them, become null."""
    return Response(msgspec.json.encode(made), media_type=JSON)


async def _refuse(instead: str, request: Request) -> Response:
    raise Refused(501, f"{request.scope['path']} is not supported: {instead}")
