"""`ps`: the state that was written, checked against the processes and the servers themselves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from msgspec import Struct

from pipeline.bins.hardware import nvidia
from pipeline.core.errors import doitw
from pipeline.core.parallel import for_each
from pipeline.serve import health
from pipeline.serve.server import Server

from . import books, client, marker, memory, usage
from .liveness import living
from .state import (
    ASLEEP,
    ENDED,
    READY,
    STOPPED,
    Folder,
    ServerStatus,
    read_state,
    read_wanted,
    servers_of,
    statuses_of,
)
from .usage import Gateways

LOST = "lost"  # written as running, but its process or its supervisor is gone
SILENT = "not answering"  # written as ready, but does not answer in time
ANSWER_SECONDS = 1.0
AT_ONCE = 64
SPEEDS = ("llamacpp:predicted_tokens_seconds", "vllm:avg_generation_throughput_toks_per_s")
DRAFTED = tuple(f"{name}:spec_decode_num_draft_tokens_total" for name in ("llamacpp", "vllm"))
ACCEPTED = tuple(f"{name}:spec_decode_num_accepted_tokens_total" for name in ("llamacpp", "vllm"))


class Row(Struct, frozen=True, kw_only=True):
    """A server as `ps` shows it. Times in seconds since 1970; None: unknown."""

    name: str
    engine: str
    model: str  # the first alias, else the name
    state: str  # one of state.py, or LOST or SILENT
    start: str  # when it is loaded: boot or demand
    reason: str
    ready_since: float | None
    pid: int | None = None
    port: int
    url: str
    restarts: int = 0
    memory: int | None = None  # bytes, of all its processes
    gpu_memory: int | None = None  # bytes
    tokens_per_second: float | None = None  # its own figure, over its life or its last requests
    drafts_accepted: float | None = None  # the share of drafted tokens, over its life
    log_file: str
    need: Mapping[str, int] = {}  # bytes by device that it is counted with; empty: not counted
    last_use: float | None = None  # when a request last began or ended at a gateway
    load_seconds: float | None = None  # that its last load took


def ps(at: Folder) -> list[Row]:
    """Every server in the desired state. What a dead supervisor wrote is not trusted."""
    wanted, state = read_wanted(at), read_state(at)
    instances, statuses = servers_of(wanted), statuses_of(state)
    is_supervised = living(at) is not None
    processes = marker.marked(at)
    on_gpus = nvidia.used() if statuses else {}
    rows: dict[str, Row] = {}
    entries, gateways = books.read(at) if wanted and wanted.unloads else {}, Gateways(at)
    gateways.read()

    def add(instance: Server) -> None:
        entry = entries.get(instance.name, books.NO_ACCOUNT)
        status = statuses.get(instance.name) or ServerStatus(name=instance.name, state=STOPPED)
        state = status.state
        alive = marker.find(status.pid, status.started, marker.server(at, status.name))
        is_gone = not is_supervised or (status.pid is not None and not alive)
        if is_gone and state not in ENDED:
            state = LOST
        counters: dict[str, float] = {}
        if state == READY:
            if health.is_ready(instance, ANSWER_SECONDS):
                counters = client.counters(instance, ANSWER_SECONDS) or {}
            else:
                state = SILENT
        own = processes.get(marker.server(at, status.name), [])
        last_use = gateways.use(instance.name).last or None
        reason = status.reason or status.problem
        if not is_supervised and own:
            pids = ", ".join(str(process.pid) for process in own)
            reason = f"the supervisor is gone, and left {pids} running; {doitw('down')} ends that"
        used = memory.used(own, on_gpus)
        ram = used.pop("ram", None)
        rows[instance.name] = Row(
            name=instance.name,
            engine=instance.engine,
            model=instance.model_name,
            state=state,
            start=instance.start,
            reason=reason,
            ready_since=status.ready_at if state == READY else None,
            pid=status.pid if alive else None,
            port=instance.port,
            url=instance.url,
            restarts=status.restarts,
            memory=ram,
            gpu_memory=sum(used.values()) if used else None,
            tokens_per_second=first(counters, SPEEDS),
            drafts_accepted=drafts_accepted(counters),
            log_file=instance.log_file,
            need=entry.asleep if state == ASLEEP and alive else entry.need,
            last_use=last_use and usage.since_1970(last_use),
            load_seconds=entry.load_seconds or None,
        )

    for_each(add, instances.values(), AT_ONCE)
    return [rows[name] for name in instances]


def first(counters: Mapping[str, float], names: Iterable[str]) -> float | None:
    return next((counters[name] for name in names if name in counters), None)


def drafts_accepted(counters: Mapping[str, float]) -> float | None:
    """The share of drafted tokens that the model accepted; None where none were drafted."""
    drafted = first(counters, DRAFTED)
    return (first(counters, ACCEPTED) or 0.0) / drafted if drafted else None
