"""How a program that was started is asked to end, or is ended."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

Started = subprocess.Popen[bytes]


@contextmanager
def running(process: Started) -> Iterator[Started]:
    """However the block ends, the process has ended after it."""
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()


def ask_to_stop(process: Started, *, group: bool = False) -> None:
    """SIGTERM, with `group` to all of its own group; on Windows always Ctrl-Break to that group."""
    if group and os.name != "nt":
        os.killpg(process.pid, signal.SIGTERM)
    else:
        process.send_signal(signal.CTRL_BREAK_EVENT if os.name == "nt" else signal.SIGTERM)  # type: ignore[attr-defined,unused-ignore]


def group_is_empty(process: Started) -> bool:
    """Whether nothing that lives is left of the group that `own_group` made; on Windows nobody
    knows."""
    if os.name == "nt":
        return True
    try:
        os.killpg(process.pid, 0)
    except (ProcessLookupError, PermissionError):
        return True
    import psutil

    for one in psutil.process_iter():  # in a container that has no init, zombies stay
        with contextlib.suppress(psutil.Error, OSError):
            if os.getpgid(one.pid) == process.pid and one.status() != psutil.STATUS_ZOMBIE:
                return False
    return True


def end_group(process: Started) -> None:
    """Kill what is left of the group of a process that was started with `own_group`."""
    if os.name == "nt":  # its job ends with the last handle to it
        process.job.Close()  # type: ignore[attr-defined]
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
