"""How a process is known to belong to a server: by the marker in its environment, which it
inherits; and on Linux, where a program has cleared that, by its control group, or by a file that
the server was started with as its stdin, and that nobody else opens.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from pipeline.core.process import cgroup

from .state import VARIABLE, Folder

# The group of a server and its file end so.
PLACE = re.compile(r"/llama-pipeline-([0-9a-f]{16})/([^/]+)")
DELETED = " (deleted)"
LINUX = sys.platform == "linux"
# Opened so by us, and not by whoever reads all files, such as a backup.
OPENED = os.O_RDWR | os.O_APPEND


@contextmanager
def left_on(at: Folder, name: str) -> Iterator[dict[str, Any]]:
    """Options for `process.start`: the stdin of the server `name`, and what it calls between fork
    and exec. Nothing where the disk takes no file: the marker has to do then."""
    if not LINUX:
        yield {}
        return
    path, file = at.path / _folder(at) / name, -1
    with suppress(OSError):
        path.parent.mkdir(exist_ok=True, mode=0o700)
        file = os.open(path, OPENED | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        with cgroup.joined(_folder(at), name) as steps:
            yield {"steps": steps} | ({"stdin": file} if file >= 0 else {})
    finally:
        if file >= 0:
            os.close(file)


def value(process: psutil.Process) -> str:
    """The value of the marker's variable that a process has, or had when its server was started;
    empty where it belongs to none. Raises psutil.Error."""
    with suppress(psutil.AccessDenied, OSError):
        if marked := process.environ().get(VARIABLE, ""):
            return str(marked)
    if not LINUX or process.status() == psutil.STATUS_ZOMBIE:
        return ""
    for path in (cgroup.of(process.pid), *_opened(process.pid)):
        if places := PLACE.findall(path.removesuffix(DELETED)):
            return "/".join(places[-1])
    return ""


def is_ours(process: psutil.Process) -> bool:
    """Whether it is this user's. Raises psutil.Error."""
    return not hasattr(os, "getuid") or process.uids().real == os.getuid()


def forget(at: Folder) -> None:
    """Remove the groups of a configuration that hold no process any more."""
    if LINUX:
        cgroup.remove(_folder(at))


def _folder(at: Folder) -> str:
    return f"llama-pipeline-{at.marker}"


def _opened(pid: int) -> Iterator[str]:
    """The files that a process has open as `left_on` opens one."""
    with suppress(OSError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError, ValueError, StopIteration):
                path = str(link.readlink())
                if PLACE.search(path):
                    text = Path(f"/proc/{pid}/fdinfo/{link.name}").read_text("ascii")
                    flags = next(x for x in text.splitlines() if x.startswith("flags:"))
                    if int(flags.split()[1], 8) & (os.O_ACCMODE | os.O_APPEND) == OPENED:
                        yield path
