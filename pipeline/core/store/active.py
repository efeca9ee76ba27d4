"""The runs under way, so that nothing is removed that one of them needs.

A run writes `run/active/<pid>.json` before it works. Whoever removes files writes
`<pid>.removing` first and looks for runs then; a run looks for removals after it has written its
file. So one of the two always sees the other: the removal keeps what the run uses, the run waits.
No lock is held, so this works on any disk, and what a killed process left counts for nothing.
"""

from __future__ import annotations

import atexit
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from msgspec import Struct, convert

from pipeline.core import log

from . import json_file
from .locks import alone_with
from .publish import FULL

REMOVING = "another run is removing files; waiting for it"
TICK = 0.1  # seconds
CLOCK_SECONDS = 2.0  # between a process's start and the times of files, by their granularity

_recorded: set[Path] = set()


class ActiveRun(Struct, frozen=True, kw_only=True):
    """A run: its command line, and the files that it uses; None: any, it is still preparing."""

    command: str
    files: tuple[str, ...] | None = None


def begin(folder: Path, files: Iterable[Path] | None = None) -> None:
    """Record this process in `folder`, the home's `run`, until it ends; wait for a removal under
    way. Called again, `files` replace what is known of it."""
    path = _active(folder) / f"{os.getpid()}.json"
    used = None if files is None else [str(file) for file in files]
    command, began = " ".join(sys.argv[1:]), _began(os.getpid())
    json_file.write_private(path, {"command": command, "files": used, "began": began})
    if path not in _recorded:
        _recorded.add(path)
        atexit.register(_end, path)
        _wait_for_removals(folder)


def others(folder: Path) -> list[ActiveRun]:
    """The other runs under way. Changes nothing."""
    own = f"{os.getpid()}.json"
    files = (file for file in _active(folder).glob("*.json") if file.name != own)
    unknown = ActiveRun(command="a run that cannot be read")
    alive = [file for file in files if _is_alive(file)]
    runs = [(file, json_file.read(file, lambda data: convert(data, ActiveRun))) for file in alive]
    # One that has just ended took its file away.
    return [run or unknown for file, run in runs if run or file.exists()]


def preparing(folder: Path) -> tuple[str, ...]:
    """The command lines of the other runs that may need any file."""
    return tuple(run.command for run in others(folder) if run.files is None)


def killed(folder: Path) -> list[Path]:
    """What the records of runs have left that were killed: files whose process is gone."""
    files = [] if not (active := _active(folder)).is_dir() else [*active.iterdir()]
    own = (f"{os.getpid()}.json", ".lock")
    return [file for file in files if file.name not in own and not _is_alive(file)]


@contextmanager
def removing(folder: Path) -> Iterator[None]:
    """Remove files alone: one process at a time, while no run begins. On a full disk without any
    record, for which there is no room: no run can begin there either."""
    with ExitStack() as stack:
        try:
            _begin_to_remove(_active(folder), stack)
        except OSError as error:
            if error.errno not in FULL:
                raise
        yield


def _begin_to_remove(active: Path, stack: ExitStack) -> None:
    active.mkdir(parents=True, exist_ok=True, mode=0o700)
    stack.enter_context(alone_with(active / ".lock", REMOVING))
    for file in active.iterdir():
        if file.suffix and not _is_alive(file):
            file.unlink(missing_ok=True)
    path = active / f"{os.getpid()}.removing"
    stack.callback(path.unlink, missing_ok=True)
    json_file.write_private(path, {"began": _began(os.getpid())})


def _end(path: Path) -> None:
    with suppress(OSError):  # the next run removes it
        path.unlink(missing_ok=True)


def _active(folder: Path) -> Path:
    return folder / "active"


def _wait_for_removals(folder: Path) -> None:
    is_reported = False
    while any(map(_is_alive, _active(folder).glob("*.removing"))):
        if not is_reported:
            log.info(REMOVING)
            is_reported = True
        time.sleep(TICK)


def _began(pid: int) -> str:
    """When a process began, as no change of the clock moves it; empty where it cannot be read."""
    with suppress(OSError, IndexError):  # Linux, in ticks since the machine was started
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        return stat.rpartition(")")[2].split()[19]
    return ""


def _is_alive(file: Path) -> bool:
    """Whether the process that wrote the file still runs: one that began at another time has only
    its pid."""
    import psutil

    with suppress(OSError, ValueError, psutil.NoSuchProcess):
        began = json_file.read(file, lambda data: str(data["began"]))
        pid = int(file.name.strip(".").partition(".")[0])  # also of one that is being written
        if began and began != _began(pid):
            return False
        try:
            process = psutil.Process(pid)
            ended = process.status() == psutil.STATUS_ZOMBIE
            # Linux reckons the start from the present clock, which may have been set since.
            is_same = began or process.create_time() < file.stat().st_mtime + CLOCK_SECONDS
            return not ended and bool(is_same)
        except psutil.AccessDenied:  # another user's, so it is there
            return True
    return False
