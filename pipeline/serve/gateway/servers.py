"""The configuration's servers and their states, as the supervisor's folder tells them, and which of
them a request is meant for."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase

from msgspec import Struct, field

from pipeline.core.errors import did_you_mean
from pipeline.serve.guard.refusal import Refused
from pipeline.serve.server import GATEWAY, VLLM, Server
from pipeline.serve.supervisor.state import (
    ASLEEP,
    ENDED,
    READY,
    SETTLED,
    WAITING,
    DesiredState,
    Folder,
    ServerStatus,
    Stamp,
    State,
    read_state,
    read_wanted,
    stamp,
)

MOST_SLASHES = 8  # that are looked at for a name in a path
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


class Target(Struct, frozen=True, kw_only=True):
    """A server that requests can be sent to, and its state in the supervisor's words."""

    instance: Server
    state: str
    reason: str = ""
    problem: str = ""  # why it can never be loaded
    ready_at: float | None = None
    has_process: bool = False
    socket: str = ""  # of a guarded one, which need not be asked through its guard
    retry_at: float | None = None  # of one that has failed: see ServerStatus
    nodes: tuple[str, ...] = ()  # of a cluster: the address of each replica's
    headers: tuple[tuple[bytes, bytes], ...] = ()  # that a request to it carries, its key included

    @property
    def name(self) -> str:
        return self.instance.name

    @property
    def names(self) -> tuple[str, ...]:
        """Its name and its aliases."""
        return self.instance.names

    @property
    def is_ready(self) -> bool:
        return self.state == READY

    @property
    def is_sleeping(self) -> bool:
        """Whether it is unloaded and keeps its process: vLLM's sleep mode."""
        return self.state == ASLEEP and self.has_process

    @property
    def is_pending(self) -> bool:
        """Whether it is worth waiting for."""
        return (self.state not in SETTLED or self.state == ASLEEP) and not self.problem

    @property
    def short_reason(self) -> str:
        """The first line of the reason: the others come from a log."""
        return self.reason.strip().partition("\n")[0].rstrip(":")

    @property
    def served_name(self) -> str | None:
        """The only model name that vLLM accepts; llama-server accepts any."""
        return self.instance.model_name if self.instance.engine == VLLM else None


Targets = tuple[Target, ...]


class ServerList(Struct, frozen=True):
    """All servers in the order of the configuration, and those that share a name or an alias.
    `by_folded_name` ignores letter case."""

    targets: Targets = ()
    by_name: dict[str, Targets] = field(default_factory=dict)
    by_folded_name: dict[str, Targets] = field(default_factory=dict)
    unloads: bool = False  # whether any is loaded and unloaded by itself

    def named(self, name: str) -> Targets:
        """Those of this name or alias, in this letter case or else in any; none for no such."""
        return self.by_name.get(name) or self.by_folded_name.get(name.casefold(), ())


def server_list(wanted: DesiredState | None, state: State | None) -> ServerList:
    """The wanted servers, each in the state that the supervisor last wrote."""
    statuses = {status.name: status for status in state.instances} if state else {}
    instances = [
        instance for instance in (wanted.instances if wanted else ()) if instance.engine != GATEWAY
    ]
    request = wanted.asked if wanted else 0
    targets = tuple(
        _target(instance, statuses.get(instance.name), request) for instance in instances
    )
    return of_targets(targets, unloads=wanted is not None and wanted.unloads)


def of_targets(targets: Targets, *, unloads: bool = False) -> ServerList:
    """These servers, and who shares a name or an alias."""
    return ServerList(targets, _named(targets, str), _named(targets, str.casefold), unloads)


def _target(instance: Server, status: ServerStatus | None, request: int) -> Target:
    if status is None:
        return Target(instance=instance, state=WAITING)
    state = status.state
    if state in ENDED and status.asked < request:
        state = WAITING  # it had failed before this `up`, which tries it again
    return Target(
        instance=instance,
        state=state,
        reason=status.reason,
        problem=status.problem,
        ready_at=status.ready_at,
        has_process=status.pid is not None,
        socket=status.socket,
        retry_at=status.retry_at,
    )


