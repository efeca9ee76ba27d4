"""The main process of a container: starts its servers, waits, and stops them in time.

The servers of a file are started in the background, all files at once, each by `doit up`. Then the
given command runs, or a profile is served in the foreground, or the process waits for the servers
to end. The container ends with that; before, all servers are stopped.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from pipeline.core import log, paths
from pipeline.core.errors import PipelineError, UsageError
from pipeline.core.paths import REPOSITORY, user_folder
from pipeline.core.process import Process, become, start_attached
from pipeline.serve.server import service
from pipeline.serve.stopping import asked_to_stop, stay
from pipeline.serve.supervisor import control, liveness, state
from pipeline.serve.supervisor.state import ENDED, FAILED, Folder

from . import health, package
from .boot import Boot, BootSource

WATCH_SECONDS = 0.5
COMMAND_SECONDS = 5.0  # for a command to end after a signal
NOTICE = "INFER_DEV_NOTICE"  # a file that is shown at every login, where people can log in
NOTHING = "nothing to start and no command to run"


def run(boot: Boot, environ: Mapping[str, str]) -> int:
    """Do all of it, to its end; the exit status. Raises PipelineError."""
    install(boot)
    if not boot.sources and not boot.command:
        raise UsageError(NOTHING, "docs/container.md lists the variables; or name a command")
    if not boot.sources:
        become(boot.command, env=environ)
    require_startable(boot, environ)
    for name in service(environ).values():
        log.info(f"service: {name}")
    with asked_to_stop() as stops:
        return Container(boot, environ, stops).run()


def require_startable(boot: Boot, environ: Mapping[str, str]) -> None:
    """Raise PipelineError where the command or the profile, which come last, is not there: servers
    may take minutes to load before them."""
    if boot.command and not shutil.which(boot.command[0], path=environ.get("PATH")):
        raise PipelineError(f"{boot.command[0]}: there is no such program, or it may not be run")
    if len(boot.sources) > 1 and boot.sources[-1].is_profile:
        health.of_profile(environ)


def up(boot: Boot, environ: Mapping[str, str]) -> int:
    """Start the servers and leave them running; the exit status. Raises PipelineError."""
    install(boot)
    with asked_to_stop() as stops:
        return _up(boot.sources, environ, stops)


def install(boot: Boot) -> None:
    """Install the package, if one is named. Raises PipelineError."""
    if boot.package:
        package.get(Path(boot.package), paths.home())


def notify(environ: Mapping[str, str], why: str) -> bool:
    """Leave a notice for people who log in. Returns whether people can log in."""
    if not (file := environ.get(NOTICE)):
        return False
    text = f"The start of this container failed, and not all servers are up: {why}\n"
    try:
        Path(file).write_text(text, encoding="utf-8")
    except OSError as error:
        log.info(f"warning: {NOTICE}={file}: cannot be written: {error.strerror}")
    return True


def doit(*words: str) -> list[str]:
    """The command line of doit, to be run in REPOSITORY."""
    return [sys.executable, "-m", "doit", *words]


def for_doit(env: Mapping[str, str]) -> dict[str, str]:
    """Its environment: relative paths start at our working directory."""
    return {**env, "LLAMA_PIPELINE_CWD": str(user_folder())}


class Container:
    """The servers of one container. `stops` grows by one with each request to stop."""

    def __init__(self, boot: Boot, env: Mapping[str, str], stops: list[int]) -> None:
        self.command, self.env, self.stops = boot.command, env, stops
        profiles = () if boot.command else tuple(x for x in boot.sources if x.is_profile)
        self.foreground = profiles[0] if profiles else None
        self.background = [source for source in boot.sources if source != self.foreground]
        self._pool = ThreadPoolExecutor()
        self._stopping: list[Future[list[str]]] = []

    @property
    def folders(self) -> list[Folder]:
        return [state.folder(paths.home(), source.name) for source in self.background]

    def run(self) -> int:
        """Start, wait, stop; the exit status."""
        try:
            status = _up(self.background, self.env, self.stops)
            if self.stops:
                return 0
            plans = ", or ".join(f"doit plan {' '.join(x.words)}" for x in self.background)
            why = f"the container's log has the reason, and so has {plans}"
            if status and not (self.command and notify(self.env, why)):
                return status
            if warning := health.unreachable(self.folders, self.foreground, self.env):
                log.info(f"warning: {warning}")
            if self.command:
                return self.stay(start_attached(self.command, env=self.env), COMMAND_SECONDS)
            if self.foreground:
                return self.stay(_doit("serve", *self.foreground.words, env=self.env))
            return self.watch()
        finally:
            self.stop()

    def stay(self, process: Process, patience: float = float("inf")) -> int:
        """Wait for a process; the first signal also stops the servers. Ctrl-C in a terminal goes to
        a command alone: it may just cancel a line."""

        def noticed(number: int) -> bool:
            if self.command and number == signal.SIGINT and os.isatty(0):
                return False
            self.begin_to_stop()
            return True

        return _as_shell(stay([process], self.stops, patience=patience, noticed=noticed))

    def watch(self) -> int:
        """Wait for the end of all servers, or for a signal. Raises PipelineError if one failed."""
        while not self.stops:
            statuses = [status for at in self.folders for status in _statuses(at)]
            if all(status.state in ENDED for status in statuses):
                failed = [f"{x.name}: {x.reason}" for x in statuses if x.state == FAILED]
                if failed:
                    raise PipelineError("\n".join(failed))
                log.info("no server is left")
                return 0
            time.sleep(WATCH_SECONDS)
        return 0

    def begin_to_stop(self) -> None:
        """Start stopping the servers, those of each file in a thread."""
        if not self._stopping:
            self._stopping = [self._pool.submit(_down, at) for at in self.folders]

    def stop(self) -> None:
        """Stop them, and wait until they have stopped."""
        self.begin_to_stop()
        names = [each.result() for each in self._stopping]
        if any(names):
            log.info("stopped")


def _down(at: Folder) -> list[str]:
    """Stop the servers of a configuration; return their names. Errors are logged."""
    try:
        return control.down(at)
    except (PipelineError, OSError) as error:
        log.info(f"error: {at.path}: {error}")
        return []


def _doit(*words: str, env: Mapping[str, str]) -> Process:
    return start_attached(doit(*words), env=for_doit(env), cwd=REPOSITORY)


def _up(sources: Sequence[BootSource], env: Mapping[str, str], stops: Sequence[int]) -> int:
    """Start the servers of each file; the exit status of the first `doit up` that failed."""
    processes = [_doit("up", *source.words, "background=1", env=env) for source in sources]
    return _as_shell(stay(processes, stops))


def _as_shell(status: int) -> int:
    """An exit status as shells report it: 128 and the number of the signal that killed it."""
    return 128 - status if status < 0 else status


def _statuses(at: Folder) -> tuple[state.ServerStatus, ...]:
    """The servers of a configuration; none where they were stopped by hand. Raises PipelineError
    where their supervisor is gone."""
    if current := liveness.living(at):
        return current.instances
    wanted = state.read_wanted(at)
    if wanted and not wanted.instances:
        return ()
    if liveness.is_running(at):
        return (state.ServerStatus(name="", state=state.WAITING),)
    raise PipelineError("the supervisor is gone, and the servers with it", f"its log is {at.log}")
