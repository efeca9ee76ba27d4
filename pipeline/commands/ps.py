"""`ps`, `logs`, `down`: list the servers that are up, read their logs, stop them."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.core import log
from pipeline.core.errors import UsageError, doitw
from pipeline.core.text import size, table
from pipeline.serve.supervisor import state
from pipeline.serve.supervisor.state import READY, Folder, require_known

from .model import Steps

if TYPE_CHECKING:
    from pipeline.serve.supervisor.status import Row


def ps(steps: Steps) -> None:
    """List the servers of the configuration, or of all configurations."""
    show(steps, folders(steps))


def show(steps: Steps, places: Sequence[Folder], *, reasons: bool = True) -> None:
    """Print a table, or JSON."""
    from pipeline.serve.supervisor import status

    rows = [row for at in places for row in status.ps(at) if is_named(steps, row.name)]
    if steps.request.json:
        print(json.dumps([asdict(row) for row in rows]))
    elif rows:
        details = [f"{row.name}: {row.reason}" for row in rows if row.reason and row.state != READY]
        print("\n".join([text(rows), *(details if reasons else [])]))
    else:
        log.info("nothing is up")


def text(rows: Sequence[Row]) -> str:
    """The table."""
    head = ("name", "engine", "model", "state", "since", "pid", "port", "restarts", "memory")
    lines: list[tuple[object, ...]] = [(*head, "gpu", "tokens/s")]
    for row in rows:
        since = row.ready_since and time.strftime("%d %b %H:%M:%S", time.localtime(row.ready_since))
        speed = "" if row.tokens_per_second is None else f"{row.tokens_per_second:.1f}"
        sizes = [size(count) if count else "" for count in (row.memory, row.gpu_memory)]
        lines.append(
            (
                *(row.name, row.engine, row.model, row.state, since or "", row.pid or ""),
                *(row.port, row.restarts, *sizes, speed),
            )
        )
    return table(lines)


def logs(steps: Steps) -> None:
    """Print the last lines of the logs, and with follow=1 new ones. Raises PipelineError."""
    from pipeline.serve import logfile

    wish, paths = steps.request.many, log_files(steps)
    if wish.follow and len(paths) > 1:
        raise UsageError("follow=1 follows one log", f"name=… is one of {', '.join(paths)}")
    for name, (at, path) in paths.items():
        if len(paths) > 1:
            print(f"==> {name} <==")
        over = functools.partial(is_over, at)
        for line in logfile.lines(path, wish.lines, follow=wish.follow, over=over):
            print(line, flush=wish.follow)


def is_over(at: Folder) -> bool:
    """Whether nothing writes to its logs any more."""
    from pipeline.serve.supervisor import liveness

    return not liveness.is_running(at)


def log_files(steps: Steps) -> dict[str, tuple[Folder, Path]]:
    """The log of each requested server, by name. Raises UsageError."""
    paths: dict[str, tuple[Folder, Path]] = {}
    for at in folders(steps):
        wanted = state.read_wanted(at)
        for server in wanted.instances if wanted else ():
            if server.name in paths:
                raise UsageError(f"{server.name}: in more than one configuration", "pass config=…")
            paths[server.name] = (at, Path(server.log_file))
    if not paths and steps.configured:  # nothing is up, but there may be logs
        at, configured = steps.configured.at, steps.configured
        paths = {name: (at, file) for name, file in configured.logs().items()}
    names = steps.request.many.names
    require_known(names, list(paths))
    if not paths:
        raise UsageError("nothing is up", f"{doitw('ps')} lists the servers; or pass config=…")
    return {name: paths[name] for name in names or paths}


def down(steps: Steps) -> None:
    """Stop the named servers, or all of the configuration. Raises PipelineError."""
    from pipeline.serve.supervisor import control

    names, places = steps.request.many.names, folders(steps)
    if names and not places:
        require_known(names, [])
    if not steps.request.many.source and len(places) > 1:
        raise UsageError(
            "down: more than one configuration is up",
            "config=… is one of " + ", ".join(configs(places)),
        )
    ended = [name for at in places for name in control.down(at, names)]
    if steps.request.json:
        print(json.dumps(ended))
    else:
        log.info(f"stopped {', '.join(ended)}" if ended else "nothing was up")


def folders(steps: Steps) -> list[Folder]:
    """The folder of the named configuration, or of all that are up or that a crash left behind."""
    source = steps.request.many.source
    if source:
        at = state.folder(steps.home, source)
        if steps.configured and not at.wanted.exists():
            _ = steps.configured.configuration  # never up: raises if the file cannot be read either
        return [at]
    from pipeline.serve.supervisor import liveness, marker

    marked = marker.everywhere()
    return [
        at
        for at in state.folders(steps.home)
        if at.marker in marked or liveness.is_running(at) or liveness.is_left(at)
    ]


def configs(places: Sequence[Folder]) -> list[str]:
    """The names of their configurations."""
    return [wanted.config for at in places if (wanted := state.read_wanted(at))]


def is_named(steps: Steps, name: str) -> bool:
    return not steps.request.many.names or name in steps.request.many.names
