"""A child ends with this process, however this process ends.

- Linux: the kernel kills it when its parent dies (`prctl(PR_SET_PDEATHSIG)`).
- Windows: it belongs to a job object that ends with the last handle to it.
- macOS and others: a small shell waits on a pipe that this process holds, and kills the child
  when the pipe closes.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable

from pipeline.core.errors import PipelineError
from pipeline.core.sandbox import Sandbox

PARENT_SECONDS = 0.5  # between two looks at the parent


def die_with(parent: int, killed: bool) -> Callable[[], None]:
    """For the child, between fork and exec: ask the kernel to end it when its parent ends."""
    import ctypes

    prctl = ctypes.CDLL(None).prctl  # looked up before the fork: after it, locks may be held
    death = int(signal.SIGKILL if killed else signal.SIGTERM)

    def ask() -> None:
        prctl(1, death)  # PR_SET_PDEATHSIG of linux/prctl.h
        if os.getppid() != parent:  # it ended before this call
            os._exit(1)

    return ask


def end_with_parent() -> None:
    """End this process once the one that started it has ended, whatever its other threads wait
    for."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def watch_from_outside(process: subprocess.Popen[bytes]) -> None:
    """Kill the child when the pipe that only this process holds open closes."""
    watch = subprocess.Popen(
        ["/bin/sh", "-c", 'cat >/dev/null; kill -KILL "$0" 2>/dev/null', str(process.pid)],
        stdin=subprocess.PIPE,
        env={"PATH": os.defpath},
        start_new_session=True,
    )
    reap = process.wait

    def wait(timeout: float | None = None) -> int:
        code = reap(timeout)
        watch.kill()  # before another process can get the child's number
        watch.wait()
        if watch.stdin:
            watch.stdin.close()
        return code

    process.wait = wait  # type: ignore[method-assign]


def put_in_job(process: subprocess.Popen[bytes], sandbox: Sandbox | None = None) -> None:
    """Windows: the job is closed, and its processes end, when this process ends.

    With `sandbox` it bounds the memory too, and the processes to this one.
    """
    import ctypes

    kernel = ctypes.WinDLL("kernel32", use_last_error=True)  # type: ignore[attr-defined,unused-ignore]
    kernel.CreateJobObjectW.restype = ctypes.c_void_p
    job = ctypes.c_void_p(kernel.CreateJobObjectW(None, None))
    # JOBOBJECT_EXTENDED_LIMIT_INFORMATION is 144 bytes on 64-bit Windows; LimitFlags is at
    # byte 16 of it. 0x2000 is JOB_OBJECT_LIMIT_KILL_ON_JOB_CLOSE, 9 the class of the structure.
    limits = (ctypes.c_uint32 * 36)()
    limits[4] = 0x2000
    if sandbox:
        limits[4] |= 0x8  # JOB_OBJECT_LIMIT_ACTIVE_PROCESS, at byte 40
        limits[10] = 1
    if sandbox and sandbox.memory:
        limits[4] |= 0x200  # JOB_OBJECT_LIMIT_JOB_MEMORY, 8 bytes at byte 120
        limits[30], limits[31] = sandbox.memory & 0xFFFFFFFF, sandbox.memory >> 32
    handle = ctypes.c_void_p(int(process._handle))  # type: ignore[attr-defined,unused-ignore]
    if not (
        kernel.SetInformationJobObject(job, 9, ctypes.byref(limits), ctypes.sizeof(limits))
        and kernel.AssignProcessToJobObject(job, handle)
    ):
        process.kill()
        raise PipelineError("the process could not be put in a job object, so it was not started")
    process.job = subprocess.Handle(job.value)  # type: ignore[attr-defined,unused-ignore]
