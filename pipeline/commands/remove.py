"""`remove`: take a model away, or one quant of it."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.core.errors import PipelineError, UsageError, did_you_mean, doitw
from pipeline.models import on_disk, quants
from pipeline.models.on_disk import OnDisk, StoredModel
from pipeline.serve import served

from . import uses
from .removal import BY_HAND, Candidates, Removable, carry_out, require_no_run
from .request import Request, request
from .session import Session
from .uses import Use


def remove(session: Session) -> None:
    """Remove the model of `model=`. Raises PipelineError where something uses it."""
    files = session.request.file_filter
    if files.quant in (quants.AUTO, quants.ALL):
        raise UsageError(
            f"quant={files.quant.lower()}: names no file", "name a quant, or leave quant out"
        )
    # The configuration of the environment, which a command line with model= does not read.
    users = Session(request({}), {})
    carry_out(session.request, session.home, lambda: candidates(session, users))


def candidates(session: Session, users: Session) -> Candidates:
    """What belongs to the model. Raises UsageError where there is none, PipelineError where
    something uses it."""
    home, request = session.home, session.request
    stored = on_disk.look(home)
    known = uses.find(users, stored)
    require_no_run(known.under_way)
    if not is_all(request):
        meant = [x for x in found(session, stored) if on_disk.fits(request.file_filter, x)]
        require_any(session, stored, meant)
        require_unused(request.named, [use for model in meant for use in known.of(model)])
        return Candidates(go=tuple(map(removable, meant)))
    meant = found(session, stored)
    slugs = {model.slug for model in meant} | {slug for slug in [unfetched(session)] if slug}
    cut = [path for path in stored.unfinished if on_disk.slug_of(home, path) in slugs]
    if not cut:
        require_any(session, stored, meant)
    require_unused(request.named, [use for slug in slugs for use in known.of_slug(slug, home)])
    records = [path for path, slug in on_disk.answers(home) if slug in slugs]
    times = [served.place(home.run, file) for model in meant for file in model.files]
    records += [path for path in times if path.exists()]
    by_hand = [path for path in stored.unknown if on_disk.slug_of(home, path) in slugs]
    return Candidates(
        go=(
            *map(removable, meant),
            *(
                Removable(kind="unfinished", paths=(path,), why="unfinished", is_unfinished=True)
                for path in cut
            ),
            *(
                Removable(kind="record", paths=(path,), why="what is known of it", is_plain=True)
                for path in records
            ),
        ),
        stay=tuple((path, BY_HAND) for path in by_hand),
    )


def removable(model: StoredModel) -> Removable:
    why = " ".join(filter(None, (model.name, model.quant, model.kind)))
    return Removable(kind=model.kind, paths=model.files, why=why)


def is_all(request: Request) -> bool:
    """Whether all of the model is meant, not one quant or file of it."""
    files = request.file_filter
    return not (files.quant or files.filename or files.pattern)


def found(session: Session, stored: OnDisk) -> list[StoredModel]:
    """All that is on disk of the model: by its reference, else by its name."""
    reference, home = session.request.reference, session.home
    by_reference = [x for x in stored.models if reference and on_disk.means(reference, x, home)]
    return by_reference or [x for x in stored.models if on_disk.is_named(session.request.named, x)]


def unfetched(session: Session) -> str:
    """The slug of a model that was begun: as it was resolved, or as it was typed."""
    resolved = session.model.known() if session.request.reference else None
    return resolved.slug if resolved else session.request.named


def require_any(session: Session, stored: OnDisk, meant: Sequence[StoredModel]) -> None:
    """Raise UsageError where nothing is meant."""
    if meant:
        return
    text, hint = session.request.named, f"{doitw('models')} lists what is on disk"
    if quants := sorted({x.quant for x in found(session, stored) if x.quant}):
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
