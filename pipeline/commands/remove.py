"""`remove`: take a model away, or one quant of it; and what it shares with `prune`: show what would
go, ask, and take it away."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from msgspec import Struct

from pipeline.core import log
from pipeline.core.errors import PipelineError, UsageError, did_you_mean, doitw
from pipeline.core.paths import Home
from pipeline.core.store import active, artifacts, publish
from pipeline.core.store.publish import disk_errors
from pipeline.core.text import size, table
from pipeline.models import on_disk, quants
from pipeline.models.on_disk import OnDisk, StoredModel
from pipeline.serve import served

from . import leftovers, uses
from .request import Request, request
from .session import Session, confirmed
from .uses import Use

BY_HAND = "was put there by hand, or changed since it was made"
NOTHING = "; linked elsewhere, so nothing becomes free"


class Removable(Struct, frozen=True, kw_only=True):
    """Files or folders that go together: what they are, why they may go, and the function that
    removes one of them: another for what has no receipt, or was left by a killed run."""

    kind: str
    paths: tuple[Path, ...]
    why: str
    remove: Callable[[Path], None] = artifacts.take_away


def unfinished(path: Path, why: str) -> Removable:
    """What a killed run left."""
    return Removable(kind="unfinished", paths=(path,), why=why, remove=artifacts.finish)


def plain(kind: str, path: Path, why: str) -> Removable:
    """A file or a folder without a receipt, such as a log."""
    return Removable(kind=kind, paths=(path,), why=why, remove=publish.remove)


class Candidates(Struct, frozen=True, kw_only=True):
    """What would go; and what stays, with the reason, where somebody may expect it to go."""

    go: tuple[Removable, ...]
    stay: tuple[tuple[Path, str], ...] = ()


def carry_out(session: Session, find: Callable[[], Candidates]) -> None:
    """Show what `find` returns, ask, and remove what it still returns then. Raises PipelineError;
    UsageError where nobody can be asked."""
    request, home = session.request, session.home
    if request.yes and not request.servers.dry_run:
        leftovers.clear(home)
    candidates, yes = find(), request.yes
    is_wanted = bool(candidates.go) and not request.servers.dry_run
    if not request.json:
        show(home, candidates)
    elif not (is_wanted and yes):
        print(json.dumps(document(candidates), indent=1))
    if not is_wanted or not (yes or ask(request)):
        return
    with disk_errors(home.root), active.removing(home.run):
        agreed = {path for each in candidates.go for path in each.paths}
        go = tuple(each for each in find().go if agreed.issuperset(each.paths))
        result = document(Candidates(go=go, stay=candidates.stay))
        for each in sorted(go, key=lambda each: -artifacts.allocated(each.paths)):
            take_away(each, home)
    if request.json:
        print(json.dumps({**result, "removed": True}, indent=1))
    else:
        log.info(f"removed; {size(result['bytes'])} are free again")


def ask(request: Request) -> bool:
    """Ask in the terminal. Raises UsageError where there is none."""
    if request.json or not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UsageError(
            "nothing was removed: nobody can be asked here",
            "yes=1 removes it, dry_run=1 only shows it",
        )
    if confirmed("Remove all of this?"):
        return True
    log.info("nothing was removed")
    return False


def take_away(each: Removable, home: Home) -> None:
    # The largest first: on a full disk it makes room for the receipts of the others.
    there = filter(os.path.lexists, each.paths)  # receipts may have been written anew meanwhile
    for path in sorted(there, key=lambda path: -path.lstat().st_size):
        each.remove(path)
        for top in (home.models / "gguf", home.models / "source"):
            artifacts.remove_empty(path.parent, top)


def show(home: Home, candidates: Candidates) -> None:
    """A line for each, and the sum."""
    rows = [
        (size(freed).rjust(9), shown(home, each.paths), each.why + (NOTHING if not freed else ""))
        for each in candidates.go
        for freed in [artifacts.allocated(each.paths)]
    ]
    if rows:
        total = artifacts.allocated(path for each in candidates.go for path in each.paths)
        print(table([*rows, (size(total).rjust(9), "in all", "")]), flush=True)
    else:
        log.info("nothing to remove")
    for path, why in candidates.stay:
        log.info(f"kept: {shown(home, (path,))}: {why}")


def shown(home: Home, paths: Sequence[Path]) -> str:
    """The path, relative where it is in the home; of many their folder."""
    path = paths[0] if len(paths) == 1 else Path(os.path.commonpath(paths))
    return str(path.relative_to(home.root) if path.is_relative_to(home.root) else path)


def document(candidates: Candidates) -> dict[str, Any]:
    """The same as JSON has it. Sizes in bytes that become free."""
    return {
        "removed": False,
        "bytes": artifacts.allocated(path for each in candidates.go for path in each.paths),
        "items": [
            {
                "kind": each.kind,
                "why": each.why,
                "bytes": artifacts.allocated(each.paths),
                "paths": [str(path) for path in each.paths],
            }
            for each in candidates.go
        ],
        "kept": [{"path": str(path), "why": why} for path, why in candidates.stay],
    }


@contextmanager
def no_other_run(home: Home) -> Iterator[None]:
    """Remove files in the block, while no run begins. Raises PipelineError where one is active."""
    with disk_errors(home.root), active.removing(home.run):
        require_no_run(active.preparing(home.run))
        yield


def require_no_run(under_way: Sequence[str]) -> None:
    """Raise PipelineError while another run may need anything."""
    if under_way:
        raise PipelineError(
            f"another run is under way: {'; '.join(under_way)}; nothing was removed",
            "run this again once that has ended",
        )


# One model


def remove(session: Session) -> None:
    """Remove the model of `model=`. Raises PipelineError where something uses it."""
    files = session.request.file_filter
    if not session.request.named:
        hint = "pass model=…, as it was typed to serve, or as `models` prints it"
        raise UsageError("no model given", hint)
    if files.quant in (*quants.DECIDED, quants.ALL):
        raise UsageError(
            f"quant={files.quant.lower()}: names no file", "name a quant, or leave quant out"
        )
    # The configuration of the environment, which a command line with model= does not read.
    users = Session(request({}), {})
    carry_out(session, lambda: candidates(session, users))


def candidates(session: Session, users: Session) -> Candidates:
    """What belongs to the model. Raises UsageError for none, PipelineError for one in use."""
    home, request = session.home, session.request
    stored = on_disk.look(home)
    known = uses.find(users, stored)
    require_no_run(known.under_way)
    files = request.file_filter
    if files.quant or files.filename or files.pattern:  # a part of the model is meant
        meant = on_disk.narrow(matching(session, stored), files)
        require_any(session, stored, meant)
        require_unused(request.named, [use for model in meant for use in known.of(model)])
        return Candidates(go=tuple(map(removable, meant)))
    meant = matching(session, stored)
    slugs = {model.slug for model in meant} | {slug for slug in [unfetched(session)] if slug}
    cut = [path for path in stored.unfinished if on_disk.slug_of(home, path) in slugs]
    cut += [path for path in on_disk.empty(home) if path.name in slugs]
    if not cut:
        require_any(session, stored, meant)
    require_unused(request.named, [use for slug in slugs for use in known.of_slug(slug, home)])
    records = [path for path, slug in on_disk.answers(home) if slug in slugs]
    times = [served.place(home.run, file) for model in meant for file in model.files]
    records += [path for path in times if path.exists()]
    by_hand = [path for path in stored.unknown if on_disk.slug_of(home, path) in slugs]
    go = [
        *map(removable, meant),
        *(unfinished(path, "unfinished") for path in cut),
        *(plain("record", path, "what is known of it") for path in records),
    ]
    return Candidates(go=tuple(go), stay=tuple((path, BY_HAND) for path in by_hand))


def removable(model: StoredModel) -> Removable:
    why = " ".join(filter(None, (model.name, model.quant, model.kind)))
    return Removable(kind=model.kind, paths=(*model.files, *model.beside), why=why)


def matching(session: Session, stored: OnDisk) -> list[StoredModel]:
    """All that is on disk of the model: by its reference, else by its name."""
    reference, home = session.request.reference, session.home
    by_reference = [x for x in stored.models if reference and on_disk.means(reference, x, home)]
    return by_reference or [x for x in stored.models if on_disk.is_named(session.request.named, x)]


def unfetched(session: Session) -> str:
    """The slug of a model that was begun: as it was resolved, or as it was typed."""
    resolved = session.model.known() if session.request.reference else None
    return resolved.slug if resolved else session.request.named


def require_any(session: Session, stored: OnDisk, meant: Sequence[StoredModel]) -> None:
    """Raise UsageError where no stored model is meant."""
    if meant:
        return
    text, hint = session.request.named, f"{doitw('models')} lists what is on disk"
    if quants := sorted({x.quant for x in matching(session, stored) if x.quant}):
        raise UsageError(
            f"model={text}: there is no such file of it, only {', '.join(quants)}", hint
        )
    names = sorted({name for x in stored.models for name in (x.name, x.slug, x.reference)})
    raise UsageError(f"model={text}: is not on disk{did_you_mean(text, names)}", hint)


def require_unused(text: str, users: Sequence[Use]) -> None:
    """Raise PipelineError where something uses it."""
    if users:
        raise PipelineError(
            f"model={text}: is used by {', '.join(dict.fromkeys(use.by for use in users))}; "
            "nothing was removed",
            "stop the server, or take the model out of the file that names it",
        )
