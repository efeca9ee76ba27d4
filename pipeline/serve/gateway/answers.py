"""Errors and lists in the form of the API that a client speaks."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from pipeline.serve.guard.refusal import Refused, error_body, is_anthropic
from pipeline.serve.supervisor.state import ASLEEP, FAILED

from .servers import RERANK, ServerList, Targets

# Statuses after which the same request would fail again, or kill another server, and what keeps
# OpenAI's and Anthropic's clients from sending it.
FINAL = (501, 502, 507)
NOT_AGAIN = {"x-should-retry": "false"}
RETRY_AFTER = 5  # seconds, for clients that get 503, unless the refusal knows better

# How llama-server says, with status 500, that a request is wrong.
NO_TEXT = b"does not support logits computation"
TOO_LONG = re.compile(rb"input \((\d+) tokens\) is too large to process.{0,80}size: (\d+)\)")
NO_INPUT = re.compile(rb"(image|audio|video) input is not supported")
NO_DOWNLOAD = re.compile(rb"cannot make GET request|Failed to download image")
OUT_OF_RANGE = re.compile(rb'"vector::_M_(default_append|range_check)')
# Of these its own words are told; 316 is an answer that is not UTF-8.
WRONG = re.compile(
    r"'\w+' is required|\[json\.exception\.(?!type_error\.316)|"
    "Failed to parse (tools|messages|tool_choice)|Unknown reasoning format|Invalid base64 value|"
    '"prompt" elements must be '
)
TELEMETRY = ("/api/event_logging/", "/api/claude_code/")  # Claude Code's, for Anthropic's API
Details = Mapping[str, Mapping[str, Any]]


def error(refused: Refused, request: Request) -> Response:
    """The answer to a request that was refused."""
    path = request.scope["path"]
    anthropic = is_anthropic(path, request.headers)
    body = error_body(refused.status, refused.message, refused.code, anthropic=anthropic)
    if path.startswith("/api/") and not path.startswith(TELEMETRY):  # Ollama's API
        body = {"error": refused.message}
    retry_after = str(refused.retry_after or RETRY_AFTER)
    headers = {"retry-after": retry_after} if refused.status == 503 else {}
    if refused.status in FINAL:
        headers |= NOT_AGAIN
    if refused.closes:
        headers["connection"] = "close"
    # Escaped to ASCII: a message may quote what is not valid UTF-8.
    return Response(json.dumps(body), refused.status, headers, "application/json")


def clients_fault(name: str, kind: str, text: bytes) -> str:
    """What is wrong with the request that an instance answered with status 500; empty where it is
    not the request, which clients may then send again."""
    if NO_TEXT in text and kind == RERANK:
        return f"{name} is a reranker, which writes no text; ask it at /v1/rerank"
    if NO_TEXT in text:
        return f"{name} is an embedding model, which writes no text; ask it at /v1/embeddings"
    if match := TOO_LONG.search(text):
        count, most = (f"{int(number):,}" for number in match.groups())
        return (
            f"the input has {count} tokens, and {name} takes {most} at most at once: send shorter "
            "parts, or raise ubatch_size in its server table where the model was trained for more"
        )
    if match := NO_INPUT.search(text):
        return (
            f"{name} takes no {match[1].decode()} input: it is served without a projector, which "
            "mmproj in its model table names where there is one"
        )
    if NO_DOWNLOAD.search(text):
        return f"{name} cannot download the image; send it as a data: URL"
    if OUT_OF_RANGE.search(text):
        return "a number in the request is out of range"
    message = _message(text)
    return message if WRONG.match(message) else ""


def without_reason(name: str, status: int) -> str:
    """What a client is told of an error of an instance that says nothing."""
    phrase = next((f" ({known.phrase})" for known in HTTPStatus if known == status), "")
    return f"{name} answered {status}{phrase} and gave no reason"


def _message(text: bytes) -> str:
    """What an instance's error says; empty where it has another form."""
    try:
        document = msgspec.json.decode(text, type=dict[str, dict[str, Any]])
    except (msgspec.MsgspecError, RecursionError):
        return ""
    return str(document.get("error", {}).get("message") or "")


def in_anthropics_form(status: int, text: bytes) -> bytes:
    """An instance's error: llama-server has OpenAI's form for every path. That a prompt is too long
    is said as Anthropic's API does, or its clients do not compact the conversation."""
    try:
        document = msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError):
        return text
    error = document.get("error")
    if document.get("type") == "error" or not isinstance(error, dict):
        return text
    message = str(error.get("message") or "")
    if error.get("type") == "exceed_context_size_error":
        counts = "{} tokens > {} maximum".format(error.get("n_prompt_tokens"), error.get("n_ctx"))
        message = f"prompt is too long: {counts}"
    return json.dumps(error_body(status, message, None, anthropic=True)).encode()


def utc(seconds: float) -> str:
    """A time since 1970 as JSON has it."""
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


def best_state(targets: Targets) -> str:
    """The best state among servers of one name."""
    ready = [target for target in targets if target.is_ready]
    pending = [target for target in targets if target.is_pending]
    return (ready or pending or targets)[0].state


def router_status(targets: Targets) -> str:
    """A model's state in the words of llama-server's router, which its page knows."""
    if any(target.is_ready for target in targets):
        return "loaded"
    if any(target.is_pending and target.state != ASLEEP for target in targets):
        return "loading"
    return "failed" if best_state(targets) == FAILED else "unloaded"


def model(name: str, targets: Targets, details: Details) -> dict[str, Any]:
    """An entry of the list of models for either API; `details`: what servers say of theirs."""
    since = int(min((target.ready_at for target in targets if target.ready_at), default=0))
    return {
        "id": name,
        "object": "model",
        "created": since,
        "owned_by": targets[0].instance.engine,
        "type": "model",
        "display_name": name,
        "created_at": utc(since),
        "lifecycle": "active",
        "kind": targets[0].instance.kind,
        "state": best_state(targets),
        "status": {"value": router_status(targets)},
        "instances": [target.name for target in targets],
        "aliases": [other for other in targets[0].names if other != name],
        **next((details[target.name] for target in targets if target.name in details), {}),
    }


def models(servers: ServerList, details: Details) -> dict[str, Any]:
    """The list of models: every name and alias once."""
    data = [model(name, targets, details) for name, targets in servers.by_name.items()]
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {}
    return {"object": "list", "data": data, "has_more": False, **ends}


def health(servers: ServerList, *, detailed: bool) -> tuple[int, dict[str, Any]]:
    """The status and body of /health: 200 where requests are answered, or held until they are."""
    ready = [target for target in servers.targets if target.is_ready]
    pending = [target for target in servers.targets if target.is_pending]
    fine = [target for target in pending if target.state == ASLEEP] + ready
    status = "loading" if pending else "unavailable"
    if fine:
        status = "ok" if len(fine) == len(servers.targets) else "degraded"
    body: dict[str, Any] = {"status": status}
    if detailed:
        body["instances"] = {
            target.name: {
                "state": target.state,
                **({"reason": target.short_reason} if target.short_reason else {}),
                **({"problem": target.problem} if target.problem else {}),
            }
            for target in servers.targets
        }
    return (200 if ready or pending else 503), body
