"""`prune`: take away what nothing uses any more. A model that can be served is never among it, nor
what it would take to serve it again."""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from pipeline.bins import binaries
from pipeline.bins.compile import active, cuda_toolkit, node, source
from pipeline.bins.compile.source import Source
from pipeline.bins.hardware.cuda_versions import CUDA_13
from pipeline.bins.release import prebuilt, releases
from pipeline.core import paths, signing
from pipeline.core.paths import Home
from pipeline.core.store import artifacts, receipts
from pipeline.core.store.artifacts import UNFINISHED
from pipeline.core.store.locks import is_held
from pipeline.deploy.ray import environment
from pipeline.models import converter, mix_file, on_disk
from pipeline.models.on_disk import OnDisk
from pipeline.report import quality

from . import uses
from .remove import BY_HAND, Candidates, Removable, carry_out, plain, require_no_run, unfinished
from .session import Session
from .uses import Uses

DAY = 24 * 3600
NO_PROGRAMS = (".build", ".source", ".ui", "package", "packages")  # of what is in bins/
# Programs of a llama.cpp that `upgrade` switched to are in a folder of its commit.
UPGRADED = re.compile(rf"[0-9a-f]{{{active.SHORT}}}")
# Of the cache: environments and toolkits, downloads, and what the tests have installed.
CACHED = (
    *("converter-*", "cuda-*", "node-*", "ray-*", "signing-*", "archives/*/*"),
    *("clients/*", "litellm/*", "pei-docker-*"),
)


def prune(session: Session) -> None:
    """Remove it, once it is agreed to. Raises PipelineError while another run is under way."""
    carry_out(session, lambda: candidates(session))


def candidates(session: Session) -> Candidates:
    home, days = session.home, session.request.older_than
    for link in (paths.dangling(home.models / kind) for kind in ("gguf", "source")):
        if link:  # else all that belongs to the models there would go
            raise link
    stored = on_disk.look(home)
    known = uses.find(session, stored)
    require_no_run(known.under_way)
    go = [
        *of_models(session, stored, known),
        *of_answers(home, stored),
        *of_bins(session, known, days),
        *of_measurements(home, stored, days),
        *of_logs(home, known, days),
        *of_cache(home, days),
    ]
    stay = [(path, BY_HAND) for path in stored.unknown]
    return Candidates(go=tuple(go), stay=tuple(stay))


def of_models(session: Session, stored: OnDisk, known: Uses) -> Iterator[Removable]:
    """Cut downloads, intermediate files, and what a GGUF that is here was converted from. What
    would be made again when it is served next keeps what it is made from."""
    home, programs = session.home, session.programs
    made = [model for model in stored.models if model.kind in ("model", "adapter")]
    llama_cpp, tool = programs.llama_cpp.recipe(), programs.tool if made else None
    done = {x.slug for x in made}
    stale = {x.slug for x in made if not on_disk.is_up_to_date(x, llama_cpp, tool)}
    for path in stored.unfinished:
        if not known.of_slug(on_disk.slug_of(home, path), home):
            yield unfinished(path, "an interrupted download, or a file that was not finished")
    for path in on_disk.empty(home):
        yield unfinished(path, "nothing is left in it")
    for model in stored.models:
        if model.slug in stale or known.of_slug(model.slug, home):
            continue
        if model.kind == "intermediate":
            why = f"{model.name}: an intermediate file"
            discard = partial(artifacts.take_away, keep_receipt=True)
            yield Removable(kind="intermediate", paths=model.files, why=why, remove=discard)
        elif model.kind == "source" and model.slug in done:
            why = f"{model.name}: the GGUF made from it is here"
            yield Removable(kind="source", paths=model.files, why=why)


def of_answers(home: Home, stored: OnDisk) -> Iterator[Removable]:
    """What the hub answered about models that are not here. One whose folder leads to a disk that
    is not mounted may come back."""
    present = stored.slugs | {on_disk.slug_of(home, path) for path in stored.unknown}
    for path, slug in on_disk.answers(home):
        if slug not in present:
            yield plain("answer", path, "an answer about a model that is not here")


def of_bins(session: Session, known: Uses, days: int) -> Iterator[Removable]:
    """Sources, programs and build folders of a llama.cpp that is neither the present one nor the
    one before it, to which `upgrade to=previous` goes back."""
    home, sources = session.home, kept_sources(session)
    if any(each.local for each in sources):  # somebody works on it
        return
    yield from killed_runs(home.bins, *(home.bins / x for x in (".build", ".source", ".ui")))
    for path in _entries(home.bins / ".source"):
        is_ours = path.name in receipts.load(path.parent)
        if is_ours and path.is_dir() and all(path != each.folder for each in sources):
            yield Removable(kind="llama.cpp", paths=(path,), why="source of another llama.cpp")
    for path in _entries(home.bins / ".ui"):
        of = UPGRADED.fullmatch(path.name.removeprefix("page-"))
        if path.is_dir() and of and not any(x.commit.startswith(of[0]) for x in sources):
            yield Removable(kind="page", paths=(path,), why="page of another llama.cpp")
    old = [path for path in _entries(home.bins) if is_old(session, path, known)]
    for path in old:
        yield Removable(kind="programs", paths=(path,), why="programs of another llama.cpp")
    for path in _entries(home.bins / ".build"):
        is_gone = home.bins / path.name in old
        if path.is_dir() and (is_gone or is_older(path, days)):
            why = "build folder of another llama.cpp" if is_gone else unused(days)
            yield Removable(kind="build", paths=(path,), why=why)


