"""A request forwarded to a server, and its answer streamed back.

A request waits while its server loads. It goes to the ready server with the fewest requests in
flight. Until the first byte of an answer it may be retried on another server: always where a
server could not be reached or is still loading, and once where a server died over it, because a
request that kills its server must not kill them all. After the first byte it is never repeated.
A client that waits for a stream gets comments meanwhile.
When the client disconnects, the wait, or the request to the server, ends at once.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import count

import anyio
from msgspec import Struct, field
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from pipeline.core import log
from pipeline.serve.guard.refusal import Refused, error_body, is_anthropic

from . import answers
from .connection import Connection
from .counters import GENERATED, PROMPT, Counters, History, Recent, Tail, cut
from .demand import Demand, awaited
from .renaming import Rename, Renamed, rename_document, renaming
from .request_body import RequestBody, parse_body, read_body
from .servers import ANY, CHAT, PATHS, Target, Targets, View, find, find_server, split_path
from .settings import GatewaySettings
from .upstream import EVENTS, UNBUFFERED, Answer, Keys, NoAnswer, forward, returned_headers

REST_SECONDS = 0.25  # a server that could not be reached is not tried again before
LOOK_SECONDS = 0.25  # between two looks of a request that waits, where no state changes
DEAD_SECONDS = 5.0  # a ready server that cannot be reached for so long is dead
MAX_SENDS = 2  # of a request over which servers die
CLIENT_GONE = 499
FIRST_ERROR = 400
CANNOT = 501  # of an instance without what a request needs, such as embeddings
JSON = "application/json"


class ForwardedRequest(Struct):
    """A request in flight."""

    request: Request
    path: str  # at the server
    body: RequestBody
    send: Send
    server: str = ""  # the only one that is meant, else any that has the model
    began: float = field(default_factory=time.monotonic)
    status: int = CLIENT_GONE
    instance: str = ""
    sends: int = 0
    stream_began: bool = False  # with status 200, while the request waited
    last_sign: float = 0.0  # when the client last got anything
    failures: dict[str, str] = field(default_factory=dict)  # by server, why it did not answer
    tail: Tail = field(default_factory=Tail)  # of the answer


class Proxy:
    """The ASGI application of the paths that are forwarded. Raises Refused, and ClientDisconnect
    where a client leaves before its request is complete."""

    def __init__(
        self, view: View, keys: Keys, counters: Counters, settings: GatewaySettings
    ) -> None:
        self.view = view
        self.keys = keys
        self.counters = counters
        self.settings = settings
        self.demand = Demand(view, counters.in_flight)
        self.history = History()
        self._resting: dict[str, float] = {}  # by server, until when it is not tried
        self._last_used: Counter[str] = Counter()
        self._uses = count(1)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        body = await read_body(request)
        server, path = request.path_params.get("server", ""), scope["path"]
        if server:
            rest = request.path_params["path"]
            server, path = split_path(self.view.now(), f"{server}/{rest}")
            parsed = RequestBody(body)
        elif request.method == "GET":
            parsed = RequestBody(b"", request.query_params.get("model") or None)
        else:
            parsed = parse_body(request.headers.get("content-type", ""), body)
        inspect = self.settings.inspect
        call = ForwardedRequest(request, path, parsed, send, server, tail=Tail(whole=inspect))
        refused = None
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(_until_gone, receive, group.cancel_scope)
                try:
                    await self._answer(call)
                except Refused as why:  # not through the group, which would wrap it
                    if call.stream_began:
                        await self._end_stream(call, why.status, why.message)
                    else:
                        refused = why
                group.cancel_scope.cancel()
        except asyncio.CancelledError:  # by uvicorn, at the end of its shutdown timeout
            if call.status == CLIENT_GONE:
                refused = Refused(503, "the gateway is shutting down")
        finally:
            self.demand.waits_no_more(id(call))
            if not refused:
                self.counters.requests[call.instance, call.status] += 1
            self.counters.received[call.instance] += len(body)
            if call.instance:
                seconds = time.monotonic() - call.began
                self.history.add(
                    Recent(
                        at=time.time() - seconds,
                        model=call.body.model,
                        instance=call.instance,
                        path=path,
                        status=refused.status if refused else call.status,
                        seconds=seconds,
                        prompt_tokens=call.tail.number(PROMPT),
                        tokens=call.tail.number(GENERATED),
                        asked=cut(body) if inspect else None,
                        answered=call.tail.text,
                    )
                )
        if refused:
            raise refused

    def load(self, target: Target) -> None:
        """Have whoever runs a server elsewhere load it, with no request for it yet."""
        self.demand.order(target)

    async def _answer(self, call: ForwardedRequest) -> None:
        """Try servers until one answers. Raises Refused."""
        unreachable_since = None  # no ready server could be reached
        while True:
            targets = self._find(call)
            target = self._choose(call, targets)
            if target:
                try:
                    await self._send(call, target)
                    return
                except NoAnswer as failure:
                    self._note(call, target, failure)
                    unreachable_since = None if failure.loads else unreachable_since
                    continue
            now = time.monotonic()
            if self._is_coming(call, targets):
                unreachable_since = None
            elif unreachable_since is None:
                unreachable_since = now
            self._require_hope(call, targets, unreachable_since)
            self.demand.waits(id(call), awaited(targets), now - call.began)
            await self._keep_waiting(call, now)
            self.counters.held += 1
            try:
                with anyio.move_on_after(LOOK_SECONDS):
                    await self._changed(call)
            finally:
                self.counters.held -= 1

    def _find(self, call: ForwardedRequest) -> Targets:
        if call.server:
            return find_server(self.view.now(), call.server)
        kind = PATHS.get(call.path, ANY)
        return find(self.view.now(), call.body.model, kind, self.settings.models)

    def _choose(self, call: ForwardedRequest, targets: Targets) -> Target | None:
        """The server to send it to now; None where none is ready."""
        return self._least_busy([target for target in targets if target.is_ready])

    def _least_busy(self, targets: Sequence[Target]) -> Target | None:
        """The one with the fewest requests in flight; of those the least recently used."""
        now = time.monotonic()
        usable = [target for target in targets if self._resting.get(target.name, 0) <= now]
        if not usable:
            return None
        busy = self.counters.in_flight
        target = min(usable, key=lambda target: (busy[target.name], self._last_used[target.name]))
        self._last_used[target.name] = next(self._uses)
        return target

    def _is_coming(self, call: ForwardedRequest, targets: Targets) -> bool:
        """Whether a server is on its way, so that it is no sign of trouble that none is ready."""
        return any(target.is_pending for target in targets)

    async def _changed(self, call: ForwardedRequest) -> None:
        """Return once it is worth choosing again."""
        await self.demand.changed.wait()

    def _note(self, call: ForwardedRequest, target: Target, failure: NoAnswer) -> None:
        """Remember that a server did not answer. Raises Refused where no other may be tried."""
        reason = str(failure)
        self._resting[target.name] = time.monotonic() + REST_SECONDS
        if call.failures.get(target.name) != reason:
            self._failed(target, call, reason)
        call.failures[target.name] = reason
        call.sends += failure.sent
        if call.sends >= MAX_SENDS:
            raise Refused(502, f"{target.name} {reason}; the request is not retried")

    def _require_hope(
        self, call: ForwardedRequest, targets: Targets, unreachable_since: float | None
    ) -> None:
        """Raise Refused where waiting is useless, or has lasted too long."""
        if not any(target.is_ready or target.is_pending for target in targets):
            for target in targets:
                if target.problem:
                    raise Refused(507, f"{target.name} cannot be loaded: {target.problem}")
        if call.request.query_params.get("autoload") in ("false", "0"):  # from llama.cpp's page
            raise Refused(400, "the model is not loaded")
        now = time.monotonic()
        ready = any(target.is_ready for target in targets)
        if unreachable_since is not None and (not ready or now - unreachable_since > DEAD_SECONDS):
            reasons = _reasons(targets, call.failures)
            raise Refused(503, f"no server answers: {reasons}", retry_after=_retry_after(targets))
        hold = self.settings.hold_timeout
        if hold is None:
            hold = max(target.instance.ready_timeout for target in targets)
        if now - call.began > hold:
            reasons = _reasons(targets, call.failures)
            raise Refused(503, f"no server became ready within {hold:g} s: {reasons}")

    async def _send(self, call: ForwardedRequest, target: Target) -> None:
        """Have one server answer. Raises NoAnswer where not a byte came."""
        call.instance = target.name
        call.request.scope["waited"] = time.monotonic() - call.began  # seconds, for a ready server
        self.counters.in_flight[target.name] += 1
        self.demand.waits_no_more(id(call))
        self.demand.used(target)
        try:
            answer = await self._forward(call, target)
            try:
                await self._pass_back(call, target, answer)
            finally:
                answer.close()
        finally:
            self.counters.in_flight[target.name] -= 1
            keep = call.request.scope.get("keep_alive", call.body.keep_alive)
            self.demand.used(target, keep)

    async def _forward(self, call: ForwardedRequest, target: Target) -> Answer:
        """The server's answer, once its body begins. Raises NoAnswer."""
        return await forward(target, call.request, call.path, call.body, self.keys)

    async def _pass_back(self, call: ForwardedRequest, target: Target, answer: Answer) -> None:
        if answer.status == 503 and b"Loading model" in answer.kept:
            raise NoAnswer("is still loading its model", loads=True)
        if answer.status == 401 and target.instance.api_key_file:
            # not the client's key, which the gateway has found right
            why = "refuses the first key of its file; if that has changed, start the server again"
            raise Refused(502, f"{target.name} {why}")
        kind = target.instance.kind
        if answer.status == 500 and (why := answers.clients_fault(target.name, kind, answer.kept)):
            raise Refused(400, why)
        if answer.status >= FIRST_ERROR and not (answer.kept or call.request.method == "HEAD"):
            raise Refused(answer.status, answers.without_reason(target.name, answer.status))
        rename = renaming(target, call.body.model) if not answer.is_compressed else None
        if rename and answer.length is not None:
            await answer.change(partial(rename_document, rename))
            rename = None
        is_error = answer.status >= FIRST_ERROR and answer.has_type(JSON)
        if is_error and _is_anthropic(call) and not answer.is_compressed:
            await answer.change(partial(answers.in_anthropics_form, answer.status))
        self.counters.first_byte(target.name, time.monotonic() - call.began)
        call.status = answer.status
        if not call.stream_began:
            headers = returned_headers(answer.headers)
            if answer.status == CANNOT:
                headers += [(key.encode(), x.encode()) for key, x in answers.NOT_AGAIN.items()]
            await call.send(
                {"type": "http.response.start", "status": answer.status, "headers": headers}
            )
        elif answer.status != 200 or not answer.is_events:
            await answer.ended.wait()
            text = answer.kept.decode("utf-8", "replace")
            await self._end_stream(call, answer.status, f"{target.name} answered: {text}")
            return
        await self._pass_body(call, target, answer, rename)

    async def _pass_body(
        self, call: ForwardedRequest, target: Target, answer: Answer, rename: Rename | None
    ) -> None:
        """Write the rest of the answer to the client as it comes."""
        connection: Connection = call.request.scope["connection"]
        with connection.body(answer.transport, answer.status, answer.length) as body:

            def write(block: bytes) -> None:
                self.counters.sent[target.name] += len(block)
                call.tail.add(block)
                body.write(block)

            lines = Renamed(write, rename) if rename else None
            await answer.pass_to(lines.write if lines else write)
            if answer.failure:
                self._failed(target, call, f"broke off its answer ({answer.failure})")
                if not answer.is_events:
                    return  # and uvicorn closes the connection
                text = f"{target.name} broke off its answer"  # so it is incomplete
                write(b"\n\n" + _event(call, 502, text))
            elif lines:
                lines.end()
            body.end()
        await call.send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _keep_waiting(self, call: ForwardedRequest, now: float) -> None:
        """Give a client that waits for a stream a sign of life from time to time, lest it or a
        proxy in between gives up. The answer's status is 200 from then on."""
        is_stream = call.body.streams and PATHS.get(call.path) == CHAT
        if not call.request.scope.get("streams", is_stream):
            return
        if now - max(call.began, call.last_sign) < self.settings.comment_seconds:
            return
        if not call.stream_began:
            headers = [(b"content-type", EVENTS.encode()), (b"cache-control", b"no-cache")]
            headers.append(UNBUFFERED)
            await call.send({"type": "http.response.start", "status": 200, "headers": headers})
        call.stream_began, call.last_sign = True, now
        comment = b": waiting until the model is loaded\n\n"
        await call.send({"type": "http.response.body", "body": comment, "more_body": True})

    async def _end_stream(self, call: ForwardedRequest, status: int, message: str) -> None:
        """End a stream that has begun with an error."""
        call.status = status
        await call.send({"type": "http.response.body", "body": _event(call, status, message)})

    def _failed(self, target: Target, call: ForwardedRequest, reason: str) -> None:
        self.counters.failures[target.name] += 1
        log.info(f"{call.request.method} {call.path}: {target.name} {reason}")


def _event(call: ForwardedRequest, status: int, message: str) -> bytes:
    """An error as an event of a stream."""
    anthropic = _is_anthropic(call)
    error = error_body(status, message, None, anthropic=anthropic)
    event = "event: error\n" if anthropic else ""
    return f"{event}data: {json.dumps(error)}\n\n".encode()


def _is_anthropic(call: ForwardedRequest) -> bool:
    return not call.server and is_anthropic(call.path, call.request.headers)


async def _until_gone(receive: Receive, scope: anyio.CancelScope) -> None:
    """Cancel the answer once the client has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


def _retry_after(targets: Targets) -> int | None:
    """Seconds until one that has failed may be loaded again; None where none will be."""
    times = [target.retry_at for target in targets if target.retry_at]
    return max(1, math.ceil(min(times) - time.monotonic())) if times else None


def _reasons(targets: Targets, failures: Mapping[str, str]) -> str:
    """Each server with its state, or with its failure where it should be ready."""
    reasons = []
    for target in targets:
        state = f"is {target.state}" + (f": {target.short_reason}" if target.short_reason else "")
        reason = failures.get(target.name, state) if target.is_ready else state
        reasons.append(f"{target.name} {reason}")
    return "; ".join(reasons)
