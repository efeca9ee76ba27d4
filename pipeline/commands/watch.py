"""`up watch=1`: the same again whenever the file changes."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from pipeline.core import log
from pipeline.core.errors import UsageError, doitw
from pipeline.core.paths import REPOSITORY, user_folder
from pipeline.core.process import attached
from pipeline.serve.supervisor.state import Stamp, stamp

from . import leftovers
from .servers import Servers

TICK = 0.5  # seconds between two looks at the file


def check(servers: Servers) -> None:
    """Raise UsageError for what cannot be watched."""
    requested = servers.requested
    if not requested.watch:
        return
    if not requested.config:
        raise UsageError("watch=1: follows a file of instances, and a profile has none", "leave it")
    if requested.background is False or requested.dry_run:
        other = "dry_run=1" if requested.dry_run else "background=0"
        raise UsageError(f"watch=1 and {other} contradict each other", "leave one out")
    if servers.is_overridden:
        raise UsageError(
            f"watch=1: {servers.is_overridden} is set, and only the file is followed",
            "write it into the file",
        )


def follow(servers: Servers) -> None:
    """Run `up` now and after each change of the file, until Ctrl-C, which leaves the servers up.
    A wrong file is reported, and its servers stay as they are."""
    file = Path(servers.requested.config)
    words = [f"{name}={value}" for name, value in servers.words.items() if name != "watch"]
    command = [sys.executable, "-m", "doit", "up", *words]
    leftovers.begin(servers.home, [])  # it uses no model itself: others may be removed
    env = {**os.environ, "LLAMA_PIPELINE_CWD": str(user_folder())}
    try:
        while True:
            seen = _settled(file)
            attached(command, cwd=REPOSITORY, env=env)
            log.info(f"watching {file}; Ctrl-C ends that and leaves the servers up")
            while stamp(file) == seen:
                time.sleep(TICK)
            log.info(f"{file.name} has changed")
    except KeyboardInterrupt:
        log.info(f"no longer watching; {doitw('down')} stops the servers")


def _settled(file: Path) -> Stamp:
    """Its stamp, once nobody writes to it; an editor may also replace it by another one."""
    before, now = None, stamp(file)
    while before != now or now is None:
        time.sleep(TICK)
        before, now = now, stamp(file)
    return now
