"""The routes of Ollama's API."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import lru_cache, partial
from typing import Any

import msgspec
from anyio import to_thread
from msgspec import Struct
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pipeline.core import log
from pipeline.core.text import printable
from pipeline.serve.gateway.loading import order
from pipeline.serve.gateway.page import Events
from pipeline.serve.gateway.proxy import Proxy
from pipeline.serve.gateway.request_body import read_body, seconds
from pipeline.serve.gateway.servers import ANY, CHAT, EMBEDDING, Targets, find
from pipeline.serve.gateway.upstream import Engines, context_of
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
INLINE_BYTES = 65_536  # longer bodies are read in a thread
# What would change the models, and what to do instead.
REFUSED = {
    "/api/create": f"add an instance to {FILE}",
    "/api/copy": f"give the instance an alias in {FILE}",
    "/api/delete": f"take the instance out of {FILE}",
    "/api/push": "models are not uploaded from here",
    "/api/blobs/{digest}": f"name the model's file in {FILE}",
}

# Logs each text once, and again only after many others.
log_once = lru_cache(maxsize=256)(log.info)


class ForwardedPath(Struct, frozen=True):
    """A path that an instance of `kind` answers. `reply` makes the reader of the answer, from the
    request and the client's name of the model."""

    kind: str
    request: type[AnyRequest]
    translate: Callable[[Any], Translated]
    reply: Callable[[Any, str], Text | Vectors]


FORWARDED = {
    "/api/chat": ForwardedPath(
        CHAT, requests.Chat, requests.chat, lambda request, model: Text(model, is_chat=True)
    ),
    "/api/generate": ForwardedPath(
        CHAT, requests.Generate, requests.generate, lambda request, model: Text(model)
    ),
    "/api/embed": ForwardedPath(
        EMBEDDING,
        requests.Embed,
        lambda request: requests.embed(request.input),
        lambda request, model: Vectors(model, dimensions=request.dimensions),
    ),
    # the older form, for one text
    "/api/embeddings": ForwardedPath(
        EMBEDDING,
        requests.Embeddings,
        lambda request: requests.embed(request.prompt),
        lambda request, model: Vectors(model, is_single=True),
    ),
}


