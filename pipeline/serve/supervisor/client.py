"""Watching a server: when it is ready, its metrics, and whether it still generates tokens."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from threading import Event, Lock

from msgspec import Struct

from pipeline.serve.health import ask, is_ready
from pipeline.serve.server import GATEWAY, LLAMA_CPP, VLLM, Server

from .state import READY

STUCK = "stuck"
SLEEP_MODE = "--enable-sleep-mode"  # an option of vLLM
METRICS_SECONDS = 5.0  # a server under load may answer slowly
# Seconds between two checks of a server that loads: a share of the time that it has taken so far,
# or less where it prints something, as all do once they are ready.
SHORTEST_PAUSE, PAUSE_SHARE, LONGEST_PAUSE = 0.005, 0.05, 1.0
COUNTER = re.compile(r"^((?:llamacpp|vllm):\S+) ([-+.\deE]+)$", re.M)
PROGRESS = re.compile(r"_total(\{|$)")  # what stands still in a stuck server
BUSY = re.compile(r"requests?_(processing|deferred|running|waiting)(\{|$)")

_awake: defaultdict[str, Lock] = defaultdict(Lock)  # by server: held while it must not fall asleep


def smallest_request(instance: Server) -> tuple[str, dict[str, object] | None]:
    """The path and body of the smallest request that makes its model work, or a gateway answer."""
    if instance.engine == GATEWAY:
        return "/health", None
    named: dict[str, object] = {"model": instance.aliases[0]} if instance.aliases else {}
    if instance.kind == "embedding":
        return "/v1/embeddings", named | {"input": "a"}
    if instance.kind == "rerank":
        return "/v1/rerank", named | {"query": "a", "documents": ["a"]}
    if instance.engine == LLAMA_CPP:
        return "/completion", {"prompt": "a", "n_predict": 1, "cache_prompt": False}
    return "/v1/completions", named | {"prompt": "a", "max_tokens": 1}


def counters(instance: Server, timeout: float) -> dict[str, float] | None:
    """The values in /metrics; None where it has none or does not answer."""
    with contextlib.suppress(OSError, ValueError):
        status, text = ask(instance, "/metrics", timeout=timeout)
        if status == 200:
            return {name: float(value) for name, value in COUNTER.findall(text)}
    return None


def can_sleep(instance: Server) -> bool:
    """Whether it may be put to sleep: see sleep.py."""
    return instance.engine == VLLM and SLEEP_MODE in instance.cmd


def is_asleep(instance: Server) -> bool:
    """Whether it was put to sleep. A request would wait, or crash it, then."""
    with contextlib.suppress(OSError, ValueError):
        if can_sleep(instance):
            status, text = ask(instance, "/is_sleeping", timeout=METRICS_SECONDS)
            return status == 200 and json.loads(text) == {"is_sleeping": True}
    return False


@contextlib.contextmanager
def awake(instance: Server) -> Iterator[bool]:
    """Keep it from falling asleep while the block runs; yields whether it is awake."""
    with _awake[instance.name]:
        yield not is_asleep(instance)


class Activity(Struct, frozen=True):
    """What a server's metrics tell of its work: how far it got, and whether it has requests."""

    progress: object
    busy: bool


def activity(instance: Server, timeout: float = METRICS_SECONDS) -> Activity | None:
    """From /metrics; None where it has none."""
    values = counters(instance, timeout)
    if not values:
        return None
    progress = {name: value for name, value in values.items() if PROGRESS.search(name)}
    busy = any(value and BUSY.search(name) for name, value in values.items())
    return Activity(progress, busy)


class Probe:
    """Whether a server is stuck, checked from time to time.

    A server that makes progress is left alone, and so is an idle one that has worked before: a
    request would cost it a cached prompt. Without metrics it always gets a request.
    """

    def __init__(self, instance: Server) -> None:
        self.instance, self.proven = instance, False
        self.before = activity(instance)

    def is_stuck(self) -> bool:
        now, before = activity(self.instance), self.before
        progressed = now is not None and (before is None or now.progress != before.progress)
        self.before = now
        if progressed:
            self.proven = True
        if progressed or (now and self.proven and not now.busy):
            return False
        path, body = smallest_request(self.instance)
        with contextlib.suppress(OSError):
            ask(self.instance, path, body, timeout=self.instance.probe_timeout)
            self.proven = True  # any answer will do
            self.before = activity(self.instance)
            return False
        after = activity(self.instance)
        return now is None or after is None or after.progress == now.progress


def watch(
    instance: Server,
    report: Callable[[str], None],
    over: Event,
    printed: Event,
    probe_every: float,
    prepare: Callable[[], None],
) -> None:
    """Report READY once, after `prepare`, then STUCK should it hang. `printed` is set with each
    line of its output. Ends when `over` is set."""
    began = time.monotonic()
    while not is_ready(instance):
        pause = min((time.monotonic() - began) * PAUSE_SHARE, LONGEST_PAUSE)
        if over.wait(SHORTEST_PAUSE):
            return
        printed.wait(max(0, pause - SHORTEST_PAUSE))
        printed.clear()
    prepare()
    report(READY)
    probe = Probe(instance) if instance.probe_timeout else None
    while probe and not over.wait(probe_every):
        with awake(instance) as is_awake:
            is_stuck = is_awake and probe.is_stuck()
        if is_stuck and not over.is_set():
            report(STUCK)
            return
