"""The one process that keeps the servers of a configuration.

    python -m pipeline.serve.supervisor.supervisor FOLDER PACE

It reads what is wanted whenever that file changes, makes it so, and writes what is there. It ends
when nothing is wanted any more, or when it is asked to; its servers never outlive it. PACE is a
JSON object with fields of `policy.Pace`.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from threading import Event

import psutil
from filelock import FileLock, Timeout

from pipeline.core.environment import own
from pipeline.core.errors import PipelineError
from pipeline.core.paths import REPOSITORY
from pipeline.core.process import Process, allow_many_files, start_detached
from pipeline.serve.logfile import Log
from pipeline.serve.server import Server
from pipeline.serve.stopping import asked_to_stop

from . import marker
from .policy import Timing
from .runner import Runner
from .state import (
    LOADING,
    WAITING,
    DesiredState,
    Folder,
    Seen,
    Stamp,
    State,
    by_name,
    read_wanted,
    stamp,
    write_state,
)

WARDEN_SECONDS = 1.0  # between two starts of a warden, should it end
LOCK_SECONDS = 5.0  # others look at the lock for an instant; who holds it longer is a supervisor
Changed = Callable[[Server, Seen], None]


class Supervisor:
    """Keeps what is wanted, in one thread; others set `news` where they have seen something."""

    def __init__(self, at: Folder, pace: Timing, changed: Changed) -> None:
        self.at, self.pace, self.changed = at, pace, changed
        self.keepers: dict[str, Runner] = {}
        self.news = Event()
        self.note, self._noted = Log(at.log, pace.log_bytes), ""
        self.wanted = DesiredState(config="")
        self.told: dict[str, Seen] = {}
        self.warden: Process | None = None
        self._read: Stamp = None
        self._wrote: tuple[State, Stamp] | None = None
        self._next_warden = 0.0
        self._we = State(pid=os.getpid(), started=marker.start_time(os.getpid()), asked=0)
        self._lock = at.lock.stat().st_ino

    def run(self) -> None:
        """Until nothing is wanted, or a signal asks to stop; a second one kills."""
        try:
            with asked_to_stop() as stops:
                self.take_over()
                while self.tried(stops):
                    self.news.wait(self.pace.tick)
                    self.news.clear()
        finally:  # nothing is left even where we fail
            marker.end_all(self.at)
            if self.warden:
                self.warden.kill()

    def tried(self, stops: list[int]) -> bool:
        """One step. One that goes wrong is tried again: the servers need not end for it."""
        try:
            return self.step(time.monotonic(), len(stops))
        except Exception:
            self.say(f"went wrong, and is tried again:\n{traceback.format_exc().rstrip()}")
            return True

    def step(self, now: float, stops: int) -> bool:
        """Bring what is there nearer to what is wanted; False where nothing is left to do."""
        self.watch_warden(now)
        self.read(stops > 0 or self.is_replaced())
        self.reconcile(now)
        for keeper in self.keepers.values() if stops > 1 else ():
            keeper.kill(now)
        self.go_on(now)
        over = all(keeper.is_over for keeper in self.keepers.values())
        done = over and not self.wanted.instances
        self.publish()
        if done:
            self.say("asked to stop" if stops else "nothing is wanted any more")
        return not done

    def take_over(self) -> None:
        """End what a killed supervisor left; this process and its launcher are spared."""
        spared = [os.getpid()]
        with contextlib.suppress(psutil.Error, OSError):
            spared += [parent.pid for parent in psutil.Process().parents()]
        if count := marker.end_all(self.at, keepers=True, spare=spared):
            self.say(f"ended {count} processes that an earlier supervisor left")

    def is_replaced(self) -> bool:
        """Whether somebody removed the folder, and with it the lock: another one may begin."""
        try:
            return self.at.lock.stat().st_ino != self._lock
        except FileNotFoundError:
            return True
        except OSError:  # the disk itself is gone
            return False

    def watch_warden(self, now: float) -> None:
        if now < self._next_warden or (self.warden and self.warden.poll() is None):
            return
        self._next_warden = now + WARDEN_SECONDS
        words = [sys.executable, "-m", "pipeline.serve.supervisor.reaper", str(self.at.path)]
        env = own(os.environ) | {marker.VARIABLE: self.at.marker}
        try:
            self.warden = start_detached(words, log=self.at.log, env=env, cwd=REPOSITORY, tied=True)
        except PipelineError as error:
            self.say(f"no warden: {error.message}; tried again")

    def read(self, stopping: bool) -> None:
        """Learn what is wanted, where that is news."""
        current = stamp(self.at.wanted)
        if stopping:
            self.wanted = DesiredState(config=self.wanted.config, asked=self.wanted.asked)
        elif current != self._read:
            if wanted := read_wanted(self.at):
                self._read, self.wanted = current, wanted
            else:
                self.say(f"{self.at.wanted}: missing or damaged; what runs is kept")

    def reconcile(self, now: float) -> None:
        """Equal: kept. Changed, or gone: stopped first. What had ended is tried again if asked."""
        wanted = by_name(self.wanted.instances)
        for name, keeper in self.keepers.items():
            if keeper.instance != wanted.get(name):
                keeper.stop(now)
            elif keeper.seen.asked != self.wanted.asked:
                keeper.renew(self.wanted.asked)
        for name, instance in wanted.items():
            there, asked = self.keepers.get(name), self.wanted.asked
            if there is None or (
                there.is_over and (there.instance, there.seen.asked) != (instance, asked)
            ):
                self.keepers[name] = Runner(instance, asked, self.at, self.pace, self.news)

    def go_on(self, now: float) -> None:
        """What has ended is settled, with all that it left behind; whose turn it is begins."""
        ends = {name: end for name, keeper in self.keepers.items() if (end := keeper.look(now))}
        if ends:
            values = {marker.server(self.at.marker, name) for name in ends}
            marker.end(self.at, values.__contains__)
        for name, end in ends.items():
            self.keepers[name].settle(end, time.monotonic())
        most = self.wanted.max_loading or len(self.keepers)
        keepers = self.keepers.values()
        ports = {keeper.instance.port for keeper in keepers if keeper.unwanted and keeper.child}
        for keeper in [self.keepers[one.name] for one in self.wanted.instances]:
            loading = sum(one.seen.state == LOADING for one in keepers)
            free = keeper.instance.port not in ports  # else whoever had it is about to go
            if keeper.seen.state == WAITING and free and loading < most:
                keeper.begin(time.monotonic())

    def publish(self) -> None:
        """Tell and write what is there, if it is news; again where it cannot be written."""
        for name in by_name(self.wanted.instances) | self.keepers:
            before, now = self.told.get(name), self.keepers[name].seen
            if before != now:
                self.told[name] = now
                news = now.reason if before is None or before.reason != now.reason else ""
                self.say(f"{name}: {now.state}{news and f': {news}'}")
                with contextlib.suppress(OSError, ValueError):  # whom it is told to is gone
                    self.changed(self.keepers[name].instance, now)
        seen = tuple(self.told[name] for name in by_name(self.wanted.instances) | self.keepers)
        state = replace(self._we, asked=self.wanted.asked, instances=seen)
        if (state, stamp(self.at.state)) != self._wrote:
            try:
                write_state(self.at, state)
                self._wrote = state, stamp(self.at.state)
            except OSError as error:
                self.say(f"{self.at.state}: {error.strerror}; tried again")

    def say(self, text: str) -> None:
        """Into the log; what is tried again and again is said once."""
        if text != self._noted:
            self._noted = text
            self.note(f"{datetime.now().astimezone():%F %T} {text}")


def supervise(at: Folder, pace: Timing, changed: Changed = lambda instance, seen: None) -> bool:
    """Be the supervisor, in the main thread. False where there is another one."""
    allow_many_files()  # each server takes a pipe, a log and now and then a connection
    lock = FileLock(at.lock, timeout=LOCK_SECONDS, mode=0o600)
    try:
        with lock:
            Supervisor(at, pace, changed).run()
    except Timeout:
        return False
    return True


def main() -> None:
    supervise(Folder(Path(sys.argv[1])), Timing(**json.loads(sys.argv[2])))


if __name__ == "__main__":
    main()
