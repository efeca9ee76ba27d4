"""What the gateway's own paths take and answer, as OpenAPI: what docs/gateway.md says of them."""

from __future__ import annotations

from typing import Any

TEXT, NUMBER, BOOLEAN = {"type": "string"}, {"type": "number"}, {"type": "boolean"}
KEEP = {"oneOf": [NUMBER, TEXT]}


def table(required: str = "", **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required.split()}


def answers(schema: dict[str, Any] | None = None, kind: str = "application/json") -> dict[str, Any]:
    """An answer of this schema, or an error in the form of the API."""
    fine = {"description": "done", "content": {kind: {"schema": schema or {}}}}
    error = {"description": "refused", "content": {"application/json": {"schema": ERROR}}}
    return {"200": fine, "4XX": error}


def get(schema: dict[str, Any], *parameters: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"get": {"parameters": [*parameters], "responses": answers(schema, **more)}}


def post(body: dict[str, Any], schema: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    content = {"application/json": {"schema": body}}
    body_of = {"content": content, "required": True}
    return {"post": {"requestBody": body_of, "responses": answers(schema, **more)}}


def parameter(place: str, name: str, schema: dict[str, Any] = TEXT) -> dict[str, Any]:
    return {"in": place, "name": name, "schema": schema, "required": place == "path"}


def listed(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": item}


ERROR = table("error", error={"oneOf": [table("message", message=TEXT), TEXT]})
MODEL = table(
    "id object state instances aliases",
    id=TEXT,
    object={"const": "model"},
    state=TEXT,
    created=NUMBER,
    instances=listed(TEXT),
    aliases=listed(TEXT),
)
NAMED = table("model", model={"enum": ["chat", "other"]})
MESSAGE = table(
    "role content",
    role={"enum": ["user", "assistant", "tool"]},
    content=TEXT,
    images=listed(TEXT),
    tool_calls=listed(table("function", function=table("name", name=TEXT, arguments={}))),
)
OLLAMA = {
    "model": {"enum": ["chat", "chat:latest", "other"]},
    "options": {"type": "object"},
    "keep_alive": KEEP,
    "stream": {"const": False},
}
RESULT = table("model created_at done", model=TEXT, created_at=TEXT, done=BOOLEAN)
SCHEMA: dict[str, Any] = {
    "openapi": "3.1.0",
    "info": {"title": "The gateway", "version": "1"},
    "paths": {
        "/health": get(table("status", status=TEXT, instances={"type": "object"})),
        "/v1/models": get(table("object data", object={"const": "list"}, data=listed(MODEL))),
        "/v1/models/{name}": get(MODEL, parameter("path", "name")),
        "/metrics": get(TEXT, kind="text/plain"),
        "/running": get(table("running", running=listed(table("model state ttl")))),
        "/props": get(table("role", role=TEXT)),
        "/models/load": post(NAMED, table("success", success={"const": True})),
        "/dashboard/data": get(table("at instances requests history")),
        "/dashboard/log": get(TEXT, parameter("query", "name"), kind="text/plain"),
        "/v1/chat/completions": post(table(model=TEXT, messages=listed(MESSAGE), keep_alive=KEEP)),
        "/v1/embeddings": post(table(model=TEXT, input={})),
        "/tokenize": post({}),
        "/api/version": get(table("version", version=TEXT)),
        "/api/tags": get(table("models", models=listed(table("name size digest details")))),
        "/api/ps": get(table("models", models=listed(table("name expires_at", expires_at=TEXT)))),
        "/api/show": post(table("model", model=TEXT), table("details model_info capabilities")),
        "/api/pull": post(table("model", model=TEXT, stream=BOOLEAN)),
        "/api/chat": post(
            table("stream", **OLLAMA, messages=listed(MESSAGE), think=BOOLEAN), RESULT
        ),
        "/api/generate": post(table("stream", **OLLAMA, prompt=TEXT, system=TEXT), RESULT),
    },
}
