"""The servers that a request is meant for: decisions without effects."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

from pipeline.core.errors import did_you_mean
from pipeline.serve.guard.refusal import Refused

from .servers import ServerList, Targets

CHAT, EMBEDDING, RERANK, ANY = "chat", "embedding", "rerank", ""

CHAT_PATHS = """
    /v1/chat/completions /v1/chat/completions/control /v1/chat/completions/input_tokens
    /chat/completions /chat/completions/input_tokens /v1/completions /completions /completion
    /v1/responses /v1/responses/input_tokens /responses /responses/input_tokens
    /v1/messages /v1/messages/count_tokens /v1/audio/transcriptions /audio/transcriptions
    /apply-template /infill
"""
# Every path that is forwarded, and the kind of server that answers it where no model is named.
PATHS = {
    **dict.fromkeys(CHAT_PATHS.split(), CHAT),
    **dict.fromkeys(("/v1/embeddings", "/embeddings", "/embedding"), EMBEDDING),
    **dict.fromkeys(("/v1/rerank", "/rerank", "/v1/reranking", "/reranking"), RERANK),
    **dict.fromkeys(("/tokenize", "/detokenize"), ANY),
}


def find(servers: ServerList, model: str | None, kind: str, patterns: Mapping[str, str]) -> Targets:
    """The servers that `model` means: by name or alias, in any letter case, or by the first of
    `patterns` that matches it. Raises Refused."""
    if not servers.targets:
        raise Refused(503, "the gateway has no servers")
    if model is None:
        return _default(servers, kind)
    pattern = next((pattern for pattern in patterns if fnmatchcase(model, pattern)), None)
    names = [model] if pattern is None else [model, patterns[pattern]]
    for name in names:
        targets = servers.by_name.get(name) or servers.by_folded_name.get(name.casefold())
        if targets:
            return targets
    if pattern is not None:
        model = f"{patterns[pattern]} (from {model})"
    near = did_you_mean(model, list(servers.by_name))
    raise Refused(404, f"there is no model {model}{near}; {_available(servers)}", "model_not_found")


def find_server(servers: ServerList, name: str) -> Targets:
    """The one server of this name. Raises Refused."""
    targets = tuple(target for target in servers.targets if target.name == name)
    if not targets:
        names = [target.name for target in servers.targets]
        near = did_you_mean(name, names)
        raise Refused(404, f"there is no instance {name}{near}; available: {', '.join(names)}")
    return targets


def _default(servers: ServerList, kind: str) -> Targets:
    """The servers meant where no model is named: the only one of that kind, or all of one name."""
    matching = [target for target in servers.targets if kind in (ANY, target.instance.kind)]
    matching = matching or list(servers.targets)
    for targets in servers.by_name.values():
        if len(targets) == len(matching) and set(map(id, targets)) == set(map(id, matching)):
            return targets
    raise Refused(400, f'the request names no "model"; {_available(servers)}', "model_required")


def _available(servers: ServerList) -> str:
    return f"available: {', '.join(servers.by_name)}"
