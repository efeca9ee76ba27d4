"""What is loaded, and how clients change that: as llama-server's router and llama-swap have it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from anyio import to_thread
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from pipeline.core.errors import PipelineError, doitw
from pipeline.serve.guard.refusal import Refused
from pipeline.serve.server import DEMAND
from pipeline.serve.supervisor import control
from pipeline.serve.supervisor.state import ASLEEP, FAILED

from .demand import awaited
from .peers import ONLY, Peers
from .proxy import Proxy
from .request_body import parse_body, read_body
from .servers import ANY, Target, Targets, find, find_server

OWN_PAGES = ("none", "same-origin", "same-site")  # of Sec-Fetch-Site, which browsers send


class Loading:
    """The endpoints that load and unload: they order it, and the supervisor does it."""

    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy
        self._peers = Peers(proxy.settings, proxy.keys)

    async def scaling(self, request: Request) -> Response:
        """The requests that the gateways have for a server, for autoscalers. Raises Refused."""
        (target, *_) = find_server(self._proxy.view.now(), request.path_params["server"])
        requests = self._proxy.demand.requests(target)
        if ONLY not in request.query_params:
            requests = await self._peers.total(target.name, requests)
        return JSONResponse({"requests": requests, "gateway": self._peers.id})

    async def running(self, request: Request) -> Response:
        """What is loaded, or is being loaded or unloaded."""
        targets = self._proxy.view.now().targets
        return JSONResponse({"running": [_row(each) for each in targets if _is_loaded(each)]})

    async def load(self, request: Request) -> Response:
        """Have the named model loaded. One that is loaded already is no error: llama.cpp's page
        asks for it. Raises Refused."""
        targets = await self._named(request)
        if not any(target.is_ready for target in targets):
            target = awaited(targets) or _failed(targets)
            if target is None:
                first = targets[0]
                if first.problem:
                    raise Refused(507, f"{first.name} cannot be loaded: {first.problem}")
                raise Refused(400, f"{first.name} is not running; start it: {doitw('up')}")
            # Elsewhere one that waits may be asleep by the time it is seen.
            if target.state in (ASLEEP, FAILED) or not self._proxy.view.is_supervised:
                await order(self._proxy, [target], loads=True)
        return JSONResponse({"success": True})

    async def unload(self, request: Request) -> Response:
        """Have the named model unloaded; one that sleeps is stopped. Raises Refused."""
        targets = [target for target in await self._named(request) if _has_memory(target)]
        if not targets:
            raise Refused(400, "the model is not loaded")
        await order(self._proxy, targets, loads=False)
        return JSONResponse({"success": True})

    async def unload_all(self, request: Request) -> Response:
        """Have all models unloaded but those that are pinned. Raises Refused."""
        if request.headers.get("sec-fetch-site", "none") not in OWN_PAGES:  # an image, for example
            raise Refused(403, "pages of other sites may not unload models")
        targets = [
            target
            for target in self._proxy.view.now().targets
            if _has_memory(target) and not target.instance.pinned
        ]
        await order(self._proxy, targets, loads=False)
        return PlainTextResponse("OK")

    async def _named(self, request: Request) -> Targets:
        name = parse_body("", await read_body(request)).model
        if not name:
            raise Refused(400, 'the request names no "model"', "model_required")
        return find(self._proxy.view.now(), name, ANY, self._proxy.settings.models)


async def order(proxy: Proxy, targets: Sequence[Target], *, loads: bool) -> None:
    """Have the supervisor load or unload these servers; returns at once. Raises Refused."""
    names = [target.name for target in targets]
    if not names:
        return
    if not proxy.view.is_supervised:
        if not loads:
            why = "it runs elsewhere, and is unloaded there after a time without requests"
            raise Refused(400, f"{', '.join(names)}: {why}")
        for target in targets:
            proxy.load(target)
        return
    try:
        await to_thread.run_sync(lambda: control.order(proxy.view.at, names, loads=loads))
    except (PipelineError, OSError) as error:
        raise Refused(503, f"{', '.join(names)}: {error}") from None


def _failed(targets: Targets) -> Target | None:
    """A server that an order loads again."""
    on_demand = [target for target in targets if target.instance.start == DEMAND]
    return next((target for target in on_demand if target.state == FAILED), None)


def _is_loaded(target: Target) -> bool:
    """Whether it answers requests, or soon will, or did until now."""
    return target.is_ready or (target.is_pending and target.state != ASLEEP)


def _has_memory(target: Target) -> bool:
    return _is_loaded(target) or target.is_sleeping


def _row(target: Target) -> dict[str, Any]:
    """One entry of /running."""
    return {
        "model": target.name,
        "state": target.state,
        "ttl": target.instance.idle_timeout,
        "aliases": [name for name in target.names if name != target.name],
        "ready_since": target.ready_at,
        "pinned": target.instance.pinned,
    }
