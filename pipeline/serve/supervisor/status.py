"""What is there, held against the processes and the servers themselves: `ps`."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import psutil

from pipeline.core.parallel import for_each
from pipeline.core.process import capture
from pipeline.serve.server import Server

from . import client, marker
from .liveness import living
from .state import ENDED, READY, STOPPED, Folder, Seen, by_name, read_state, read_wanted

LOST = "lost"  # it was there when the supervisor last wrote, and is not, or has no supervisor
SILENT = "not answering"  # it was ready, and does not answer in time
ANSWER_SECONDS = 1.0
AT_ONCE = 64
SPEEDS = ("llamacpp:predicted_tokens_seconds", "vllm:avg_generation_throughput_toks_per_s")
QUERY = "--query-compute-apps=pid,used_memory"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """An instance as `ps` shows it. Times in seconds since 1970; None: not known."""

    name: str
    engine: str
    model: str  # the first alias, else the name
    state: str  # one of state.py, or LOST or SILENT
    reason: str
    ready_since: float | None
    pid: int | None
    port: int
    url: str
    restarts: int
    memory: int | None  # bytes, of all its processes
    gpu_memory: int | None  # bytes
    tokens_per_second: float | None  # as it says itself, over its life or its last requests
    log_file: str


def ps(at: Folder) -> list[Row]:
    """Every instance that is wanted or was. Nothing that a dead supervisor wrote is believed."""
    wanted, state = read_wanted(at), read_state(at)
    instances = by_name(wanted.instances) if wanted else {}
    seen = {one.name: one for one in state.instances} if state else {}
    is_kept = living(at) is not None
    processes = marker.marked(at)
    on_cards = gpu_memory() if seen else {}
    rows: list[Row] = []

    def add(instance: Server) -> None:
        one = seen.get(instance.name) or Seen(name=instance.name, state=STOPPED)
        what = one.state
        is_there = marker.find(one.pid, one.started, marker.server(at.marker, one.name))
        if what not in ENDED and (not is_kept or (one.pid is not None and not is_there)):
            what = LOST
        speed = None
        if what == READY:
            if client.is_ready(instance, ANSWER_SECONDS):
                speed = tokens_per_second(instance)
            else:
                what = SILENT
        own = processes.get(marker.server(at.marker, one.name), [])
        held = [on_cards[process.pid] for process in own if process.pid in on_cards]
        rows.append(
            Row(
                name=instance.name,
                engine=instance.engine,
                model=instance.model_name,
                state=what,
                reason=one.reason,
                ready_since=one.ready_at if what == READY else None,
                pid=one.pid if is_there else None,
                port=instance.port,
                url=instance.url,
                restarts=one.restarts,
                memory=memory(own) if own else None,
                gpu_memory=sum(held) if held else None,
                tokens_per_second=speed,
                log_file=instance.log_file,
            )
        )

    for_each(add, instances.values(), AT_ONCE)
    order = list(instances)
    return sorted(rows, key=lambda row: order.index(row.name))


def tokens_per_second(instance: Server) -> float | None:
    """What its /metrics says, if it has them."""
    found = client.counters(instance, ANSWER_SECONDS) or {}
    return next((found[name] for name in SPEEDS if name in found), None)


def memory(processes: list[psutil.Process]) -> int:
    """Bytes of main memory that they hold, shared ones counted for each."""
    held = 0
    for process in processes:
        with contextlib.suppress(psutil.Error):
            held += process.memory_info().rss
    return held


def gpu_memory() -> dict[int, int]:
    """Bytes on NVIDIA cards, by process; nothing where there is no driver."""
    held: dict[int, int] = {}
    told = capture(["nvidia-smi", QUERY, "--format=csv,noheader,nounits"], timeout=3) or ""
    for line in told.splitlines():
        with contextlib.suppress(ValueError):  # "[N/A]"
            pid, mib = line.split(",")
            held[int(pid)] = held.get(int(pid), 0) + int(mib) * 1024 * 1024
    return held
