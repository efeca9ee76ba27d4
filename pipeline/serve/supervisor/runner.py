"""One server over its life: the states of state.py and the transitions between them.

waiting → loading → ready      failed start, crash, stuck → pausing → waiting
ready → unloading → stopping → asleep → waiting      as loading.py decides
unloading → asleep → loading     of a vLLM that keeps its process: see sleep.py
any → stopping → stopped       … or, by policy, exited or failed
failed → asleep                 after a pause, of a server that is loaded on demand
"""

from __future__ import annotations

import time
from pathlib import Path
from threading import Event
from typing import Any

from msgspec.structs import replace

from pipeline.core.errors import PipelineError
from pipeline.serve.guard.port import OwnPort
from pipeline.serve.logfile import set_aside
from pipeline.serve.placing import Claim
from pipeline.serve.server import GATEWAY, Server

from . import client
from .child import Child
from .liveness import port_for
from .policy import End, Timing, decide
from .state import (
    ASLEEP,
    ENDED,
    LOADING,
    PAUSING,
    READY,
    STOPPED,
    STOPPING,
    UNLOADING,
    WAITING,
    Folder,
    ServerStatus,
)

NEVER = float("inf")
# For a killed server to be gone: freeing much memory, or a GPU driver, may delay that. Together
# with marker.PATIENCE less than the grace period of `down`.
KILL_SECONDS = 2.5


class Runner:
    """Keeps one server running. All calls come from one thread: child processes end with the thread
    that started them. `now` is time.monotonic()."""

    def __init__(
        self, instance: Server, asked: int, at: Folder, timing: Timing, news: Event
    ) -> None:
        self.instance, self.at, self.timing, self.news = instance, at, timing, news
        self.status = ServerStatus(name=instance.name, state=WAITING, asked=asked)
        self.child: Child | None = None
        self.port: OwnPort | None = None
        self.failures = 0
        self._why = ""  # why we end it, other than on request
        # unwanted: it is stopped, and not started again; unloads: it is asleep once it has ended
        self.unwanted = self._killed = self.unloads = False
        self.claim = Claim()
        # until: when the current state has lasted too long
        self.until = self.ready_since = self._ready_until = NEVER

    @property
    def is_over(self) -> bool:
        return self.status.state in ENDED

    def request_again(self, asked: int) -> None:
        """Take over a newer request: a running server fulfils it, a pause ends at once."""
        if self.unwanted or self.is_over:
            return
        self.amend(asked=asked)
        if self.child is None:
            self.failures, self.until = 0, 0

    def begin(self, now: float) -> None:
        """Its load begins: of a new process, or of one that is asleep."""
        self._why, self._killed, self.unloads, self._began = "", False, False, now
        self.ready_since = self._ready_until = NEVER
        self.until = now + self.instance.ready_timeout

    def start(self, now: float) -> None:
        self.begin(now)
        if not self.status.restarts:  # a restart goes on in the same log
            set_aside(Path(self.instance.log_file))
        try:
            self.port = port_for(self.instance, self.at, self.port)
            self.child = Child(self.port, self.at, self.timing, self.news)
            self.port.serve()
        except (PipelineError, OSError, RuntimeError, ValueError) as error:
            self.finish(End(why=f"failed start: {getattr(error, 'message', error)}"), now)
        else:
            pid, started = self.child.process.pid, self.child.started
            self.amend(state=LOADING, pid=pid, started=started, socket=self.port.socket)

    def stop(self, now: float) -> None:
        """Stop it for good."""
        if self.child is None:
            self.amend(state=STOPPED, reason="", retry_at=None)
        elif not self.unwanted and self.status.state != STOPPING:
            self.ask_to_stop(now)
        self.unwanted = True

    def kill(self, now: float) -> None:
        """Kill it rather than wait any longer."""
        if self.child and not self._killed:
            self._killed = True
            self.until = now + KILL_SECONDS
            self.child.kill()

    def give_up(self, why: str, now: float) -> None:
        """Kill it because it does not work; what follows is decided as after a crash."""
        self._why = why
        self.amend(state=STOPPING)
        self.kill(now)

    def poll(self, now: float) -> End | None:
        """Move on where the current state has lasted too long; how the process ended, if it did."""
        late = now >= self.until
        if self.child is None:
            if self.status.state == PAUSING and late:
                self.amend(state=WAITING, restarts=self.status.restarts + 1)
            return None
        self._observe(self.child.observed, now)
        exit_status = self.child.exit_status()
        if exit_status is None and not (late and self._killed):
            if late and self.status.state == LOADING:
                self._why = f"failed start: not ready after {self.instance.ready_timeout:g} s"
                self.ask_to_stop(now)
            elif late:
                self.kill(now)
            return None
        return End(
            status=exit_status,
            why=self._why or ("" if exit_status is not None else "was killed, but does not end"),
            was_ready=self.ready_since < NEVER,
            was_steady=min(now, self._ready_until) - self.ready_since >= self.timing.steady_after,
        )

    def finish(self, end: End, now: float) -> None:
        """Decide what follows its end, or a failed start."""
        lines = self.child.finish() if self.child else ""
        self.child, retry_at = None, None
        if self.unwanted or self.unloads:
            state, reason = STOPPED if self.unwanted else ASLEEP, ""
        else:
            decision = decide(self.instance, end, self.failures, self.timing, lines)
            self.failures, self.until = decision.failures, now + decision.pause
            retry_at = decision.retry_after and now + decision.retry_after
            state, reason = decision.state, decision.reason + (lines and f":\n{lines}")
        ended = {"pid": None, "started": None, "ready_at": None, "socket": ""}
        self.amend(state=state, reason=reason, retry_at=retry_at, **ended)

    def _observe(self, observed: str, now: float) -> None:
        """Act on what its probes have observed."""
        if observed and self.status.state == LOADING:
            self.until, self.ready_since = NEVER, now
            self.amend(state=READY, ready_at=time.time(), load_seconds=now - self._began)
        elif observed == client.STUCK and self.status.state in (READY, UNLOADING):
            # it may have been stuck ever since the last probe
            self._ready_until = now - self.timing.probe_every - self.instance.probe_timeout
            what = "answer" if self.instance.engine == GATEWAY else "token"
            self.give_up(f"stuck: no {what} within {self.instance.probe_timeout:g} s", now)

    def ask_to_stop(self, now: float) -> None:
        """Ask it to end by itself; it is killed once that takes too long."""
        self.amend(state=STOPPING)
        self.until = now + self.instance.stop_timeout
        if self.child:
            self.child.ask_to_stop()

    def amend(self, **more: Any) -> None:
        """Change its status. A server that neither runs nor restarts has no port."""
        self.status = replace(self.status, **more)
        if self.port and self.status.state in (*ENDED, ASLEEP):
            self.port.close()
            self.port = None
