"""Requests that are refused, and errors in the form of either API."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# By status: OpenAI's type, Anthropic's type.
TYPES = {
    400: ("invalid_request_error", "invalid_request_error"),
    401: ("authentication_error", "authentication_error"),
    404: ("not_found_error", "not_found_error"),
    403: ("permission_error", "permission_error"),
    405: ("invalid_request_error", "invalid_request_error"),
    408: ("invalid_request_error", "timeout_error"),
    413: ("invalid_request_error", "request_too_large"),
    415: ("invalid_request_error", "invalid_request_error"),
    431: ("invalid_request_error", "invalid_request_error"),
}
DEFAULT_TYPES = ("server_error", "api_error")


class Refused(Exception):
    """A request that is not passed on, but answered with an error."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        *,
        closes: bool = False,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.closes = closes  # the connection: what follows on it is not read
        self.retry_after = retry_after  # seconds


def is_anthropic(path: str, headers: Mapping[str, str]) -> bool:
    """Whether a request is for Anthropic's API."""
    return path.startswith("/v1/messages") or "anthropic-version" in headers


def error_body(status: int, message: str, code: str | None, *, anthropic: bool) -> dict[str, Any]:
    """An error in the form of one of the two APIs."""
    openai_type, anthropic_type = TYPES.get(status, DEFAULT_TYPES)
    if anthropic:
        return {"type": "error", "error": {"type": anthropic_type, "message": message}}
    param = "model" if code == "model_not_found" else None
    body = {"message": message, "type": openai_type, "param": param, "code": code or status}
    return {"error": body}
