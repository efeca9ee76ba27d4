"""`upgrade`: another llama.cpp, built beside the present one, compared, then switched to."""

from __future__ import annotations

import json
import re
import sys

from msgspec import to_builtins

from pipeline.bins import binaries
from pipeline.bins.compile import active, source, upstream
from pipeline.bins.compile.active import Active, Revision
from pipeline.bins.compile.source import PINNED, Source
from pipeline.core import log
from pipeline.core.errors import PipelineError, UsageError, doitw
from pipeline.core.paths import Home
from pipeline.core.store.locks import only_one
from pipeline.core.store.publish import disk_errors
from pipeline.models import lockfile
from pipeline.serve.supervisor import liveness, state

from . import check, leftovers, make, upgrade_report
from .programs import Programs
from .request import Request
from .session import Session, confirmed

PREVIOUS = "previous"
RELEASE = re.compile(r"[bv]\d[\d.]*")  # upstream's tags


def require_possible(session: Session) -> None:
    """Raise UsageError where the request cannot be met, before any work."""
    request, options = session.request, session.request.bins
    if not request.to:
        here = ", ".join(str(each) for each in source.unpacked(session.home))
        raise UsageError(
            f"no llama.cpp given; active is {session.programs.llama_cpp.revision}"
            + (f"; also here: {here}" if here else ""),
            "pass to=latest, a tag (to=b11549), a commit, to=previous or to=pinned",
        )
    if binaries.chosen_folder():
        raise UsageError(
            "LLAMA_SERVER_BINS_DIR names programs of your own, which upgrade does not touch",
            "unset it to have them built",
        )
    if options.source == "package":
        raise UsageError(
            "bins=package: an installed package is upgraded by installing another",
            doitw("install_package pkg=PATH"),
        )
    if options.release:
        raise UsageError("release= and to= contradict each other", "leave release out")
    if session.servers:
        _ = session.servers.configuration  # raises now what cannot be read


def find(session: Session) -> Source:
    """The source that `to=` means; GitHub is asked last of all. Raises PipelineError."""
    to, home = session.request.to, session.home
    if to == PINNED or is_of(to, source.pinned_revision()):
        return source.pinned(home)
    if to == PREVIOUS:
        known = active.read(home)
        if known is None:
            raise UsageError("to=previous: there was no other llama.cpp before this one")
        return source.upgraded(home, known.previous) if known.previous else source.pinned(home)
    here = [revision for revision in source.unpacked(home) if is_of(to, revision)]
    revision = next(iter(here), None) or upstream.in_submodule(to, source.submodule())
    if revision is None and session.request.offline:
        names = ", ".join(map(str, source.unpacked(home))) or "only the pinned one"
        raise UsageError(
            f"to={to}: GitHub has to be asked which commit that is, and offline=1 forbids it",
            f"run it without offline=1, or take what is here: {names}",
        )
    revision = revision or upstream.find(to)
    if revision.commit == source.pinned_revision().commit:
        return source.pinned(home)
    if session.request.bins.source == "prebuilt" and not revision.name:
        raise UsageError(
            f"to={to}: bins=prebuilt needs a release's tag, and this is a commit",
            "name a tag such as to=b11549, or compile it: bins=build",
        )
    return source.upgraded(home, revision)


def is_of(name: str, revision: Revision) -> bool:
    """Whether it names the revision: its tag, or its commit, which may be abbreviated. A branch
    names another commit tomorrow."""
    is_commit = bool(upstream.COMMIT.fullmatch(name))
    is_tag = name == PINNED or bool(RELEASE.fullmatch(name))
    return (is_tag and name == revision.name) or (is_commit and revision.commit.startswith(name))


def require_locked(session: Session, target: Source) -> None:
    """Raise UsageError where frozen=1 allows no other llama.cpp than the lock file's."""
    request = session.request
    if not request.frozen:
        return
    path = session.model.lock_file
    commits = {entry.get("llama_cpp", {}).get("commit") for entry in lockfile.read(path)}
    if others := sorted(map(str, commits - {target.commit})):
        raise UsageError(
            f"frozen=1: {path} pins llama.cpp {others[0]}, and to={request.to} is {target.commit}",
            "leave frozen=1 out; after the switch, lock again",
        )


def upgrade(session: Session) -> None:
    """Get, build, compare and switch. Raises PipelineError; until the switch nothing changes."""
    request, home = session.request, session.home
    check.require_writable(home)
    require_possible(session)
    leftovers.begin(home)  # what is built here is not the active one yet, and must not be pruned
    target = find(session)
    require_locked(session, target)
    if request.to == PINNED and (why := unreadable(home)):
        log.info(f"warning: {why}; it is replaced")
    else:
        present = session.programs
        if target.recipe() == present.llama_cpp.recipe():
            log.info(f"llama.cpp {target.revision} is already active")
            return
        comparison = upgrade_report.compare(session, present, built(session, target))
        if request.json:
            print(json.dumps(to_builtins(comparison), indent=1), flush=True)
        else:
            print(upgrade_report.text(comparison), flush=True)
    if agreed(request, target):
        switch(home, target)
        log.info(f"active: llama.cpp {target.revision}; back: {doitw('upgrade to=previous yes=1')}")
        tell_running(home)


def unreadable(home: Home) -> str:
    """Why it cannot be read which llama.cpp is active; empty where it can be."""
    try:
        active.read(home)
    except PipelineError as error:
        return error.message
    return ""


def built(session: Session, target: Source) -> Programs:
    """The programs of the target, made in folders of their own unless they are here."""
    request, home = session.request, session.home
    programs = Programs(request, home, target)
    programs.require_device()
    if not programs.are_done():
        programs.require_tools()
        make.get_source(programs)
        programs = Programs(request, home, target)  # only now is it known whether it has a page
        programs.make_toolkit()
        make.make_programs(programs)
    return programs


def agreed(request: Request, target: Source) -> bool:
    """Whether to switch: yes=1, or the answer of who sits at a terminal."""
    name = target.upgrade.name if target.upgrade else PINNED
    is_lasting = name == PINNED or RELEASE.fullmatch(name)  # latest is another one tomorrow
    command = doitw(f"upgrade to={name if is_lasting else target.commit} yes=1")
    if request.yes and not request.servers.dry_run:
        return True
    if request.servers.dry_run or not sys.stdin.isatty():
        log.info(f"not switched; to switch: {command}")
        return False
    if confirmed("Switch to it?"):
        return True
    log.info(f"not switched; later: {command}")
    return False


def switch(home: Home, target: Source) -> None:
    """Make the target the active one, in one step. Raises PipelineError."""
    with disk_errors(home.bins), only_one(active.file(home)):
        known = active.read(home) if not unreadable(home) else None
        if known is None or known.active != target.upgrade:  # else another run was quicker
            previous = known.active if known else None
            active.write(home, Active(active=target.upgrade, previous=previous))


def tell_running(home: Home) -> None:
    """Say which servers are up: they keep the programs that they were started with."""
    running = liveness.running_elsewhere(state.folder(home, ""))
    if names := sorted({server.name for server, _ in running}):
        log.info(
            f"{', '.join(names)}: up, with the old programs until restarted: {doitw('up config=…')}"
        )
