"""Ask a program to end, or kill it, also when it hangs or does not end in time."""

from __future__ import annotations

import atexit
import contextlib
import math
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Started = subprocess.Popen[bytes]


_running: set[Started] = set()
_starting = threading.Lock()


@contextmanager
def running(start: Callable[[], Started]) -> Iterator[Started]:
    """Start a process that has ended after the block, however the block ends; also where it runs on
    a thread that this process does not wait for."""
    with _starting:  # one that is started while this process ends is not missed
        process = start()
        _running.add(process)
    try:
        yield process
    finally:
        _running.discard(process)
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()


@atexit.register
def _end_running() -> None:
    _starting.acquire()  # and never given back: nothing is started any more
    for process in [*_running]:
        process.terminate()
        end_group(process)


def ask_to_stop(process: Started, *, group: bool = False) -> None:
    """Send SIGTERM, with `group` to its whole group; on Windows always Ctrl-Break to that group."""
    if group and os.name != "nt":
        os.killpg(process.pid, signal.SIGTERM)
    else:
        process.send_signal(signal.CTRL_BREAK_EVENT if os.name == "nt" else signal.SIGTERM)  # type: ignore[attr-defined,unused-ignore]


def group_is_empty(process: Started) -> bool:
    """Whether the group that `own_group` made has no live process left; always true on Windows."""
    if os.name == "nt":
        return True
    try:
        os.killpg(process.pid, 0)
    except (ProcessLookupError, PermissionError):
        return True
    import psutil

    for member in psutil.process_iter():  # in a container without init, zombies stay
        with contextlib.suppress(psutil.Error, OSError):
            if os.getpgid(member.pid) == process.pid and member.status() != psutil.STATUS_ZOMBIE:
                return False
    return True


def end_group(process: Started) -> None:
    """Kill what is left of the group that `own_group` made, where it did."""
    if os.name == "nt":  # its job ends with the last handle to it
        process.job.Close()  # type: ignore[attr-defined]
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


@contextmanager
def watched(
    process: Started, patience: float | None, timeout: float | None, write: Callable[[str], None]
) -> Iterator[Callable[[], None]]:
    """Yield a function to call at each sign of life: after `patience` seconds without one, or after
    `timeout` seconds, the process and its group are killed. With `patience` the group is killed at
    the end too: what was left behind."""
    heard, over = threading.Event(), threading.Event()
    end = math.inf if timeout is None else time.monotonic() + timeout
    silence = math.inf if patience is None else patience
    killed = ""  # why, to be written below all that it has printed

    def watch() -> None:
        nonlocal killed
        while heard.wait(min(silence, end - time.monotonic())):
            heard.clear()
            if over.is_set():
                return
        reason = f"printed nothing for {silence:g} s"
        if time.monotonic() >= end:
            reason = f"not ended after {timeout:g} s"
        killed = f"killed: it had {reason}"
        kill()

    def kill() -> None:
        process.kill()
        end_group(process)

    if patience is None and timeout is None:
        yield heard.set
        return
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield heard.set
    finally:
        over.set()
        heard.set()
        thread.join()
        if killed:
            write(killed)
        if patience is not None:
            kill()
