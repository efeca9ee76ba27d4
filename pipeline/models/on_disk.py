"""The models in the home, by their receipts. Nothing is changed, no weight is read.

    models/gguf/<slug>/      a GGUF that was fetched or made, and what was made on the way
    models/source/<slug>/    the files that it was converted from

What has no receipt, or is not as its receipt says, was put there by hand: it is named and left
alone.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from msgspec import Struct

from pipeline.core.errors import PipelineError
from pipeline.core.paths import Home, absolute
from pipeline.core.pins import pins
from pipeline.core.statement import companions
from pipeline.core.store import json_file, receipts
from pipeline.core.store.artifacts import OWN, UNFINISHED, is_empty
from pipeline.core.store.receipts import Entry, Recipe, Status

from . import gguf, projector, quants, resolve
from .choice import fits_pattern, label, named, spelling
from .converter import requirements_sha256
from .gguf import SHARD
from .reference import PROJECTOR, FileFilter, Reference

Kind = Literal["model", "adapter", "projector", "intermediate", "imatrix", "mix", "source"]
COMMIT = re.compile(r"[0-9a-f]{7,40}")
LEVELS = 5  # of names for a model


class StoredModel(Struct, frozen=True, kw_only=True):
    """Files in the home that belong together: one GGUF with all its parts, or all files of a model
    that a GGUF is converted from. `quant` is empty where it has none. Size in bytes."""

    name: str
    slug: str
    kind: Kind
    quant: str
    source: Mapping[str, Any]
    files: tuple[Path, ...]
    bytes: int
    made_at: str
    beside: tuple[Path, ...] = ()  # statements of provenance, and signatures

    @property
    def names(self) -> list[str]:
        """Of its files, below the model's own folder."""
        below = 1 + max(at for at, part in enumerate(self.files[0].parts) if part == self.slug)
        return ["/".join(path.parts[below:]) for path in self.files]

    @property
    def reference(self) -> str:
        """The value of `model=` that makes it again."""
        ref = str(self.source.get("ref", ""))
        for text, pinned in pins().demos.items():
            if ref == pinned.archive.requirement:
                return text
        return ref

    @property
    def revision(self) -> str:
        """The commit, of a model from the hub."""
        return str(self.source.get("revision", ""))


class OnDisk(Struct, frozen=True, kw_only=True):
    """What is in `models/`. `unfinished` was left by a run that was killed or cut off, if none is
    under way; `unknown` was put there by hand."""

    models: tuple[StoredModel, ...]
    unfinished: tuple[Path, ...]
    unknown: tuple[Path, ...]

    @property
    def slugs(self) -> set[str]:
        return {model.slug for model in self.models}


def look(home: Home) -> OnDisk:
    """Everything in `models/`. Raises OSError."""
    models, unfinished, unknown = list[StoredModel](), list[Path](), list[Path]()
    for kind in ("gguf", "source"):
        for folder in home.model_folders(kind):
            known, strangers = dict[Path, Entry](), list[Path]()
            for path in _leaves(folder):
                if UNFINISHED.fullmatch(path.name):
                    unfinished.append(path)
                elif entry := _receipt(path):
                    known[path] = entry
                elif not OWN.fullmatch(path.name):
                    strangers.append(path)
            beside = {path for file in known for path in companions(file)}
            unknown += [path for path in strangers if path not in beside]
            if kind == "gguf":
                models += _ggufs(folder.name, known)
            elif known:
                models.append(_stored(folder.name, "source", "", known))
    return OnDisk(
        models=tuple(sorted(models, key=lambda each: (each.slug, each.kind, each.quant))),
        unfinished=tuple(unfinished),
        unknown=tuple(unknown),
    )


def empty(home: Home) -> Iterator[Path]:
    """The folders of models that hold only locks, and receipts of files that are gone."""
    for kind in ("gguf", "source"):
        for folder in home.model_folders(kind):
            if folder.is_dir() and is_empty(folder):
                yield folder


