"""Kills at any instant."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator

import psutil
from seeds import dice


class Kills:
    """How often, and after what time, a test of kills at any instant tries: more often, and later,
    where the machine is so busy that kills come before anything was done."""

    def __init__(self, times: int, seconds: float, enough: Callable[[], bool]) -> None:
        self.times, self.seconds, self.enough = times, seconds, enough
        self.chance = dice()

    def __iter__(self) -> Iterator[int]:
        """The number of each try."""
        for number in range(10 * self.times):
            if number >= self.times:
                if self.enough():
                    return
                self.seconds *= 1.2
            yield number
        assert self.enough(), "no kill came at an instant that shows anything"

    def wait(self) -> None:
        time.sleep(self.chance.uniform(0, self.seconds))


def kill_all(process: subprocess.Popen[str]) -> None:
    """Kill doit and all that it started, as a power cut does: nothing gets to tidy up."""
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, signal.SIGKILL)
