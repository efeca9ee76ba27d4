"""The one process that keeps the servers of a configuration running.

    python -m pipeline.serve.supervisor.supervisor FOLDER TIMING

It reads the desired state whenever that file changes, brings the servers to it, and writes their
actual state. It ends when no server is wanted any more, or on a signal; its servers never outlive
it. TIMING is a JSON object with the fields of `policy.Timing`.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import traceback
from datetime import datetime
from pathlib import Path
from threading import Event

import psutil
from msgspec.structs import replace

from pipeline.core import lazy
from pipeline.core.environment import own
from pipeline.core.errors import PipelineError
from pipeline.core.paths import REPOSITORY
from pipeline.core.process import Process, allow_many_files, start_detached
from pipeline.serve import served
from pipeline.serve.logfile import Log
from pipeline.serve.stopping import asked_to_stop

from . import marker, slots
from .environment import load_for
from .liveness import is_replaced, only_supervisor
from .loading import Scheduler
from .policy import Timing
from .runner import Runner
from .state import (
    LOADING,
    READY,
    DesiredState,
    Folder,
    Report,
    ServerStatus,
    Stamp,
    State,
    begun,
    read_wanted,
    remove_unfinished,
    servers_of,
    stamp,
    write_state,
)

REAPER_SECONDS = 1.0  # between two starts of the reaper, should it end


class Supervisor:
    """Runs the wanted servers, in one thread; other threads set `news` to wake it."""

    def __init__(self, at: Folder, timing: Timing, changed: Report) -> None:
        self.at, self.timing, self.changed = at, timing, changed
        self.runners: dict[str, Runner] = {}
        self.news = Event()
        self.scheduler = Scheduler(at, timing, self.news)
        self._write_log, self._last_logged = Log(at.log, timing.log_bytes), ""
        self.wanted = DesiredState(config="")
        self.reported: dict[str, ServerStatus] = {}
        self.reaper: Process | None = None
        self._wanted_stamp: Stamp = None
        self._written: tuple[State, Stamp] | None = None
        self._next_reaper = 0.0
        self._own_state = begun(os.getpid(), marker.start_time(os.getpid()))
        self._lock = at.lock.stat().st_ino

    def run(self) -> None:
        """Run until no server is wanted, or a signal asks to stop; a second signal kills."""
        try:
            with asked_to_stop() as stops:
                self.end_leftovers()
                while self.try_step(stops):
                    self.news.wait(self.scheduler.tick(self.wanted))
                    self.news.clear()
        finally:  # leave nothing behind even after an internal error
            marker.end_all(self.at)
            if self.reaper:
                self.reaper.kill()

    def try_step(self, stops: list[int]) -> bool:
        """One step. One that fails is tried again: the servers need not end for it."""
        try:
            return self.step(time.monotonic(), len(stops))
        except Exception:
            self.log(f"internal error, trying again:\n{traceback.format_exc().rstrip()}")
            return True

    def step(self, now: float, stops: int) -> bool:
        """Bring the servers closer to the desired state; False where nothing is left to do."""
        self.keep_reaper(now)
        self.read_wanted(stops > 0 or is_replaced(self.at, self._lock))
        self.reconcile(now)
        self.scheduler.step(self.wanted, self.runners)
        for runner in self.runners.values() if stops > 1 else ():
            runner.kill(now)
        self.advance(now)
        done = not self.wanted.instances and all(x.is_over for x in self.runners.values())
        self.publish()
        if done:
            if not stops:  # after a signal they may come back
                slots.forget(self.at)
            self.log("asked to stop" if stops else "no server is wanted any more")
        return not done

    def end_leftovers(self) -> None:
        """End what a killed supervisor left behind, except this process and its launcher."""
        spared = [os.getpid()]
        with contextlib.suppress(psutil.Error, OSError):
            spared += [parent.pid for parent in psutil.Process().parents()]
        if count := marker.end_all(self.at, supervisor_too=True, spare=spared):
            self.log(f"ended {count} processes that an earlier supervisor left")
        remove_unfinished(self.at)

    def keep_reaper(self, now: float) -> None:
        if now < self._next_reaper or (self.reaper and self.reaper.poll() is None):
            return
        self._next_reaper = now + REAPER_SECONDS
        words = [sys.executable, "-m", "pipeline.serve.supervisor.reaper", str(self.at.path)]
        env = own(os.environ) | {marker.VARIABLE: self.at.marker}
        try:
            self.reaper = start_detached(words, log=self.at.log, env=env, cwd=REPOSITORY, tied=True)
        except PipelineError as error:
            self.log(f"no reaper: {error.message}; trying again")

    def read_wanted(self, stopping: bool) -> None:
        """Read the desired state where its file changed."""
        wanted_stamp = stamp(self.at.wanted)
        if stopping:
            self.wanted = DesiredState(config=self.wanted.config, asked=self.wanted.asked)
        elif wanted_stamp != self._wanted_stamp:
            if wanted := read_wanted(self.at):
                self._wanted_stamp, self.wanted = wanted_stamp, wanted
            else:
                self.log(f"{self.at.wanted}: missing or damaged; the servers keep running")

    def reconcile(self, now: float) -> None:
        """Keep what is unchanged, stop what changed or is no longer wanted, start what is new; what
        had ended is started again on a new request."""
        wanted = servers_of(self.wanted)
        for name, runner in self.runners.items():
            if not runner.instance.is_as(wanted.get(name)):
                runner.stop(now)
            elif runner.status.asked != self.wanted.asked:
                runner.request_again(self.wanted.asked)
        for name, instance in wanted.items():
            current, request = self.runners.get(name), self.wanted.asked
            if current is None or (
                current.is_over and (current.instance, current.status.asked) != (instance, request)
            ):
                load_for(instance)
                self.runners[name] = Runner(instance, request, self.at, self.timing, self.news)

    def advance(self, now: float) -> None:
        """Clean up after servers that have ended; start those whose turn it is."""
        ends = {name: end for name, runner in self.runners.items() if (end := runner.poll(now))}
        if ends:
            values = {marker.server(self.at, name) for name in ends}
            marker.end(self.at, values.__contains__)
        for name, end in ends.items():
            self.runners[name].finish(end, time.monotonic())
        limit = self.wanted.max_loading or len(self.runners)
        ports = {x.instance.port for x in self.runners.values() if x.unwanted and x.child}
        for runner in [self.runners[instance.name] for instance in self.wanted.instances]:
            loading = sum(x.status.state == LOADING for x in self.runners.values())
            is_free = runner.instance.port not in ports  # else its last user is still stopping
            if self.scheduler.admits(runner) and is_free and loading < limit:
                runner.start(time.monotonic())

    def publish(self) -> None:
        """Report and write what has changed; retry where it cannot be written."""
        names = servers_of(self.wanted) | self.runners
        for name in names:
            before, now = self.reported.get(name), self.runners[name].status
            if before != now:
                self.reported[name] = now
                reason = now.reason if before is None or before.reason != now.reason else ""
                self.log(f"{name}: {now.state}{reason and f': {reason}'}")
                if now.state == READY:
                    served.record(self.at.run, self.runners[name].instance)
                with contextlib.suppress(OSError, ValueError):  # its terminal is gone
                    self.changed(self.runners[name].instance, now)
        statuses = tuple(self.reported[name] for name in names)
        state = replace(self._own_state, asked=self.wanted.asked, instances=statuses)
        if (state, stamp(self.at.state)) != self._written:
            try:
                write_state(self.at, state)
                self._written = state, stamp(self.at.state)
            except OSError as error:
                self.log(f"{self.at.state}: {error.strerror}; trying again")

    def log(self, text: str) -> None:
        """Write to the log, but a repeated message once."""
        if text != self._last_logged:
            self._last_logged = text
            self._write_log(f"{datetime.now().astimezone():%F %T} {text}")


def supervise(at: Folder, timing: Timing, changed: Report = lambda instance, status: None) -> bool:
    """Be the supervisor, in the main thread. False where another one is running."""
    allow_many_files()  # each server takes a pipe, a log file and at times a connection
    with only_supervisor(at) as is_only:
        if is_only:
            Supervisor(at, timing, changed).run()
    return is_only


def main() -> None:
    lazy.load_all()
    supervise(Folder(Path(sys.argv[1])), Timing(**json.loads(sys.argv[2])))


if __name__ == "__main__":
    main()