def by_name(stored: OnDisk) -> dict[str, StoredModel]:
    """The models that can be served, by a name for each: as short as the others allow. Of several
    revisions the one that was made last has the short name."""
    models = sorted((x for x in stored.models if x.kind == "model"), key=lambda x: x.made_at)
    newest = {(x.reference, x.quant, *x.names): x for x in models}
    found = dict[str, StoredModel]()
    for level in range(LEVELS):
        # an older revision is told by its commit
        candidates = [*newest.values()] if level < LEVELS - 2 else models
        often = Counter(_spellings(model)[level] for model in candidates)
        for model in candidates:
            name = _spellings(model)[level]
            if often[name] == 1 and name not in found and model not in found.values():
                found[name] = model
    return found


def projector_of(model: StoredModel, stored: OnDisk, home: Home) -> Path | None:
    """The projector that was fetched or made with `model`: the nearest one that fits by its
    metadata. None too where a header cannot be read, which the launch reports."""
    beside = [x for x in stored.models if x.kind == "projector" and x.slug == model.slug]
    named_files = {x.names[0]: x.files[0] for x in beside}
    with suppress(PipelineError):
        header = gguf.read_cached(model.files[0], home.run) if beside else None
        for name in sorted(named_files, key=lambda name: projector.rank(name, model.names[0])):
            made = gguf.read_cached(named_files[name], home.run)
            if header and projector.fits(made, header):
                return named_files[name]
    return None


def _spellings(model: StoredModel) -> list[str]:
    """LEVELS names for a model, each longer than the one before, and the last one its alone."""
    owned = model.slug.rpartition("__")[0] or model.slug
    names = [f"{name}-{model.quant}".rstrip("-") for name in (model.name, owned, model.slug)]
    return [model.name, *names, f"{model.slug}-{resolve.slug('-'.join(model.names[:1]))}"]


def _leaves(folder: Path) -> Iterator[Path]:
    """All files below a model's folder, which may be a link to another disk; a link in it for what
    it is, and what is unfinished, or may not be listed, as a whole."""
    if not folder.is_dir() or UNFINISHED.fullmatch(folder.name):
        yield folder
        return
    try:
        children = sorted(folder.iterdir())
    except PermissionError:
        yield folder
        return
    for child in children:
        if child.is_symlink():
            yield child
        else:
            yield from _leaves(child)


def _receipt(path: Path) -> Entry | None:
    """The receipt of a file that matches it, or that was copied or restored; else None."""
    is_ours = receipts.status(path) in (Status.CURRENT, Status.MOVED)
    return receipts.of(path) if is_ours else None


def _ggufs(slug: str, known: Mapping[Path, Entry]) -> Iterator[StoredModel]:
    """What is in `models/gguf/<slug>`: the parts of a split GGUF are one."""
    groups: dict[Path, list[Path]] = {}
    for path in known:
        shard = SHARD.fullmatch(path.name)
        groups.setdefault(path.with_name(shard["stem"]) if shard else path, []).append(path)
    for paths in groups.values():
        recipe = known[paths[0]].recipe
        step = str(recipe.get("step", ""))
        key = {"quantize": "type", "convert": "outtype"}.get(step, "")
        quant = str(recipe.get(key) or label(paths[0].name))
        kind: Kind = "model" if known[paths[0]].keep else "intermediate"
        if step in ("imatrix", "mix"):
            kind, quant = ("imatrix", "") if step == "imatrix" else ("mix", str(recipe["type"]))
        elif recipe.get("projector") or (step == "fetch" and PROJECTOR.search(paths[0].name)):
            kind = "projector"
        elif recipe.get("adapter") or recipe.get("use") == "adapter":
            kind = "adapter"
        yield _stored(slug, kind, quant, {path: known[path] for path in paths})


