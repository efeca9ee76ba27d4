"""One server in the foreground, or during a block of code: started, watched until it is ready,
stopped in time.

States: loading (503 or no answer), ready (200 on /health), stopping, gone. A first Ctrl-C,
SIGTERM or closed terminal asks the server to end; a second one, or the end of the grace period,
kills it. The server never outlives this process (see core/process).
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pipeline.core.errors import PipelineError
from pipeline.core.log import info
from pipeline.core.paths import CHOSEN_BY
from pipeline.core.process import KEPT_LINES, Process, shown
from pipeline.core.process.stop import ask_to_stop, end_group, running

from . import health
from .guard.port import taken
from .logfile import Log, pumped, quoted, set_aside, trouble
from .server import Server
from .stopping import asked_to_stop, how

POLL_SECONDS = 0.02


def foreground(
    server: Server, *, env: Mapping[str, str], ready: Callable[[float, str], None]
) -> None:
    """Run the server until it is asked to stop; `ready(seconds, output)` is called once it
    answers, with the end of what it has printed until then.

    Returns after a requested stop. Raises PipelineError where the server ends by itself, or is
    not ready in time.
    """

    def to_terminal(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    began = time.monotonic()
    with asked_to_stop() as stops, _started(server, env, to_terminal, stops) as started:
        try:
            started.until_ready()
            if not stops:
                ready(time.monotonic() - began, "\n".join(started.last_lines))
            while not stops:
                started.require_running()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    started.process.wait(timeout=0.2)
        except PipelineError:
            if not stops:
                raise
    info("stopped")


@contextmanager
def beside(server: Server, *, env: Mapping[str, str]) -> Iterator[Callable[[], None]]:
    """Run the server while the block runs, which begins once it is ready; its output goes to its
    log alone. Yields a function that raises PipelineError where it has ended by itself. Raises
    PipelineError where it ends, or is not ready in time."""
    with _started(server, env, lambda line: None, []) as started:
        started.until_ready()
        yield started.require_running


class _Started:
    """A server that was started. `stops` grows with each request to stop it."""

    def __init__(
        self,
        server: Server,
        process: Process,
        log: Log,
        show: Callable[[str], None],
        stops: list[int],
    ) -> None:
        self._server, self.process, self._stops = server, process, stops
        self.last_lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._pump = pumped(process, self.last_lines.append, log, show)
        self._is_up = False

    def until_ready(self) -> None:
        """Return once it is ready or to stop. Raises PipelineError where it ends, or is late."""
        deadline = time.monotonic() + self._server.ready_timeout
        while not (self._stops or health.is_ready(self._server)):
            self.require_running()
            if time.monotonic() > deadline:
                raise PipelineError(
                    f"the server was not ready after {self._server.ready_timeout:g} s and was "
                    f"stopped{self._quoted()}",
                    f"give it more: ready_timeout=…; the log is {self._server.log_file}",
                )
            time.sleep(POLL_SECONDS)
        self._is_up = not self._stops

    def require_running(self) -> None:
        """Raise PipelineError where it has ended."""
        if (status := self.process.poll()) is not None:
            self._pump.join(timeout=2)  # for its last words
            when = "after it was ready" if self._is_up else "before it was ready"
            raise PipelineError(
                f"the server ended {when}, {how(status)}{self._quoted()}",
                f"the log is {self._server.log_file}",
            )

    def _quoted(self) -> str:
        return f":\n{quoted(self.last_lines)}" if self.last_lines else ""

    def end(self) -> None:
        """Stop it, and end what it started itself. A second request kills it."""
        requests = len(self._stops)
        if self.process.poll() is None:
            ask_to_stop(self.process)
        deadline = time.monotonic() + self._server.stop_timeout
        while self.process.poll() is None:
            if time.monotonic() > deadline or len(self._stops) > max(requests, 1):
                info("it does not stop by itself; killing it")
                break
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=0.1)
        end_group(self.process)
        self._pump.join(timeout=2)


@contextmanager
def _started(
    server: Server, env: Mapping[str, str], show: Callable[[str], None], stops: list[int]
) -> Iterator[_Started]:
    """The server, whose output goes to its log and to `show`. It ends with the block."""
    log_file = Path(server.log_file)
    with ExitStack() as stack:
        port = stack.enter_context(contextlib.closing(taken(server)))
        command = port.command()
        show(f"+ {shown(command)}")
        if why := trouble(log_file):
            raise PipelineError(
                f"no log can be written: {why}",
                f"free some space, or set {CHOSEN_BY} to a folder that can be written to",
            )
        set_aside(log_file)
        log = stack.enter_context(contextlib.closing(Log(log_file)))
        process = stack.enter_context(running(lambda: port.start(command, env)))
        started = _Started(server, process, log, show, stops)
        stack.callback(started.end)
        port.serve()
        yield started
