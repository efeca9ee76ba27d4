"""`provenance` and `sign`: what a file was made from, as a statement beside it; and signatures."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from pipeline.core import log, signing
from pipeline.core import statement as statements
from pipeline.core.errors import PipelineError, UsageError
from pipeline.core.paths import absolute
from pipeline.core.statement import SUFFIX
from pipeline.core.store.publish import disk_errors, publish_beside
from pipeline.models import gguf

from . import trace
from .model import Model
from .request import Request
from .session import Session

STDOUT = "-"


def provenance(session: Session) -> None:
    """Write the statements of a model's GGUFs, or of the package `pkg=`, each beside its file;
    with `key=` sign both. Raises PipelineError."""
    request = session.request
    if request.out == STDOUT and request.key:
        raise UsageError(
            "out=- and key= contradict each other", "a signature is a file: leave one out"
        )
    files = subjects(session)
    made = {file: trace.of_file(file, session.home, request.builder) for file in files}
    if request.out == STDOUT:
        for each in made.values():
            print(statements.text(each, indent=1 if len(made) == 1 else None), end="")
        return
    places = {file: file.with_name(file.name + SUFFIX) for file in files}
    if request.out:
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise UsageError(f"out={request.out}: there are {len(files)} files: {names}")
        places = {files[0]: absolute(request.out)}
    for file, each in made.items():
        write(places[file], statements.text(each))
    signatures = {}
    if request.key:
        targets = [part for file in files for part in (*gguf.shards(file), places[file])]
        signed = signing.sign(targets, request.key, session.home, offline=request.offline)
        signatures = dict(zip(targets, signed, strict=True))
    if request.json:
        rows = [
            {
                "path": str(file),
                "statement": str(place),
                "signatures": [
                    str(signatures[each])
                    for each in (*gguf.shards(file), place)
                    if each in signatures
                ],
            }
            for file, place in places.items()
        ]
        print(json.dumps(rows, indent=1))


def write(place: Path, text: str) -> None:
    """Write a statement, unless it stands there already."""
    data = text.encode()
    if place.is_file() and place.read_bytes() == data:
        log.info(f"up to date: {place}")
        return
    with disk_errors(place.parent, "out="):
        publish_beside(place, data)
    log.info(f"written: {place}")


def subjects(session: Session) -> list[Path]:
    """The files that statements are about: the package, or the first part of each GGUF that the
    models take. Raises PipelineError where one is not there."""
    pkg = only_one_named(session.request)
    if pkg:
        return [pkg]
    session.model.require_reference()
    return served(session.models.values())


def only_one_named(request: Request) -> Path | None:
    """The package, where that is named. Raises UsageError where a model is named too."""
    if request.pkg and request.reference:
        raise UsageError("pkg= and model= contradict each other", "leave one out")
    return request.pkg


def served_by(model: Model) -> list[Path]:
    """The first part of a model's GGUF, and its projector. Raises PipelineError where they are not
    here."""
    resolved = model.require_resolved()
    chain = model.require_chain()
    files = [chain.final]
    if chain.projector:
        files.append(chain.projector.target)
    elif resolved.mmproj and not resolved.local:
        files.append(resolved.folder / resolved.mmproj)
    for file in files:
        if not file.is_file():
            raise PipelineError(f"{file}: is not here yet", f"make it: {model.command('prepare')}")
    return files


# Signatures alone


def sign(session: Session) -> None:
    """Sign a package, a folder, a `.gguf`, or the GGUF of a reference. Raises PipelineError."""
    request = session.request
    if not request.key:
        raise UsageError("no key given", f"pass key=PATH: {signing.KEY_HINT}")
    signed = signing.sign(to_sign(session), request.key, session.home, offline=request.offline)
    if request.json:
        print(json.dumps([str(path) for path in signed], indent=1))


def to_sign(session: Session) -> list[Path]:
    """The files or folders that a signature is made of, or looked for. Raises PipelineError."""
    pkg = only_one_named(session.request)
    if pkg:
        return [pkg]
    reference = session.model.require_reference()
    if reference.path:
        return [reference.path] if reference.kind == "folder" else gguf.shards(reference.path)
    return [part for file in served(session.models.values()) for part in gguf.shards(file)]


def served(models: Iterable[Model]) -> list[Path]:
    """The first parts of all GGUFs that the models take, each once. Raises PipelineError."""
    return [*dict.fromkeys(file for model in models for file in served_by(model))]
