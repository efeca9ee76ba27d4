"""Errors and lists in the forms of both APIs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from starlette.responses import Response

from pipeline.serve.supervisor.state import FAILED

from .fleet import Fleet, Group

RETRY_AFTER = "5"  # seconds, for who is told that nothing is ready

# By status: OpenAI's type, Anthropic's type.
TYPES = {
    400: ("invalid_request_error", "invalid_request_error"),
    401: ("authentication_error", "authentication_error"),
    404: ("not_found_error", "not_found_error"),
    405: ("invalid_request_error", "invalid_request_error"),
    413: ("invalid_request_error", "request_too_large"),
    415: ("invalid_request_error", "invalid_request_error"),
}
OTHERWISE = ("server_error", "api_error")


class Refused(Exception):
    """A request that the gateway answers itself, with an error."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code


def is_anthropic(path: str, headers: Mapping[str, str]) -> bool:
    """Whether a request is one of Anthropic's API."""
    return path.startswith("/v1/messages") or "anthropic-version" in headers


def error_body(status: int, message: str, code: str | None, *, anthropic: bool) -> dict[str, Any]:
    """An error as one of the two APIs tells it."""
    openai_type, anthropic_type = TYPES.get(status, OTHERWISE)
    if anthropic:
        return {"type": "error", "error": {"type": anthropic_type, "message": message}}
    param = "model" if code == "model_not_found" else None
    told = {"message": message, "type": openai_type, "param": param, "code": code or status}
    return {"error": told}


def error(refused: Refused, *, anthropic: bool) -> Response:
    """The answer to a request that was refused."""
    body = error_body(refused.status, refused.message, refused.code, anthropic=anthropic)
    headers = {"retry-after": RETRY_AFTER} if refused.status == 503 else {}
    if refused.status == 413:
        headers["connection"] = "close"  # the rest of the body is not read
    # In ASCII: a message may quote what is no valid text.
    return Response(json.dumps(body), refused.status, headers, "application/json")


def state_of(group: Group) -> str:
    """The best state among instances of one name."""
    best = [one for one in group if one.is_ready] or [one for one in group if one.is_coming]
    return (best or group)[0].state


def status(group: Group) -> str:
    """How a model is, in the words of llama-server's router, which its page knows."""
    if any(one.is_ready for one in group):
        return "loaded"
    if any(one.is_coming for one in group):
        return "loading"
    return "failed" if state_of(group) == FAILED else "unloaded"


def model(name: str, group: Group) -> dict[str, Any]:
    """One entry of the list of models, with what clients of either API read."""
    since = int(min((one.ready_at for one in group if one.ready_at), default=0))
    return {
        "id": name,
        "object": "model",
        "created": since,
        "owned_by": group[0].instance.engine,
        "type": "model",
        "display_name": name,
        "created_at": datetime.fromtimestamp(since, UTC).isoformat().replace("+00:00", "Z"),
        "lifecycle": "active",
        "kind": group[0].instance.kind,
        "state": state_of(group),
        "status": {"value": status(group)},
        "instances": [one.name for one in group],
    }


def models(fleet: Fleet) -> dict[str, Any]:
    """The list of models: every name and alias once."""
    data = [model(name, group) for name, group in fleet.groups.items()]
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {}
    return {"object": "list", "data": data, "has_more": False, **ends}


def health(fleet: Fleet, *, detailed: bool) -> tuple[int, dict[str, Any]]:
    """The status and body of /health: 200 where requests are answered, or held until they are."""
    ready = [one for one in fleet.targets if one.is_ready]
    coming = [one for one in fleet.targets if one.is_coming]
    status = "loading" if coming else "unavailable"
    if ready:
        status = "ok" if len(ready) == len(fleet.targets) else "degraded"
    told: dict[str, Any] = {"status": status}
    if detailed:
        told["instances"] = {
            one.name: {"state": one.state, **({"reason": one.why} if one.why else {})}
            for one in fleet.targets
        }
    return (200 if ready or coming else 503), told