def is_old(session: Session, folder: Path, known: Uses) -> bool:
    """Whether its programs are of a llama.cpp that nothing asks for any more."""
    if folder.name.startswith(".") or folder.name in NO_PROGRAMS or known.below(folder):
        return False
    if UPGRADED.fullmatch(folder.name):
        inside = [path for path in _entries(folder) if path.is_dir()]
        return bool(inside) and all(is_old(session, path, known) for path in inside)
    chosen = binaries.chosen_folder()
    if chosen and paths.absolute(chosen).is_relative_to(folder):
        return False
    recipes = [entry.recipe for entry in receipts.load(folder).values()]
    if not recipes:
        return False
    if recipes[0].get("step") == "prebuilt":
        records = (session.home.run / "releases").glob("*.json")
        asked_for = [release for path in records if (release := releases.stored(path))]
        present = [prebuilt.recipe_of(release) for release in (prebuilt.pinned(), *asked_for)]
        return recipes[0] not in present
    is_build = recipes[0].get("step") == "build"
    made_from = recipes[0].get("source")
    return is_build and all(made_from != each.recipe() for each in kept_sources(session))


def kept_sources(session: Session) -> list[Source]:
    """The active source of llama.cpp, and the one before it. Raises PipelineError."""
    state = active.read(session.home)
    previous = source.upgraded(session.home, state.previous) if state and state.previous else None
    before = previous or source.pinned(session.home)
    return [session.programs.llama_cpp, *([before] if state else [])]


def of_measurements(home: Home, stored: OnDisk, days: int) -> Iterator[Removable]:
    """What was measured of quants and for mixes that are not here: it would be measured again only
    if they were made again. And what a killed run left of it."""
    for path in quality.left_behind(home):
        yield unfinished(path, "left by a run that was killed")
    present, inputs = set[str](), set[str]()
    for model in stored.models:
        present.add("+".join(map(receipts.known_sha256, model.files)))
        if model.kind == "mix":
            entry = receipts.load(model.files[0].parent)[model.files[0].name]
            inputs.add(str(entry.recipe["input"]))
    for of, known in ((quality.of_quants(home), present), (mix_file.results_of(home), inputs)):
        for path, digest in of:
            if digest not in known and is_older(path, days):
                yield plain("measurement", path, "of a model that is not here")


def of_logs(home: Home, known: Uses, days: int) -> Iterator[Removable]:
    """Old logs, and the headers that `plan` has read."""
    open_files = {use.file for use in known.uses}
    for path in sorted(home.logs.glob("*.log")):
        if path.is_file() and is_older(path, days) and path.resolve() not in open_files:
            yield plain("log", path, "an old log")
    for path in _entries(home.run / "headers"):
        if is_older(path, days):
            yield Removable(kind="headers", paths=(path,), why=unused(days))


def of_cache(home: Home, days: int) -> Iterator[Removable]:
    """What was not used for some days, in the cache that all checkouts share. What this one would
    use next stays: its converter, Ray, CUDA toolkit, Node.js and model-signing."""
    cache = paths.cache(home)
    present = (
        *(converter.installed(home).folder, environment.installed(home).folder),
        *(cuda_toolkit.folder(home, CUDA_13).path, node.folder(home).path),
        signing.folder(home).path,
    )
    yield from killed_runs(cache, *_entries(cache / "archives"))
    for path in (path for pattern in CACHED for path in sorted(cache.glob(pattern))):
        is_lock = path.name.endswith(".lock") or path.name.startswith(".")
        if not is_lock and path not in present and is_older(path, days) and not is_held(path):
            yield Removable(kind="cache", paths=(path,), why=unused(days))


def killed_runs(*folders: Path) -> Iterator[Removable]:
    """What killed runs left in these folders, and nobody makes now."""
    for path in (path for folder in folders for path in _entries(folder)):
        match = UNFINISHED.fullmatch(path.name)
        if match and not is_held(path.with_name(match["name"])):
            yield unfinished(path, "was not finished")


def is_older(path: Path, days: int) -> bool:
    """Whether nobody used it in these days, by the time of the file, of what is in the folder and
    of its lock, which whoever uses it takes."""
    times = [path, path.with_name(f".{path.name}.lock")]
    times += [*path.iterdir()] if path.is_dir() and not path.is_symlink() else []
    written = (each.lstat().st_mtime for each in times if os.path.lexists(each))
    newest = max(written, default=math.inf)  # gone meanwhile: another run has removed it
    return time.time() - newest >= days * DAY


def unused(days: int) -> str:
    return f"not used for {days} days" if days else "not in use"


def _entries(folder: Path) -> list[Path]:
    """What is in a folder, without links: somebody put them there."""
    paths = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in paths if not path.is_symlink())