def _named(targets: Targets, fold: Callable[[str], str]) -> dict[str, Targets]:
    named: dict[str, Targets] = {}
    for target in targets:
        for name in dict.fromkeys(map(fold, target.names)):
            named[name] = (*named.get(name, ()), target)
    return named


class View:
    """The servers, read again when the supervisor's files change."""

    is_supervised = True  # by a supervisor, which reads and writes the files in `at`

    def __init__(self, at: Folder) -> None:
        self.at = at
        self._stamps: tuple[Stamp, Stamp] | None = None
        self._servers = ServerList()

    def now(self) -> ServerList:
        """The current list: two `stat` calls where nothing changed."""
        stamps = stamp(self.at.wanted), stamp(self.at.state)
        if stamps != self._stamps:
            wanted, state = read_wanted(self.at), read_state(self.at)
            if (wanted is None and stamps[0]) or (state is None and stamps[1]):
                return self._servers  # unreadable for now: the last list stays valid
            self._servers, self._stamps = server_list(wanted, state), stamps
        return self._servers


def find(servers: ServerList, model: str | None, kind: str, patterns: Mapping[str, str]) -> Targets:
    """The servers that `model` means: by name or alias, in any letter case, or by the first of
    `patterns` that matches it. Raises Refused."""
    if not servers.targets:
        raise Refused(503, "the gateway has no servers")
    if model is None:
        return _default(servers, kind)
    pattern = next((pattern for pattern in patterns if fnmatchcase(model, pattern)), None)
    names = [model, model.removesuffix(":latest")]  # a tag that clients of Ollama add
    names += [] if pattern is None else [patterns[pattern]]
    for name in names:
        if targets := servers.named(name):
            return targets
    if pattern is not None:
        model = f"{patterns[pattern]} (from {model})"
    near = did_you_mean(model, list(servers.by_name))
    raise Refused(404, f"there is no model {model}{near}; {_available(servers)}", "model_not_found")


def find_server(servers: ServerList, name: str) -> Targets:
    """The one server of this name, or else the only one of this alias. Raises Refused."""
    own = tuple(target for target in servers.targets if target.name == name)
    targets = own or servers.named(name)
    if len(targets) > 1:
        several = ", ".join(target.name for target in targets)
        raise Refused(404, f"{name} means several: {several}; name one of them")
    if not targets:
        names = [target.name for target in servers.targets]
        near = did_you_mean(name, names)
        raise Refused(404, f"there is no instance {name}{near}; available: {', '.join(names)}")
    return targets


def split_path(servers: ServerList, path: str) -> tuple[str, str]:
    """The name that a path begins with, and the path at that server: an alias may have slashes."""
    words = path.split("/", MOST_SLASHES)
    ends = range(1, len(words))
    end = next((end for end in ends if servers.named("/".join(words[:end]))), 1)
    return "/".join(words[:end]), "/".join(["", *words[end:]])


def _default(servers: ServerList, kind: str) -> Targets:
    """The servers meant where no model is named: the only one of that kind, or all of one name."""
    matching = [target for target in servers.targets if kind in (ANY, target.instance.kind)]
    matching = matching or list(servers.targets)
    for targets in servers.by_name.values():
        if len(targets) == len(matching) and set(map(id, targets)) == set(map(id, matching)):
            return targets
    raise Refused(400, f'the request names no "model"; {_available(servers)}', "model_required")


def nearest_path(path: str) -> str:
    """`; did you mean X?` for a path that is one of ours but for letter case, slashes and what a
    client puts before it (`/v1/v1/models`), or nothing."""
    plain = re.sub("/+", "/", path.lower()).rstrip("/")
    ends = [known for known in (*PATHS, "/v1/models") if plain.endswith(known) and known != path]
    return f"; did you mean {max(ends, key=len)}?" if ends else ""


def _available(servers: ServerList) -> str:
    return f"available: {', '.join(servers.by_name)}"
