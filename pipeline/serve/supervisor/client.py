"""What a server answers: whether it is ready, what it counts, and whether it still makes tokens."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Event

from pipeline.serve import health
from pipeline.serve.keys import keys_of
from pipeline.serve.server import GATEWAY, LLAMA_CPP, Server

from .state import READY

STUCK = "stuck"
LOOK_SECONDS = 5.0  # a server under load may be slow to tell its counters
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 1.0  # seconds between two looks at one that loads
COUNTER = re.compile(r"^((?:llamacpp|vllm):\S+) ([-+.\deE]+)$", re.M)
MADE = re.compile(r"_total(\{|$)")  # what a stuck server does not count on
BUSY = re.compile(r"requests?_(processing|deferred|running|waiting)(\{|$)")


def key(instance: Server) -> str | None:
    """The first key of its file. Raises OSError."""
    if instance.api_key_file is None:
        return None
    return next(iter(keys_of(Path(instance.folder, instance.api_key_file))), None)


def ask(
    instance: Server, path: str, body: Mapping[str, object] | None = None, *, timeout: float
) -> tuple[int, str]:
    """Status and text of its answer to a GET, or with `body` to a POST. Raises OSError, also where
    it does not answer in `timeout` seconds."""
    headers = {"Content-Type": "application/json"}
    if word := key(instance):
        headers["Authorization"] = f"Bearer {word}"
    server = health.connection(instance.address, instance.port, tls=instance.tls, timeout=timeout)
    try:
        told = None if body is None else json.dumps(body)
        server.request("POST" if told else "GET", instance.prefix + path, told, headers)
        answer = server.getresponse()
        return answer.status, answer.read().decode("utf-8", "replace")
    except (http.client.HTTPException, ValueError) as error:
        raise OSError(str(error)) from None
    finally:
        server.close()


def is_ready(instance: Server, timeout: float = 2) -> bool:
    """Whether it answers that its model is loaded. A gateway is ready once it answers at all: what
    it says is how the others are."""
    with contextlib.suppress(OSError, ValueError):
        # with the key: llama-server wants it here too, where it has an --api-prefix
        status, _ = ask(instance, "/health", timeout=timeout)
        return status == 200 or instance.engine == GATEWAY
    return False


def one_token(instance: Server) -> tuple[str, dict[str, object]]:
    """The path and body of the smallest request that its model has to work for."""
    named: dict[str, object] = {"model": instance.aliases[0]} if instance.aliases else {}
    if instance.kind == "embedding":
        return "/v1/embeddings", named | {"input": "a"}
    if instance.kind == "rerank":
        return "/v1/rerank", named | {"query": "a", "documents": ["a"]}
    if instance.engine == LLAMA_CPP:
        return "/completion", {"prompt": "a", "n_predict": 1, "cache_prompt": False}
    return "/v1/completions", named | {"prompt": "a", "max_tokens": 1}


def counters(instance: Server, timeout: float) -> dict[str, float] | None:
    """What /metrics counts; None where it has none or does not answer."""
    with contextlib.suppress(OSError, ValueError):
        status, text = ask(instance, "/metrics", timeout=timeout)
        if status == 200:
            return {name: float(value) for name, value in COUNTER.findall(text)}
    return None


@dataclass(frozen=True, slots=True)
class Look:
    """What a server shows of its work: what it has made, and whether it has requests."""

    made: object
    busy: bool


def look(instance: Server) -> Look | None:
    """From /metrics; None where it has none."""
    found = counters(instance, LOOK_SECONDS)
    if found:
        made = {name: value for name, value in found.items() if MADE.search(name)}
        return Look(made, any(value and BUSY.search(name) for name, value in found.items()))
    return None


class Probe:
    """Whether a server is stuck, asked now and then.

    One that moves is left alone, and so is an idle one that has shown that it can work: a request
    would cost it a prompt that it keeps. Where nothing can be seen of its work it is asked anyway.
    """

    def __init__(self, instance: Server) -> None:
        self.instance, self.proven = instance, False
        self.before = look(instance)

    def is_stuck(self) -> bool:
        now, before = look(self.instance), self.before
        moved = now is not None and (before is None or now.made != before.made)
        self.before = now
        if moved:
            self.proven = True
        if moved or (now and self.proven and not now.busy):
            return False
        path, body = one_token(self.instance)
        with contextlib.suppress(OSError):
            ask(self.instance, path, body, timeout=self.instance.probe_timeout)
            self.proven = True  # whatever it says, it answers
            self.before = look(self.instance)
            return False
        after = look(self.instance)
        return now is None or after is None or after.made == now.made


def watch(instance: Server, tell: Callable[[str], None], over: Event, probe_every: float) -> None:
    """Tell once that it is ready, then if it is stuck. Ends when `over` is set."""
    pause = FIRST_PAUSE
    while not is_ready(instance):
        if over.wait(pause):
            return
        pause = min(pause * 1.2, LONGEST_PAUSE)
    tell(READY)
    probe = Probe(instance) if instance.probe_timeout else None
    while probe and not over.wait(probe_every):
        if probe.is_stuck() and not over.is_set():
            tell(STUCK)
            return
