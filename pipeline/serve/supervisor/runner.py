"""One instance over its life: the states of state.py, and what leads from one to the next.

waiting → loading → ready      failed start, crash, stuck → pausing → waiting
any → stopping → stopped       … or, by policy, exited or failed
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

from pipeline.core.errors import PipelineError
from pipeline.serve.logfile import set_aside
from pipeline.serve.server import Server

from . import client
from .child import Child
from .policy import End, Timing, decide
from .state import ENDED, LOADING, PAUSING, READY, STOPPED, STOPPING, WAITING, Folder, Seen

NEVER = float("inf")
# For one that was killed to be gone: it may have much memory to give back, or a driver keeps it.
# With marker.PATIENCE it is less than the grace of `down`.
KILL_SECONDS = 2.5


class Runner:
    """Keeps one instance. All calls come from one thread: children end with the one that started
    them. `now` is time.monotonic()."""

    def __init__(self, instance: Server, asked: int, at: Folder, pace: Timing, news: Event) -> None:
        self.instance, self.at, self.pace, self.news = instance, at, pace, news
        self.seen = Seen(name=instance.name, state=WAITING, asked=asked)
        self.child: Child | None = None
        self.failures = 0
        self.until = NEVER  # when the present state has lasted too long
        self._why = ""  # we end it, if it is not to be stopped
        self.unwanted = False  # it is to be stopped, and not to be started again
        self._killed = False
        self._ready_since = self._ready_until = NEVER

    @property
    def is_over(self) -> bool:
        return self.seen.state in ENDED

    def renew(self, asked: int) -> None:
        """It was asked for again: what runs answers that, and what pauses does so no longer."""
        if self.unwanted or self.is_over:
            return
        self._is(self.seen.state, asked=asked)
        if self.seen.state == PAUSING:
            self.failures, self.until = 0, 0

    def begin(self, now: float) -> None:
        """Start it: it was its turn."""
        self._why, self._killed = "", False
        self._ready_since = self._ready_until = NEVER
        if not self.seen.restarts:  # a restart goes on in the same log
            set_aside(Path(self.instance.log_file))
        try:
            self.child = Child(self.instance, self.at, self.pace, self.news)
        except (PipelineError, OSError, RuntimeError, ValueError) as error:
            self.settle(End(why=f"failed start: {getattr(error, 'message', error)}"), now)
        else:
            self.until = now + self.instance.ready_timeout
            self._is(LOADING, pid=self.child.process.pid, started=self.child.started)

    def stop(self, now: float) -> None:
        """It is not wanted any more."""
        if self.child is None:
            self._is(STOPPED, reason="")
        elif not self.unwanted and self.seen.state != STOPPING:
            self._end(now)
        self.unwanted = True

    def kill(self, now: float) -> None:
        """Do not wait for it any longer."""
        if self.child and not self._killed:
            self._killed = True
            self.until = now + KILL_SECONDS
            self.child.kill()

    def look(self, now: float) -> End | None:
        """Go on where the present state has lasted too long; how its child has ended, if so."""
        late = now >= self.until
        if self.child is None:
            if self.seen.state == PAUSING and late:
                self._is(WAITING, restarts=self.seen.restarts + 1)
            return None
        self._hear(self.child.said, now)
        status = self.child.status()
        if status is None and not (late and self._killed):
            if late and self.seen.state == LOADING:
                self._why = f"failed start: not ready after {self.instance.ready_timeout:g} s"
                self._end(now)
            elif late:
                self.kill(now)
            return None
        return End(
            status=status,
            why=self._why or ("" if status is not None else "it was killed, and does not end"),
            was_ready=self._ready_since < NEVER,
            was_steady=min(now, self._ready_until) - self._ready_since >= self.pace.steady_after,
        )

    def settle(self, end: End, now: float) -> None:
        """It has ended, or could not be started: what it is now."""
        lines = self.child.finish() if self.child else ""
        self.child = None
        if self.unwanted:
            self._is(STOPPED, pid=None, started=None, ready_at=None, reason="")
            return
        verdict = decide(self.instance, end, self.failures, self.pace)
        self.failures, self.until = verdict.failures, now + verdict.pause
        reason = f"{verdict.reason}:\n{lines}" if lines else verdict.reason
        self._is(verdict.state, pid=None, started=None, ready_at=None, reason=reason)

    def _hear(self, word: str, now: float) -> None:
        """What was seen of its child from outside."""
        if word and self.seen.state == LOADING:
            self.until, self._ready_since = NEVER, now
            self._is(READY, ready_at=time.time())
        elif word == client.STUCK and self.seen.state == READY:
            self._why = f"stuck: no token within {self.instance.probe_timeout:g} s"
            # it may have been so ever since it was last looked at
            self._ready_until = now - self.pace.probe_every - self.instance.probe_timeout
            self._is(STOPPING)
            self.kill(now)

    def _end(self, now: float) -> None:
        self._is(STOPPING)
        self.until = now + self.instance.stop_timeout
        if self.child:
            self.child.ask_to_stop()

    def _is(self, state: str, **more: Any) -> None:
        self.seen = replace(self.seen, state=state, **more)
