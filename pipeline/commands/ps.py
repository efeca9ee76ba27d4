"""The servers that are up: `ps` lists them, `logs` reads their logs, `down` stops them; `load` and
`unload` move an instance in and out of memory, by hand."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import to_builtins

from pipeline.core import log
from pipeline.core.errors import PipelineError, UsageError, doitw
from pipeline.core.text import size, table
from pipeline.deploy.ray.deployed import is_replica
from pipeline.serve.placing import TOTAL
from pipeline.serve.server import GATEWAY, Server
from pipeline.serve.supervisor import control, liveness, marker, state, status
from pipeline.serve.supervisor.state import READY, Folder, require_known

from . import ray_cluster
from .request import Request
from .session import Session

if TYPE_CHECKING:
    from pipeline.serve.supervisor.status import Row

    from .ray_cluster import ClusterRow


def ps(session: Session) -> None:
    """List the servers of the configuration, or of all configurations."""
    show(session.request, folders(session), replicas=replicas(session))


def show(
    request: Request,
    places: Sequence[Folder],
    *,
    replicas: Sequence[Folder] = (),
    reasons: bool = True,
) -> None:
    """Print a table, or JSON. `replicas` are the places of those that a cluster has here."""
    names = request.servers.names
    for pid in filter(None, map(liveness.suspended, (*places, *replicas))):
        log.info(
            f"warning: the supervisor (pid {pid}) is suspended, so no server is watched or "
            f"restarted: kill -CONT {pid} resumes it, {doitw('down')} ends it with its servers"
        )
    rows, theirs = (
        [row for at in group for row in status.ps(at) if not names or row.name in names]
        for group in (places, replicas)
    )
    deployed = [at for at in places if at.cluster.exists()]
    remote = [row for at in deployed for row in ray_cluster.rows(at)]
    remote = [row for row in remote if not names or row.name in names]
    if request.json:
        of_cluster = ({**to_builtins(row), "replica": True} for row in theirs)
        print(json.dumps([*map(to_builtins, (*rows, *remote)), *of_cluster]))
        return
    if remote:
        print("\n".join([ray_cluster.text(remote), *_reasons(remote, reasons)]))
    if rows:
        print("\n".join([text(rows), *_reasons(rows, reasons)]))
    elif not deployed and not theirs:
        log.info("nothing is up")
    if theirs:
        log.info("replicas of a Ray cluster, which starts and stops them:")
        print("\n".join([text(theirs), *_reasons(theirs, reasons)]))


def _reasons(rows: Sequence[Row | ClusterRow], wanted: bool) -> list[str]:
    """Why a server is not ready, for each of which that is known."""
    reasons = (f"{row.name}: {row.reason}" for row in rows if row.reason and row.state != READY)
    return [*reasons] if wanted else []


def text(rows: Sequence[Row]) -> str:
    """The table, with the columns that have something to show."""
    counted = any(row.need for row in rows)
    drafting = any(row.drafts_accepted is not None for row in rows)

    def cells(row: Row) -> dict[str, object]:
        speed, accepted = row.tokens_per_second, row.drafts_accepted
        columns: dict[str, object] = {
            "name": row.name,
            "engine": row.engine,
            "model": row.model,
            "state": row.state,
            "since": at(row.ready_since),
            "pid": row.pid or "",
            "port": row.port,
            "restarts": row.restarts,
            "memory": size(row.memory) if row.memory else "",
            "gpu": size(row.gpu_memory) if row.gpu_memory else "",
            "tokens/s": "" if speed is None else f"{speed:.1f}",
        }
        if counted:
            columns |= {"needs": needs(row.need), "last request": at(row.last_use)}
            load = row.load_seconds
            columns["loaded in"] = "" if load is None else f"{load:.1f} s"
        if drafting:
            columns["drafts accepted"] = "" if accepted is None else f"{accepted:.0%}"
        return columns

    return table([[*cells(rows[0])], *([*cells(row).values()] for row in rows)])


def at(when: float | None) -> str:
    """A time as people read it; empty for none."""
    return time.strftime("%d %b %H:%M:%S", time.localtime(when)) if when else ""


def needs(need: Mapping[str, int]) -> str:
    """What a server is counted with: of main memory, and of each card."""
    return " + ".join(
        size(count) if device in ("ram", TOTAL) else f"{size(count)} {device}"
        for device, count in need.items()
    )


def logs(session: Session) -> None:
    """Print the last lines of the logs, and with follow=1 new ones. Raises PipelineError."""
    from pipeline.serve import logfile

    if deployed := [at for at in folders(session) if at.cluster.exists()]:
        ray_cluster.logs(session, deployed)
        return
    requested, paths = session.request.servers, log_files(session)
    if requested.follow and len(paths) > 1:
        raise UsageError("follow=1 follows one log", f"name=… is one of {', '.join(paths)}")
    for name, (at, path) in paths.items():
        if len(paths) > 1:
            print(f"==> {name} <==")

        def over(at: Folder = at) -> bool:  # nothing writes to the log any more
            return not liveness.is_running(at)

        for line in logfile.lines(path, requested.lines, follow=requested.follow, over=over):
            print(line, flush=requested.follow)


def log_files(session: Session) -> dict[str, tuple[Folder, Path]]:
    """The log of each requested server, by name. Raises UsageError."""
    known = by_name(session, with_gateway=True)
    paths = {name: (at, Path(server.log_file)) for name, (at, server) in known.items()}
    if not paths and session.servers:  # nothing is up, but there may be logs
        at, servers = session.servers.at, session.servers
        paths = {name: (at, file) for name, file in servers.logs().items()}
    names = session.request.servers.names
    require_known(names, list(paths))
    if not paths:
        raise UsageError("nothing is up", f"{doitw('ps')} lists the servers; or pass config=…")
    return {name: paths[name] for name in names or paths}


def down(session: Session) -> None:
    """Stop the named servers, or all of the configuration. Raises PipelineError."""
    names, places = session.request.servers.names, folders(session)
    _require_own(session, places)
    if names and not places:
        require_known(names, [])
    if not session.request.servers.source and len(places) > 1:
        configs = [wanted.config for at in places if (wanted := state.read_wanted(at))]
        configs += [config for at in places if (config := ray_cluster.config(at))]
        raise UsageError(
            "down: more than one configuration is up", f"config=… is one of {', '.join(configs)}"
        )
    deployed = [at for at in places if at.cluster.exists()]
    ended = [name for at in deployed for name in ray_cluster.down(at, names)]
    here = [at for at in places if at not in deployed or at.wanted.exists()]
    ended += [name for at in here for name in control.down(at, names)]
    if session.request.json:
        print(json.dumps(ended))
    else:
        log.info(f"stopped {', '.join(ended)}" if ended else "nothing was up")


def _require_own(session: Session, places: Sequence[Folder]) -> None:
    """Raise UsageError where a cluster's replicas are meant, or all that runs here."""
    meant = [at for at in places if _is_clusters(at)] if places else replicas(session)
    names = [name for at in meant for name in state.servers_of(state.read_wanted(at))]
    if names:
        raise UsageError(
            f"{', '.join(names)}: runs here for a Ray cluster, which would start it again",
            f"take it down where it was deployed: {doitw('down config=…')}",
        )