def _stored(slug: str, kind: Kind, quant: str, entries: Mapping[Path, Entry]) -> StoredModel:
    first = next(iter(entries.values()))
    return StoredModel(
        name="__".join(slug.split("__")[1:-1]) or slug,
        slug=slug,
        kind=kind,
        quant=quant,
        source=first.source or {},
        files=tuple(entries),
        bytes=sum(entry.size for entry in entries.values()),
        made_at=max(entry.made_at for entry in entries.values()),
        beside=tuple(path for file in entries for path in companions(file)),
    )


# Which model a command line names


def means(reference: Reference, model: StoredModel, home: Home) -> bool:
    """Whether `reference` is where `model` comes from. A branch or a tag means every revision that
    is here; a commit, or its beginning, that one alone."""
    if reference.kind == "demo":
        return model.slug == resolve.demo(reference.text, home).slug
    if reference.path is not None:
        return model.slug == resolve.local_slug(reference.path)
    if model.source.get("type") != "hf" or reference.repo.lower() != model.reference.lower():
        return False
    return not COMMIT.fullmatch(reference.revision) or model.revision.startswith(reference.revision)


def is_named(text: str, model: StoredModel) -> bool:
    """Whether `text` is the name or the slug of `model`, or the path that it was made from, which
    need not exist any more."""
    return text in (model.name, model.slug) or (
        model.source.get("type") in ("file", "folder") and model.reference == str(absolute(text))
    )


def narrow(models: Iterable[StoredModel], files: FileFilter) -> list[StoredModel]:
    """Those that `quant=`, `filename=` and `pattern=` mean, read as for a repository: only the
    names that its files have there count, not the folders of the home. Empty ones mean all."""
    models = list(models)
    # The file of this very path is meant, and of the same name in a folder only where it is alone.
    exact = {model.slug for model in models if files.filename in model.names}

    def is_named(model: StoredModel) -> bool:
        is_exact = model.slug not in exact or files.filename in model.names
        return is_exact and bool(named(model.names, files.filename))

    return [
        model
        for model in models
        if (not files.quant or _has_quant(model, files.quant))
        and (not files.filename or is_named(model))
        and (not files.pattern or any(fits_pattern(name, files.pattern) for name in model.names))
    ]


def _has_quant(model: StoredModel, quant: str) -> bool:
    """Whether `quant` is that of a model, however spelled; the point of a size counts."""
    own = model.quant.upper()
    is_spelled = not quants.is_mix(own) and spelling(own) == spelling(quant)
    return is_spelled or quants.canonical(own) == quants.canonical(quant.upper())


def slug_of(home: Home, path: Path) -> str:
    """The slug of the model in whose folder `path` lies; empty for any other path."""
    inside = path.relative_to(home.models).parts if path.is_relative_to(home.models) else ()
    return inside[1] if len(inside) > 1 else ""


def answers(home: Home) -> Iterator[tuple[Path, str]]:
    """The stored answers of the hub, and decisions of quant=auto, each with its model's slug."""
    for path in sorted((home.models / "resolved").glob("*.json")):
        slug = json_file.read(path, lambda data: str(data["slug"]))
        yield path, slug or path.stem.rpartition("__auto-")[0]


def is_up_to_date(model: StoredModel, llama_cpp: Recipe, tool: Recipe | None) -> bool:
    """Whether the converter of the source `llama_cpp`, and the llama-quantize that receipts name as
    `tool`, would not make it again. Nothing is hashed."""
    entries = receipts.load(model.files[0].parent)
    if (entry := entries.get(model.files[0].name)) is None:
        return True  # another run has just removed it, so nothing is old
    recipe = entry.recipe
    if recipe.get("step") == "quantize":
        if recipe.get("tool") != tool:
            return False
        inputs = [e.recipe for e in entries.values() if f"sha256:{e.sha256}" == recipe["input"]]
        recipe = inputs[0] if inputs else {"step": "fetch"}  # the input may be the user's own
    if recipe.get("step") == "convert":
        return bool(recipe["converter"] == {**llama_cpp, "requirements": requirements_sha256()})
    return True
