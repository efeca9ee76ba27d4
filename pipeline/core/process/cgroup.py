"""Control groups of Linux (cgroup v2): what a process starts stays in its group, whatever becomes
of its session, its parents and its environment.

A group is a folder below the one of this process. Many systems do not allow that, such as most
containers: there are no groups then.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def of(pid: int | str) -> str:
    """The path of a process's group, as the kernel names it; empty where there is none."""
    with suppress(OSError):
        text = Path(f"/proc/{pid}/cgroup").read_text("utf-8", "surrogateescape")
        for line in text.splitlines():
            if line.startswith("0::"):  # the others are those of version 1
                return line.removeprefix("0::")
    return ""


def own() -> Path | None:
    """The folder of this process's own group, if groups can be made below it."""
    path, mounts = of("self"), ""
    with suppress(OSError):
        mounts = Path("/proc/self/mountinfo").read_text("utf-8", "surrogateescape")
    for line in mounts.splitlines() if path else ():
        before, _, kind = line.partition(" - ")
        if kind.startswith("cgroup2 "):
            root, mount = before.split()[3:5]
            folder = Path(mount + path.removeprefix(root.rstrip("/")))
            # To move a process, one has to be allowed to move it within the group above both.
            return folder if os.access(folder / "cgroup.procs", os.W_OK) else None
    return None


@contextmanager
def joined(*names: str) -> Iterator[list[Callable[[], None]]]:
    """Make the group of these names, one below the other, below our own. Yields what a child calls
    between fork and exec to be in it; nothing where there is no such group."""
    file = -1
    with suppress(OSError):
        if top := own():
            folder = top.joinpath(*names)
            folder.mkdir(parents=True, exist_ok=True)
            file = os.open(folder / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)

    def join() -> None:
        with suppress(OSError):  # it was removed, or may hold no process
            os.write(file, b"0")

    try:
        yield [join] if file >= 0 else []
    finally:
        if file >= 0:
            os.close(file)


def remove(name: str) -> None:
    """Remove the group `name` below our own, and those below it, as far as they are empty."""
    if top := own():
        for folder, _, _ in os.walk(top / name, topdown=False):
            with suppress(OSError):
                Path(folder).rmdir()
