"""The folder of one configuration: the desired state, written by `up` and `down`, and the actual
state, written by the supervisor. Files are replaced whole, private to the user, and never trusted
blindly: a process is the one that was started only if its pid and its start time agree.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated

from msgspec import Meta, Struct, convert, to_builtins

from pipeline.core.errors import UsageError, did_you_mean
from pipeline.core.paths import Home
from pipeline.core.store import json_file
from pipeline.serve.server import DEMAND, Server

VARIABLE = "LLAMA_PIPELINE_FLEET"  # in the environment of what belongs to a configuration

WAITING = "waiting"  # for its turn to load
LOADING = "loading"
READY = "ready"
UNLOADING = "unloading"  # it gets no new requests, and is stopped once it has answered the others
ASLEEP = "asleep"  # not loaded; a request at the gateway loads it
PAUSING = "pausing"  # before it is started again
STOPPING = "stopping"
STOPPED = "stopped"  # on request
EXITED = "exited"  # by itself, with status 0, and not to be restarted
FAILED = "failed"  # and given up: `reason` says why
ENDED = (STOPPED, EXITED, FAILED)
SETTLED = (READY, ASLEEP, *ENDED)

# As files may say them: what no process has, or no calendar, makes a file a damaged one.
Pid = Annotated[int, Meta(ge=1, lt=2**31)]
Time = Annotated[float, Meta(ge=0, lt=1e11)]  # in seconds since 1970


class Order(Struct, frozen=True, kw_only=True):
    """To load or to unload a server now."""

    loads: bool
    number: int  # a new one with each order


class DesiredState(Struct, frozen=True, kw_only=True):
    """What should run. `asked` is a new number with each `up`: failed servers are tried again."""

    config: str  # the file, as the user knows it
    instances: tuple[Server, ...] = ()
    max_loading: int | None = None  # how many may load at once; None: all
    asked: int = 0
    memory: Mapping[str, int] = {}  # bytes by device that all may take together; a device that is
    # not in it has no limit
    needs: Mapping[str, Mapping[str, int]] = {}  # by server: bytes by device, as computed
    orders: Mapping[str, Order] = {}  # the last one for each server
    swap_wait: float = 0.0  # seconds that a request waits at most before others make room
    saved_slots: int = 0  # bytes that conversations of unloaded servers may take on the disk

    @property
    def unloads(self) -> bool:
        """Whether any server is loaded and unloaded by itself."""
        return any(each.start == DEMAND or each.idle_timeout for each in self.instances)


class ServerStatus(Struct, frozen=True, kw_only=True):
    """A server as the supervisor sees it."""

    name: str
    state: str
    asked: int = 0  # the DesiredState that this answers
    pid: Pid | None = None
    started: Time | None = None  # of the process, as psutil's create_time gives it
    ready_at: Time | None = None
    load_seconds: Time = 0.0  # that it last took to be ready
    socket: str = ""  # where it answers beside its guarded port, for this user's processes
    restarts: int = 0
    reason: str = ""  # of the last end, with its last lines
    problem: str = ""  # why it can never be loaded
    retry_at: Time | None = None  # of one that has failed: the time.monotonic() from which a
    # request loads it again
    order: int = 0  # the number of the last order that was taken up


Report = Callable[[Server, ServerStatus], None]  # is called with each change


class State(Struct, frozen=True, kw_only=True):
    """What the supervisor last wrote."""

    pid: Pid
    started: Time
    asked: int  # the newest DesiredState that it has read
    instances: tuple[ServerStatus, ...] = ()
    reads: tuple[str, ...] = ()  # the fields of Server that it knows; an old one does not say

    @property
    def is_outdated(self) -> bool:
        """Whether an older version wrote it, whose supervisor ignores a part of what `up` writes
        now."""
        return not {*Server.__struct_fields__} <= {*self.reads}


def begun(pid: int, started: float) -> State:
    """The state of a supervisor of this version that begins."""
    return State(pid=pid, started=started, asked=0, reads=Server.__struct_fields__)


class Folder(Struct, frozen=True):
    """The files of one configuration."""

    path: Path

    @property
    def run(self) -> Path:
        """The home's `run`."""
        return self.path.parent.parent

    @property
    def wanted(self) -> Path:
        return self.path / "wanted.json"

    @property
    def state(self) -> Path:
        return self.path / "state.json"

    @property
    def lock(self) -> Path:
        """Held by the supervisor as long as it runs."""
        return self.path / "supervisor.lock"

    @property
    def log(self) -> Path:
        return self.path / "supervisor.log"

    @property
    def usage(self) -> Path:
        """What each gateway writes: see usage.py."""
        return self.path / "usage"

    @property
    def books(self) -> Path:
        return self.path / "books.json"

    @property
    def cluster(self) -> Path:
        """Where its servers are, once they were deployed to a Ray cluster."""
        return self.path / "ray.json"

    @property
    def marker(self) -> str:
        """The marker in the environment of every process of this configuration."""
        return hashlib.sha256(os.fsencode(self.path)).hexdigest()[:16]


