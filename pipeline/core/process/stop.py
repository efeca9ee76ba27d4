"""Ask a program to end, or kill it."""

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
    """After the block the process has ended, however the block ends."""
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
    """Kill what is left of the group that `own_group` made."""
    if os.name == "nt":  # its job ends with the last handle to it
        process.job.Close()  # type: ignore[attr-defined]
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
