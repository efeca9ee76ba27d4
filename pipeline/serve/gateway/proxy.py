"""A request sent on to an instance, and its answer passed back as it comes.

A request waits while its instance loads. It goes to the ready instance with the fewest requests
under way. Until the first byte of an answer has come it may be sent to another instance: always
where none could be reached or one still loads, and once where an instance died over it, because
a request that kills its server must not kill them all. After the first byte it is never repeated.
A client that goes away ends the wait, or the request at the instance, at once.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count

import anyio
import httpx2
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive, Scope, Send

from pipeline.core import log

from .answers import Refused, error_body, is_anthropic
from .counters import Counters
from .fleet import Group, Target, View
from .keys import Keys
from .request_body import Asked, asked, asked_in_query, read_body
from .routing import ANY, PATHS, find
from .settings import GatewaySettings
from .upstream import NOT_PASSED_BACK, Again, ask, first_block, kept, told

POLL_SECONDS = 0.05
REST_SECONDS = 0.25  # an instance that could not be reached is left alone for so long
DEAD_SECONDS = 5.0  # nothing reaches an instance that is said to be ready: it is not
MOST_SENDS = 2  # how often a request is sent where an instance dies over it
CLIENT_GONE = 499


@dataclass(slots=True)
class _Call:
    """A request under way."""

    request: Request
    asked: Asked
    send: Send
    began: float = field(default_factory=time.monotonic)
    status: int = CLIENT_GONE
    instance: str = ""
    sends: int = 0
    refusals: dict[str, str] = field(default_factory=dict)  # by instance, why it gave no answer

    @property
    def path(self) -> str:
        return str(self.request.scope["path"])


class Proxy:
    """The ASGI application of the paths that are sent on. `client` is set while it runs."""

    client: httpx2.AsyncClient

    def __init__(
        self, view: View, keys: Keys, counters: Counters, settings: GatewaySettings
    ) -> None:
        self._view = view
        self._keys = keys
        self._counters = counters
        self._settings = settings
        self._resting: dict[str, float] = {}  # until when, by instance
        self._turns: Counter[str] = Counter()
        self._turn = count(1)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            body = await read_body(request)
        except ClientDisconnect:
            return
        if request.method == "GET":
            wish = asked_in_query(request)
        else:
            wish = asked(request.headers.get("content-type", ""), body)
        call = _Call(request, wish, send)
        refused = None
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(_until_gone, receive, group.cancel_scope)
                try:
                    await self._answer(call)
                except Refused as why:  # not through the group, which would wrap it
                    refused = why
                group.cancel_scope.cancel()
        except asyncio.CancelledError:  # uvicorn's, when it stops and its patience ends
            if call.status == CLIENT_GONE:
                refused = Refused(503, "the gateway stops")
        finally:
            if not refused:
                self._counters.requests[call.instance, call.status] += 1
            self._counters.received[call.instance] += len(body)
        if refused:
            raise refused

    async def _answer(self, call: _Call) -> None:
        """Send the request on until there is an answer. Raises Refused."""
        unreached = None  # since when nothing that is said to be ready could be reached
        while True:
            group = self._find(call)
            target = self._choose(group)
            if target:
                try:
                    await self._send(call, target)
                    return
                except Again as why:
                    self._note(call, target, why)
                    unreached = None if why.loads else unreached
                    continue
            now = time.monotonic()
            if any(one.is_coming for one in group):
                unreached = None
            elif unreached is None:
                unreached = now
            self._give_up(call, group, unreached)
            self._counters.held += 1
            try:
                await anyio.sleep(POLL_SECONDS)
            finally:
                self._counters.held -= 1

    def _find(self, call: _Call) -> Group:
        kind = PATHS.get(call.path, ANY)
        return find(self._view.now(), call.asked.model, kind, self._settings.models)

    def _choose(self, group: Group) -> Target | None:
        """The ready instance with the fewest requests under way; among equals in turn."""
        now = time.monotonic()
        ready = [one for one in group if one.is_ready and self._resting.get(one.name, 0) <= now]
        if not ready:
            return None
        busy = self._counters.in_flight
        target = min(ready, key=lambda one: (busy[one.name], self._turns[one.name]))
        self._turns[target.name] = next(self._turn)
        return target

    def _note(self, call: _Call, target: Target, why: Again) -> None:
        """An instance gave no answer. Raises Refused where no other is to be asked."""
        self._resting[target.name] = time.monotonic() + REST_SECONDS
        if call.refusals.get(target.name) != str(why):
            self._failed(target, call, str(why))
        call.refusals[target.name] = str(why)
        call.sends += why.sent
        if call.sends >= MOST_SENDS:
            raise Refused(502, f"{target.name} {why}; no other is asked")

    def _give_up(self, call: _Call, group: Group, unreached: float | None) -> None:
        """Raise Refused where waiting leads to nothing, or has lasted long enough."""
        now = time.monotonic()
        ready = any(one.is_ready for one in group)
        if unreached is not None and (not ready or now - unreached > DEAD_SECONDS):
            raise Refused(503, f"no instance answers: {_reasons(group, call.refusals)}")
        hold = self._settings.hold_timeout
        if hold is None:
            hold = max(one.instance.ready_timeout for one in group)
        if now - call.began > hold:
            why = _reasons(group, call.refusals)
            raise Refused(503, f"no instance became ready within {hold:g} s: {why}")

    async def _send(self, call: _Call, target: Target) -> None:
        """Have one instance answer. Raises Again where it gave not one byte."""
        call.instance = target.name
        self._counters.in_flight[target.name] += 1
        try:
            response = await ask(self.client, target, call.request, call.asked, self._keys)
            try:
                await self._pass_back(call, target, response)
            finally:
                with anyio.CancelScope(shield=True):
                    await response.aclose()
        finally:
            self._counters.in_flight[target.name] -= 1

    async def _pass_back(self, call: _Call, target: Target, response: httpx2.Response) -> None:
        blocks = response.aiter_raw()
        first = await first_block(blocks)
        if response.status_code == 503 and b"Loading model" in first:
            raise Again("still loads its model", loads=True)
        self._counters.first_byte(target.name, time.monotonic() - call.began)
        call.status = response.status_code
        headers = kept(response.headers.raw, NOT_PASSED_BACK)
        headers = [one for one in headers if not one[0].startswith(b"access-control-")]
        await call.send(
            {"type": "http.response.start", "status": response.status_code, "headers": headers}
        )
        try:
            await self._pass_block(call, target, first)
            async for block in blocks:
                await self._pass_block(call, target, block)
        except httpx2.TransportError as why:
            self._failed(target, call, f"ended amid its answer ({told(why)})")
            await self._break_off(call, target, response)
            return
        await call.send(_block(b"", more=False))

    async def _pass_block(self, call: _Call, target: Target, block: bytes) -> None:
        self._counters.sent[target.name] += len(block)
        await call.send(_block(block, more=True))

    async def _break_off(self, call: _Call, target: Target, response: httpx2.Response) -> None:
        """Tell the client that its answer is cut: as an event where it reads events. Otherwise
        the body stays open, and uvicorn closes the connection."""
        kind = response.headers.get("content-type", "")
        if not kind.startswith("text/event-stream") or "content-encoding" in response.headers:
            return
        anthropic = is_anthropic(call.path, call.request.headers)
        error = error_body(502, f"{target.name} ended amid its answer", None, anthropic=anthropic)
        event = "event: error\n" if anthropic else ""
        data = f"\n\n{event}data: {json.dumps(error)}\n\n"
        await call.send(_block(data.encode(), more=False))

    def _failed(self, target: Target, call: _Call, why: str) -> None:
        self._counters.failures[target.name] += 1
        log.info(f"{call.request.method} {call.path}: {target.name} {why}")


async def _until_gone(receive: Receive, scope: anyio.CancelScope) -> None:
    """Cancel the answer once the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


def _block(body: bytes, *, more: bool) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": more}


def _reasons(group: Group, refusals: Mapping[str, str]) -> str:
    """Each instance, with its state or what became of asking it."""
    reasons = []
    for one in group:
        said = f"is {one.state}: {one.why}" if one.why else f"is {one.state}"
        reasons.append(f"{one.name} {refusals.get(one.name, said) if one.is_ready else said}")
    return "; ".join(reasons)
