"""`load` and `unload`: instances in and out of memory, by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence

from pipeline.core import log
from pipeline.core.errors import PipelineError, UsageError, doitw
from pipeline.serve.server import GATEWAY
from pipeline.serve.supervisor import state
from pipeline.serve.supervisor.state import Folder, require_known

from . import ps
from .session import Session


def load(session: Session) -> None:
    """Load the named instances, making room for them; return once they are ready. Raises
    PipelineError."""
    from pipeline.serve.supervisor import control

    failed = [
        f"{name} is {status.state}: {status.problem or status.reason}"
        for at, names in _named(session)
        for name, status in control.obey(at, names, loads=True)
    ]
    if failed:
        raise PipelineError("\n".join(failed), f"{doitw('ps')} shows what holds the memory")
    _say(session, "loaded")


def unload(session: Session) -> None:
    """Unload the named instances once they have answered their requests. Raises PipelineError."""
    from pipeline.serve.supervisor import control

    for at, names in _named(session):
        control.obey(at, names, loads=False)
    _say(session, "unloaded")


def _say(session: Session, what: str) -> None:
    names = session.request.servers.names
    if session.request.json:
        print(json.dumps(list(names)))
    else:
        log.info(f"{what} {', '.join(names)}")


def _named(session: Session) -> list[tuple[Folder, Sequence[str]]]:
    """The named instances, by the configuration that they are up in. Raises UsageError."""
    known: dict[str, Folder] = {}
    for at in ps.folders(session):
        wanted = state.read_wanted(at)
        for server in wanted.instances if wanted else ():
            if server.name in known and server.engine != GATEWAY:
                raise UsageError(f"{server.name}: in more than one configuration", "pass config=…")
            if server.engine != GATEWAY:
                known[server.name] = at
    names = session.request.servers.names
    if not known:
        raise PipelineError("nothing is up", f"{doitw('up config=…')} starts servers")
    if not names:
        raise UsageError("no instance named", f"name=… is one of {', '.join(known)}")
    require_known(names, list(known), "instances that are up:")
    folders = dict.fromkeys(known[name] for name in names)
    return [(at, [name for name in names if known[name] == at]) for at in folders]
