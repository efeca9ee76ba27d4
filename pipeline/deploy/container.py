"""What runs in a container: its servers are started, kept company, and stopped in time.

Servers of a file are started in the background, all files at once, each by `doit up`. Then the
given command runs, or a profile is served in the foreground, or there is nothing but to wait. The
container ends with that; before it does, all servers are stopped.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline.core import log, paths
from pipeline.core.errors import PipelineError, UsageError
from pipeline.core.paths import REPOSITORY, user_folder
from pipeline.core.process import Process, become, start_attached
from pipeline.serve.service import service
from pipeline.serve.stopping import asked_to_stop, pass_on
from pipeline.serve.supervisor import control, liveness, state
from pipeline.serve.supervisor.state import ENDED, FAILED, Folder

from . import health, package
from .boot import Boot, BootSource

TICK, LOOK = 0.05, 0.5  # seconds
COMMAND_SECONDS = 5.0  # that a command gets to end once it is asked to
NOTHING = "nothing to start and no command to run"


def run(boot: Boot, environ: Mapping[str, str]) -> int:
    """Do what is asked for, to its end; the exit status. Raises PipelineError."""
    env = prepared(boot, environ)
    if not boot.sources and not boot.command:
        raise UsageError(NOTHING, "docs/container.md lists the variables; or name a command")
    if not boot.sources:
        become(boot.command, env=env)
    for name in service(environ).values():
        log.info(f"service: {name}")
    with asked_to_stop() as stops:
        return Container(boot, env, stops).run()


def up(boot: Boot, environ: Mapping[str, str]) -> int:
    """Only start what is asked for; it goes on. The exit status. Raises PipelineError."""
    env = prepared(boot, environ)
    with asked_to_stop() as stops:
        return _ended([_up(source, env) for source in boot.sources], stops)


def prepared(boot: Boot, environ: Mapping[str, str]) -> dict[str, str]:
    """Install the package that is asked for; the environment of all that is started. Raises
    PipelineError."""
    if boot.package:
        package.get(Path(boot.package), paths.home())
    return dict(environ)


def doit(*words: str) -> list[str]:
    """doit as a program, which runs in REPOSITORY."""
    return [sys.executable, "-m", "doit", *words]


def for_doit(env: Mapping[str, str]) -> dict[str, str]:
    """The environment for it: relative paths start where we are."""
    return {**env, "LLAMA_PIPELINE_CWD": str(user_folder())}


class Container:
    """The servers of one container. `stops` grows by one with each request to stop."""

    def __init__(self, boot: Boot, env: Mapping[str, str], stops: list[int]) -> None:
        self.command, self.env, self.stops = boot.command, env, stops
        profiles = () if boot.command else tuple(one for one in boot.sources if one.is_profile)
        self.foreground = profiles[0] if profiles else None
        self.background = [one for one in boot.sources if one != self.foreground]
        self._stopping: threading.Thread | None = None

    @property
    def folders(self) -> list[Folder]:
        return [state.folder(paths.home(), one.name) for one in self.background]

    def run(self) -> int:
        """Start, stay, stop; the exit status."""
        try:
            status = _ended([_up(source, self.env) for source in self.background], self.stops)
            if status or self.stops:
                return 0 if self.stops else status
            if told := health.out_of_reach(self.folders, self.foreground, self.env):
                log.info(f"warning: {told}")
            if self.command:
                return self.stay(start_attached(self.command, env=self.env), COMMAND_SECONDS)
            if self.foreground:
                return self.stay(_doit("serve", self.foreground, self.env))
            return self.watch()
        finally:
            self.stop()

    def stay(self, process: Process, patience: float = float("inf")) -> int:
        """Stay with a process; each signal is passed on to it, the first one stops the servers
        too, and after `patience` seconds more it is killed. Ctrl-C in a terminal is for a command
        alone: it may only cancel a line."""
        told, deadline = 0, float("inf")
        while process.poll() is None:
            for number in self.stops[told:]:
                told += 1
                if self.command and number == signal.SIGINT and os.isatty(0):
                    continue
                if self._stopping is None:
                    deadline = time.monotonic() + patience
                    self.begin_to_stop()
                pass_on(process, number)
            if time.monotonic() > deadline:
                process.kill()
            time.sleep(TICK)
        return _status(process)

    def watch(self) -> int:
        """Stay until all servers have ended, or a signal comes. Raises PipelineError where they
        did not end well."""
        while not self.stops:
            seen = [one for at in self.folders for one in _seen(at)]
            if all(one.state in ENDED for one in seen):
                failed = [f"{one.name}: {one.reason}" for one in seen if one.state == FAILED]
                if failed:
                    raise PipelineError("\n".join(failed))
                log.info("no server is left")
                return 0
            time.sleep(LOOK)
        return 0

    def begin_to_stop(self) -> None:
        """Stop the servers in the background, meanwhile."""
        if self._stopping is None and self.background:
            self._stopping = threading.Thread(target=self._down_all)
            self._stopping.start()

    def stop(self) -> None:
        """Stop them; return once they have."""
        self.begin_to_stop()
        if self._stopping:
            self._stopping.join()

    def _down_all(self) -> None:
        with ThreadPoolExecutor() as pool:
            if any(pool.map(_down, self.folders)):
                log.info("stopped")


def _down(at: Folder) -> list[str]:
    """Stop the servers of a configuration; their names. What goes wrong is said."""
    try:
        return control.down(at)
    except (PipelineError, OSError) as error:
        log.info(f"error: {at.path}: {error}")
        return []


def _doit(task: str, source: BootSource, env: Mapping[str, str], *more: str) -> Process:
    return start_attached(doit(task, *source.words, *more), env=for_doit(env), cwd=REPOSITORY)


def _up(source: BootSource, env: Mapping[str, str]) -> Process:
    return _doit("up", source, env, "background=1")


def _ended(processes: Sequence[Process], stops: list[int]) -> int:
    """Wait for the end of all; the status of the first that failed, which ends the others. Signals
    are passed on."""
    told = failed = 0
    while living := [one for one in processes if one.poll() is None]:
        asked = list(stops[told:])
        told += len(asked)
        ended = [_status(one) for one in processes if one not in living]
        if not failed and (failed := next(filter(None, ended), 0)):
            asked.append(signal.SIGTERM)
        for process in living:
            for number in asked:
                pass_on(process, number)
        time.sleep(TICK)
    return failed or next(filter(None, map(_status, processes)), 0)


def _status(process: Process) -> int:
    code = process.returncode or 0
    return 128 - code if code < 0 else code


def _seen(at: Folder) -> tuple[state.ServerStatus, ...]:
    """The servers of a configuration; none where they were stopped by hand. Raises
    PipelineError where their supervisor is gone."""
    if found := liveness.living(at):
        return found.instances
    wanted = state.read_wanted(at)
    if wanted and not wanted.instances:
        return ()
    if liveness.is_running(at):
        return (state.ServerStatus(name="", state=state.WAITING),)
    raise PipelineError("the supervisor is gone, and the servers with it", f"its log is {at.log}")