def folder(home: Home, config: str) -> Folder:
    """The folder of a configuration: of the absolute path of a file, or `profile:NAME`."""
    short = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(config).stem)[:40]
    name = f"{short}-{hashlib.sha256(os.fsencode(config)).hexdigest()[:8]}"
    return Folder(home.run / "instances" / name)


def folders(home: Home) -> list[Folder]:
    """Those of all configurations that were ever up."""
    return [Folder(path.parent) for path in sorted(home.run.glob("instances/*/wanted.json"))]


def deployed(home: Home) -> list[Folder]:
    """Those of all configurations that are on a Ray cluster."""
    return [Folder(path.parent) for path in sorted(home.run.glob("instances/*/ray.json"))]


def write_wanted(at: Folder, wanted: DesiredState) -> None:
    json_file.write_private(at.wanted, to_builtins(wanted))


def write_state(at: Folder, state: State) -> None:
    json_file.write_private(at.state, to_builtins(state))


def remove_unfinished(at: Folder) -> None:
    """Remove what a kill left half written below the folder; its own files are written anew."""
    with suppress(OSError):
        for part in at.path.glob("*/**/.*.part"):
            part.unlink(missing_ok=True)


def read_wanted(at: Folder) -> DesiredState | None:
    """What should run; None where nothing was ever requested, or the file is damaged."""
    return json_file.read(at.wanted, lambda data: convert(data, DesiredState))


def read_state(at: Folder) -> State | None:
    """What the supervisor last wrote; None where there is nothing, or it is damaged."""
    return json_file.read(at.state, lambda data: convert(data, State))


Stamp = tuple[int, int, int] | None


def stamp(path: Path) -> Stamp:
    """A value that changes whenever the file is replaced; None where it is missing."""
    try:
        info = path.stat()
    except OSError:
        return None
    return info.st_ino, info.st_mtime_ns, info.st_size


def servers_of(wanted: DesiredState | None) -> dict[str, Server]:
    """The servers that should run, by name."""
    return {server.name: server for server in (wanted.instances if wanted else ())}


def statuses_of(state: State | None) -> dict[str, ServerStatus]:
    """What was last written of each server, by name."""
    return {status.name: status for status in (state.instances if state else ())}


def running_of(state: State | None) -> set[str]:
    """The names of the servers that had not ended when the state was written."""
    return {name for name, status in statuses_of(state).items() if status.state not in ENDED}


def require_known(names: Iterable[str], known: list[str], listed: str = "there is") -> None:
    """Raise UsageError for each of `names` that is not among `known`, which the hint lists."""
    errors = [
        f"name={name}: there is no such instance{did_you_mean(name, known)}"
        for name in names
        if name not in known
    ]
    if errors:
        raise UsageError("\n".join(errors), f"{listed} {', '.join(known) or 'none'}")
