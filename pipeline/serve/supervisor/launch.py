"""The supervisor's process, as those see it who wait for what it does."""

from __future__ import annotations

import json
import os
import sys
import time

from msgspec import to_builtins

from pipeline.core.errors import PipelineError, doitw
from pipeline.core.paths import REPOSITORY, require_writable
from pipeline.core.process import Process, last_lines, start_detached

from . import marker
from .environment import for_supervisor
from .liveness import MODULE, is_running
from .policy import Timing
from .state import STOPPING, DesiredState, Folder, State, read_wanted

MAX_STARTS = 3  # of a supervisor that ends by itself
REACTION_SECONDS = 10.0  # for a running supervisor to read the desired state


class SupervisorWatch:
    """Starts a supervisor where none runs, and tells that one hangs."""

    def __init__(self, at: Folder, wanted: DesiredState, timing: Timing) -> None:
        self._at, self._wanted, self._timing = at, wanted, timing
        self._process: Process | None = None  # the last one that was started here
        self._starts = 0
        self._pid = 0  # of the supervisor whose state was last seen
        self._last_sign = self._last_check = time.monotonic()

    def check(self, state: State | None) -> None:
        """`state` is that of the living supervisor. Raises PipelineError where it ended again and
        again, has not read the desired state in time, or cannot write."""
        now = time.monotonic()
        started = self._process is not None and self._process.poll() is None
        if self._shows_a_sign(state):
            self._last_sign = now
        elif now > self._last_sign + REACTION_SECONDS and (started or is_running(self._at)):
            require_writable(self._at.path)  # else it cannot answer
            raise hangs(self._at)
        if not (state or started or is_running(self._at)):
            self._start()
        if now > self._last_check + REACTION_SECONDS:
            require_writable(self._at.path)  # else it cannot write that a server is ready
            self._last_check = now

    def _shows_a_sign(self, state: State | None) -> bool:
        """Whether it is another one than before, has read the desired state, or is busy stopping
        servers."""
        pid = state.pid if state else 0
        is_another, self._pid = pid != self._pid, pid
        if state is None or is_another:
            return is_another
        is_stopping = any(status.state == STOPPING for status in state.instances)
        return is_stopping or state.asked >= self._wanted.asked

    def _start(self) -> None:
        if self._starts == MAX_STARTS:
            log = self._at.log
            raise PipelineError(f"the supervisor ended by itself:\n{last_lines(log)}", f"see {log}")
        self._starts += 1
        self._last_sign = time.monotonic()
        self._process = start(self._at, self._timing)


def start(at: Folder, timing: Timing) -> Process:
    """Start one in the background."""
    wanted = read_wanted(at)
    env = for_supervisor(os.environ, wanted.instances if wanted else ())
    env |= {marker.VARIABLE: at.marker}
    words = [sys.executable, "-m", MODULE, str(at.path), json.dumps(to_builtins(timing))]
    return start_detached(words, log=at.log, env=env, cwd=REPOSITORY)


def hangs(at: Folder) -> PipelineError:
    """The error where a supervisor does not react."""
    return PipelineError(
        f"the supervisor does not react; its log is {at.log}", f"{doitw('down')}, then up again"
    )