class Ollama:
    """Ollama's API before the instances of `proxy`."""

    def __init__(self, proxy: Proxy, engines: Engines) -> None:
        self._proxy, self._engines = proxy, engines
        self._pulls = Pulls(proxy.view.at, proxy.settings)

    def routes(self) -> Iterator[Route]:
        for path, endpoint in FORWARDED.items():
            yield Route(path, partial(self._forward, endpoint), methods=["POST"])
        yield Route("/api/version", JSONResponse({"version": VERSION}), methods=["GET"])
        yield Route("/api/tags", self._tags)
        yield Route("/api/ps", self._ps)
        yield Route("/api/show", self._show, methods=["POST"])
        yield Route("/api/pull", self._pull, methods=["POST"])
        for path, instead in REFUSED.items():
            yield Route(path, partial(_refuse, instead), methods=["HEAD", "POST", "DELETE"])

    async def _forward(self, endpoint: ForwardedPath, request: Request) -> Exchange:
        """What an instance answers. Raises Refused."""
        # no name for the body: it would stay until the model is known
        parsed, translated = await self._read(endpoint, await read_body(request))
        model, targets = await self._find(parsed, endpoint.kind)
        await self._report(targets, parsed.options or {})
        call = Call(
            path=translated.path,
            model=model,
            reply=endpoint.reply(parsed, parsed.model_name or model),
            streams=parsed.streams,
            keep_alive=seconds(parsed.keep_alive),
            is_loaded=any(target.is_ready for target in targets),
        )
        if call.unloads:
            sleeping = [target for target in targets if target.is_sleeping]
            await order(self._proxy, sleeping, loads=False)
        return Exchange(self._proxy, call, translated.body)

    async def _read(self, endpoint: ForwardedPath, body: bytes) -> tuple[AnyRequest, Translated]:
        """A request and its translation, off the loop where that takes long."""

        def read() -> tuple[AnyRequest, Translated]:
            request = requests.decoded(body, endpoint.request)
            return request, endpoint.translate(request)

        return read() if len(body) <= INLINE_BYTES else await to_thread.run_sync(read)

    async def _find(self, request: AnyRequest, kind: str) -> tuple[str, Targets]:
        """The gateway's name for a request's model, and its servers: Ollama's names have a tag,
        ours need not. Raises Refused."""
        servers, patterns = self._proxy.view.now(), self._proxy.settings.models
        name = request.model_name
        if name is None:
            targets = find(servers, None, kind, patterns)
            shared = set.intersection(*(set(target.names) for target in targets))
            return next(name for name in targets[0].names if name in shared), targets
        first = name if servers.named(name) else name.removesuffix(":latest")
        others = (name, f"{name}:latest", name.rpartition(":")[0])
        for spelling in (first, *filter(None, others)):
            with suppress(Refused):
                return spelling, find(servers, spelling, kind, patterns)
        if self._proxy.settings.pull:  # a pulled model goes by its reference too
            with suppress(Refused, OSError):
                wanted = reference(name)
                for target in await to_thread.run_sync(serving, wanted, servers.targets):
                    return target.name, servers.by_name[target.name]
        return name, find(servers, name, kind, patterns)  # raises the reason

    async def _report(self, targets: Targets, options: Mapping[str, Any]) -> None:
        """Log the options of a request that have no effect. The client's words get no line of
        their own in the log."""
        model = targets[0].name
        for name in requests.unknown(options):
            option = " ".join(printable(name).split())[:100]
            log_once(f"{model}: a request's option {option} is unknown, and ignored")
        if wanted := requests.context(options):
            details = (await self._engines.details(targets)).values()
            known = list(filter(None, map(context_of, details)))
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
        details = await self._engines.details(servers.targets)

        def entries() -> Iterator[dict[str, Any]]:
            gateways = Gateways(self._proxy.view.at)
            gateways.read()
            for name, targets in servers.by_name.items():
                for target in [target for target in targets if target.is_ready][:1]:
                    use = gateways.use(target.name)
                    yield models.running(name, target, details.get(target.name, {}), use)

        return _document({"models": await to_thread.run_sync(lambda: list(entries()))})

    async def _show(self, request: Request) -> Response:
        shown = requests.decoded(await _body(request), AnyRequest)
        name, targets = await self._find(shown, ANY)
        details = (await self._engines.details(targets)).get(targets[0].name, {})
        return _document(await to_thread.run_sync(models.shown, name, targets[0], details))

    async def _pull(self, request: Request) -> Response:
        """Have a model prepared where that is allowed; one that is here counts as pulled."""
        pulled = requests.decoded(await _body(request), requests.Streamed)
        if not pulled.model_name:
            raise Refused(400, 'the request names no "model"')
        settings = self._proxy.settings
        try:
            await self._find(pulled, ANY)
        except Refused as why:
            if not settings.pull:
                text = f"{why.message}; the gateway downloads no models: add an instance to {FILE}"
                raise Refused(403, f"{text}, or set pull = true in [gateway]") from None
        else:
            kind = LINES if pulled.streams else JSON
            return Response('{"status":"success"}\n', media_type=kind)
        pull = self._pulls.begin(reference(pulled.model_name).text)
        progress = pull.progress(settings.comment_seconds)
        if pulled.streams:
            return Events((lines([each]) async for each in progress), media_type=LINES)
        async for _ in progress:
            pass
        if pull.error:
            raise Refused(500, pull.error)
        return _document(SUCCESS)


async def _body(request: Request) -> bytes:
    """A small request's. Raises Refused."""
    return await read_body(request, INLINE_BYTES)


def _document(made: Mapping[str, Any]) -> Response:
    """Numbers that JSON does not have, as a header may hold them, become null."""
    return Response(msgspec.json.encode(made), media_type=JSON)


async def _refuse(instead: str, request: Request) -> Response:
    raise Refused(501, f"{request.scope['path']} is not supported: {instead}")
