"""Which instances a request means. Nothing here has an effect."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

from pipeline.core.errors import did_you_mean

from .answers import Refused
from .fleet import Fleet, Group

CHAT, EMBEDDING, RERANK, ANY = "chat", "embedding", "rerank", ""

# Every path that is sent on, and the kind of instance it is for where no model is named.
PATHS = {
    **dict.fromkeys(
        (
            "/v1/chat/completions",
            "/v1/chat/completions/control",
            "/chat/completions",
            "/v1/chat/completions/input_tokens",
            "/chat/completions/input_tokens",
            "/v1/completions",
            "/completions",
            "/completion",
            "/v1/responses",
            "/responses",
            "/v1/responses/input_tokens",
            "/responses/input_tokens",
            "/v1/messages",
            "/v1/messages/count_tokens",
            "/v1/audio/transcriptions",
            "/audio/transcriptions",
            "/apply-template",
            "/infill",
        ),
        CHAT,
    ),
    **dict.fromkeys(("/v1/embeddings", "/embeddings", "/embedding"), EMBEDDING),
    **dict.fromkeys(("/v1/rerank", "/rerank", "/v1/reranking", "/reranking"), RERANK),
    **dict.fromkeys(("/tokenize", "/detokenize"), ANY),
}


def find(fleet: Fleet, model: str | None, kind: str, patterns: Mapping[str, str]) -> Group:
    """The instances that `model` means: its name, an alias, in any letter case, or what the
    first of `patterns` that fits leads to. Raises Refused."""
    if not fleet.targets:
        raise Refused(503, "no instance runs for this address")
    if model is None:
        return _only(fleet, kind)
    pattern = next((one for one in patterns if fnmatchcase(model, one)), None)
    names = [model] if pattern is None else [model, patterns[pattern]]
    for name in names:
        group = fleet.groups.get(name) or fleet.folded.get(name.casefold())
        if group:
            return group
    if pattern is not None:
        model = f"{patterns[pattern]} (which {model} leads to)"
    near = did_you_mean(model, list(fleet.groups))
    raise Refused(404, f"there is no model {model}{near}; {_list(fleet)}", "model_not_found")


def _only(fleet: Fleet, kind: str) -> Group:
    """The instances meant where none is named: the one that fits, or all of one alias."""
    fitting = [one for one in fleet.targets if kind in (ANY, one.instance.kind)]
    fitting = fitting or list(fleet.targets)
    for group in fleet.groups.values():
        if len(group) == len(fitting) and set(map(id, group)) == set(map(id, fitting)):
            return group
    raise Refused(400, f'the request names no "model"; {_list(fleet)}', "model_required")


def _list(fleet: Fleet) -> str:
    return f"there are: {', '.join(fleet.groups)}"
