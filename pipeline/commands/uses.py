"""What uses the models and programs of the home: servers that run, runs under way, and what a
configuration or a pipeline.lock asks for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from msgspec import Struct

from pipeline.core.errors import PipelineError, UsageError
from pipeline.core.paths import Home, absolute
from pipeline.core.store import active
from pipeline.models import lockfile, on_disk, resolve
from pipeline.models.on_disk import OnDisk, StoredModel
from pipeline.serve import served
from pipeline.serve.supervisor import liveness, state

from .model import Model
from .session import Session


class Use(Struct, frozen=True, kw_only=True):
    """A use of a model: of all of `slug`, or of its `file` alone; or of any file, such as a
    program. `by` says who, as users know it."""

    by: str
    slug: str = ""
    file: Path | None = None
    is_running: bool = False


class Uses(Struct, frozen=True, kw_only=True):
    """All uses. `under_way` are the commands of runs that may still need any file."""

    uses: tuple[Use, ...]
    under_way: tuple[str, ...]

    def of(self, model: StoredModel) -> list[Use]:
        """The uses of one stored model."""
        files = {_real(file) for file in model.files}
        return [
            use
            for use in self.uses
            if use.file in files or (use.slug == model.slug and use.file is None)
        ]

    def of_slug(self, slug: str, home: Home) -> list[Use]:
        """The uses of anything that belongs to the model."""
        folders = (home.models / kind / slug for kind in ("gguf", "source"))
        files = [use for folder in folders for use in self.below(folder)]
        return [use for use in self.uses if use.slug == slug or use in files]

    def below(self, folder: Path) -> list[Use]:
        """The uses of files below a folder."""
        top = _real(folder)
        return [use for use in self.uses if use.file and use.file.is_relative_to(top)]


def find(session: Session, stored: OnDisk) -> Uses:
    """Who uses what. Raises UsageError where a configuration or a pipeline.lock cannot be read:
    then nobody knows what it asks for."""
    under_way = active.preparing(session.home.run)  # before the files of those that are prepared
    return Uses(
        uses=(*running(session.home), *_named(session, stored), *_locked(session, stored)),
        under_way=under_way,
    )


def running(home: Home) -> Iterator[Use]:
    """The files of the servers that are up, and of those that are served in the foreground."""
    for run in active.others(home.run):
        for file in run.files or ():
            yield Use(by=run.command, file=_real(file), is_running=True)
    for at in state.folders(home):
        wanted = state.read_wanted(at)
        if wanted and liveness.is_running(at):
            for server in wanted.instances:
                by = f"{Path(wanted.config).name}: {server.name}"
                for path in (*served.files(server), Path(server.log_file)):
                    yield Use(by=by, file=_real(path), is_running=True)


def _named(session: Session, stored: OnDisk) -> Iterator[Use]:
    """What the file of servers names, for instances that are not enabled too. Raises UsageError."""
    if session.servers is None:
        return
    servers, configuration = session.servers, session.servers.configuration
    if servers.errors:
        raise UsageError("\n".join(servers.errors))
    for spec in configuration.specs:
        by = f"{configuration.label}: {spec.name}"
        for value in spec.server.values():
            path = configuration.path(value) if isinstance(value, str) and value else None
            if path and os.path.lexists(path):
                yield Use(by=by, file=_real(path))
        models: list[Model] = []
        with suppress(UsageError):  # of what is not enabled nobody has looked for errors yet
            model = servers.model_named_by(spec) if spec.model else None
            models = [model, *model.beside.values()] if model else []
        for each in models:
            reference, final = each.require_reference(), None
            with suppress(PipelineError):
                chain = each.chain()
                final = _real(chain.final) if chain else None
            slugs = {x.slug for x in stored.models if on_disk.means(reference, x, session.home)}
            for slug in slugs:
                yield Use(by=by, slug=slug, file=final)
    if servers.own:
        yield Use(by=configuration.label, file=_real(servers.own))


def _locked(session: Session, stored: OnDisk) -> Iterator[Use]:
    """What pipeline.lock pins, in the user's folder and in the home. Raises UsageError."""
    for path in dict.fromkeys((absolute(lockfile.FILE), session.home.root / lockfile.FILE)):
        for entry in lockfile.read(path):
            for model in stored.models:
                if _is_locked(entry, model):
                    result = entry.get("result", {}).get("name")
                    folder = session.home.models / "gguf" / model.slug
                    file = _real(folder / result) if result else None
                    yield Use(by=lockfile.FILE, slug=model.slug, file=file)


def _is_locked(entry: lockfile.LockedModel, model: StoredModel) -> bool:
    source = entry["source"]
    if "ref" in source:
        names = ("type", "ref", "revision")
        return [source.get(name) for name in names] == [model.source.get(name) for name in names]
    with suppress(UsageError, OSError, KeyError):
        asked = entry["asked"]
        return model.slug == resolve.local_slug(absolute(asked.get("model") or asked["lora"]))
    return False


def _real(path: str | Path) -> Path:
    return Path(os.path.realpath(path))
