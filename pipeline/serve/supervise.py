"""One server in the foreground, or beside what we do: started, watched until it is ready, stopped
in time.

States: loading (503 or no answer), ready (200 on /health), stopping, gone. A first Ctrl-C,
SIGTERM or closed terminal asks the server to end; a second one, or the end of the grace period,
kills it. The server never outlives this process (see core/process).
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pipeline.core.errors import PipelineError
from pipeline.core.log import info
from pipeline.core.process import Process, shown, start
from pipeline.core.process.stop import ask_to_stop, end_group, running

from . import health, sandbox
from .guard.port import taken
from .logfile import Log, pumped, quoted, set_aside, trouble
from .server import Server
from .stopping import asked_to_stop, how

POLL_SECONDS = 0.02
KEPT_LINES = 200


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
    with asked_to_stop() as stops, _started(server, env, to_terminal) as (process, last, _):
        is_up = False
        while process.poll() is None and not stops:
            if is_up:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=0.2)
            elif health.is_ready(server.address, server.port, server.health, tls=server.tls):
                is_up = True
                ready(time.monotonic() - began, "\n".join(last))
            elif time.monotonic() - began > server.ready_timeout:
                break
            else:
                time.sleep(POLL_SECONDS)
        status = process.poll()
        if status is None:
            _stop(process, stops, server.stop_timeout)
    if stops:
        info("stopped")
        return
    raise _ended(server, status, last, is_up)


@contextmanager
def beside(server: Server, *, env: Mapping[str, str]) -> Iterator[Callable[[], None]]:
    """Run the server while the block runs, which begins once it is ready; its output goes to its
    log alone. Yields a function that raises PipelineError where it has ended by itself. Raises
    PipelineError where it ends, or is not ready in time."""
    deadline = time.monotonic() + server.ready_timeout
    with _started(server, env, lambda line: None) as (process, last, pump):
        is_up = False

        def require_running() -> None:
            if (status := process.poll()) is not None:
                pump.join(timeout=2)  # for its last words
                raise _ended(server, status, last, is_up)

        try:
            while not health.is_ready(server.address, server.port, server.health, tls=server.tls):
                require_running()
                if time.monotonic() > deadline:
                    raise _ended(server, None, last, is_up)
                time.sleep(POLL_SECONDS)
            is_up = True
            yield require_running
        finally:
            if process.poll() is None:
                _stop(process, [], server.stop_timeout)


@contextmanager
def _started(
    server: Server, env: Mapping[str, str], show: Callable[[str], None]
) -> Iterator[tuple[Process, deque[str], threading.Thread]]:
    """The server's process, its last lines, and the thread that reads them: each goes to its log
    and to `show`. After the block nothing is left of it."""
    log_file = Path(server.log_file)
    with ExitStack() as stack:
        port = stack.enter_context(contextlib.closing(taken(server)))
        command = port.command()
        show(f"+ {shown(command)}")
        if why := trouble(log_file):
            raise PipelineError(f"no log can be written: {why}")
        set_aside(log_file)
        last: deque[str] = deque(maxlen=KEPT_LINES)
        log = stack.enter_context(contextlib.closing(Log(log_file)))
        process = stack.enter_context(
            running(
                lambda: start(
                    command,
                    env=env,
                    cwd=Path(server.folder),
                    own_group=True,
                    killed_with_us=True,
                    sandbox=sandbox.policy(server, port.folder),
                )
            )
        )
        pump = pumped(process, last.append, log, show)
        port.serve()
        try:
            yield process, last, pump
        finally:
            end_group(process)  # what it started itself goes with it
            pump.join(timeout=2)


def _ended(server: Server, status: int | None, last: deque[str], is_up: bool) -> PipelineError:
    """Why a server that was not asked to stop has ended; without a status it was never ready."""
    end = f":\n{quoted(last)}" if last else ""
    if status is None:
        return PipelineError(
            f"the server was not ready after {server.ready_timeout:g} s and was stopped{end}",
            f"give it more: ready_timeout=…; the log is {server.log_file}",
        )
    when = "after it was ready" if is_up else "before it was ready"
    return PipelineError(
        f"the server ended {when}, {how(status)}{end}", f"the log is {server.log_file}"
    )


def _stop(process: subprocess.Popen[bytes], stops: list[int], stop_timeout: float) -> None:
    requests = len(stops)
    ask_to_stop(process)
    deadline = time.monotonic() + stop_timeout
    while process.poll() is None:
        if time.monotonic() > deadline or len(stops) > max(requests, 1):
            info("it does not stop by itself; killing it")
            process.kill()
            process.wait()
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.1)