def load(session: Session) -> None:
    """Load the named instances, making room for them, and wait for them. Raises PipelineError."""
    failed = [
        f"{name} is {failure.state}: {failure.problem or failure.reason}"
        for at, names in _named(session)
        for name, failure in control.obey(at, names, loads=True)
    ]
    if failed:
        raise PipelineError("\n".join(failed), f"{doitw('ps')} shows what holds the memory")
    _report(session, "loaded")


def unload(session: Session) -> None:
    """Unload the named instances once they have answered their requests. Raises PipelineError."""
    for at, names in _named(session):
        control.obey(at, names, loads=False)
    _report(session, "unloaded")


def _report(session: Session, what: str) -> None:
    names = session.request.servers.names
    if session.request.json:
        print(json.dumps(list(names)))
    else:
        log.info(f"{what} {', '.join(names)}")


def _named(session: Session) -> list[tuple[Folder, Sequence[str]]]:
    """The named instances, by the configuration that they are up in. Raises PipelineError."""
    known, names = by_name(session), session.request.servers.names
    if not known:
        require_none_on_a_cluster(
            session,
            "which loads a server for its first request and unloads it after its idle_timeout",
            "POST /models/load to its gateway loads one by hand",
        )
        raise PipelineError("nothing is up", f"{doitw('up config=…')} starts servers")
    if not names:
        raise UsageError("no instance named", f"name=… is one of {', '.join(known)}")
    require_known(names, list(known), "instances that are up:")
    places = dict.fromkeys(known[name][0] for name in names)
    return [(at, [name for name in names if known[name][0] == at]) for at in places]


def require_none_on_a_cluster(session: Session, why: str, hint: str) -> None:
    """Raise UsageError where the servers are on a cluster."""
    configs = [config for at in folders(session) if (config := ray_cluster.config(at))]
    if configs:
        raise UsageError(f"{', '.join(configs)}: is on a Ray cluster, {why}", hint)


def by_name(session: Session, *, with_gateway: bool = False) -> dict[str, tuple[Folder, Server]]:
    """The servers that were started, and the folder of their configuration. Raises UsageError
    where two have the same name."""
    known: dict[str, tuple[Folder, Server]] = {}
    for at in folders(session):
        wanted = state.read_wanted(at)
        for server in wanted.instances if wanted else ():
            if server.engine == GATEWAY and not with_gateway:
                continue
            if server.name in known:
                raise UsageError(f"{server.name}: in more than one configuration", "pass config=…")
            known[server.name] = (at, server)
    return known


def folders(session: Session) -> list[Folder]:
    """The folder of the named configuration, or of all that are up or that a crash left behind,
    without those of a cluster's replicas."""
    source = session.request.servers.source
    if source:
        at = state.folder(session.home, source)
        if session.servers and not (at.wanted.exists() or at.cluster.exists()):
            _ = session.servers.configuration  # never up: raises if the file cannot be read either
        return [at]
    here = [at for at in _up(session) if not _is_clusters(at)]
    return [*here, *(at for at in state.deployed(session.home) if at not in here)]


def replicas(session: Session) -> list[Folder]:
    """Those of a cluster's replicas on this machine; none where a configuration is named."""
    if session.request.servers.source:
        return []
    return [at for at in _up(session) if _is_clusters(at)]


def _is_clusters(at: Folder) -> bool:
    """Whether a cluster's replica runs there; what one has left behind is for the user to end."""
    return is_replica(at) and liveness.is_running(at)


def _up(session: Session) -> list[Folder]:
    """Those of all configurations that are up or that a crash left behind."""
    marked = marker.everywhere()
    return [
        at
        for at in state.folders(session.home)
        if at.marker in marked or liveness.is_running(at) or liveness.is_left(at)
    ]
