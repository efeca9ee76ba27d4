"""GGUF files with the header of a model: its own, or a skeleton where its weights are not here."""

from __future__ import annotations

import atexit
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from pipeline.core.errors import PipelineError
from pipeline.core.paths import require_writable
from pipeline.core.store.publish import require_space
from pipeline.core.store.receipts import Status
from pipeline.models import contents, converter, fetch, hub, skeleton
from pipeline.models import foreign_code as foreign
from pipeline.models.chain import Chain
from pipeline.models.contents import Readable
from pipeline.models.resolve import ModelFile, Resolved

from .model import Model

HEADER_BYTES = 16 * 1024 * 1024  # those of most models together
AT_ONCE = 8  # headers of a split model that are read at the same time


def of_model(model: Model, chain: Chain) -> Path | None:
    """A GGUF with the model's header: its own, or a skeleton; None where none can be had yet."""
    if model.is_made(chain):
        return chain.final
    if chain.quant:
        return unquantized(model, chain)
    files = of_weights(chain.resolved)
    place = folder(model.home.run, files[0].identity)
    try:
        return skeleton.gguf_skeleton(readables(model, chain.resolved, files), place)
    except PipelineError:
        return None  # not here, and not to be had piece by piece


def unquantized(model: Model, chain: Chain) -> Path | None:
    """The GGUF that is quantized, or its skeleton; None where neither can be had."""
    made = chain.conversion
    if made is None:
        return chain.quantization.input if chain.quantization else None
    if made.status is Status.CURRENT:
        return made.target
    environment = converter.installed(model.home)
    if not (environment.is_current() and made.script.is_file()):
        return None
    key = hashlib.sha256(json.dumps(made.recipe, sort_keys=True).encode()).hexdigest()
    target = _top(model.home.run) / chain.resolved.slug / f"{made.outtype.lower()}-{key[:12]}.gguf"
    if target.exists():
        return target
    try:
        files = readables(model, chain.resolved, chain.resolved.files)
    except PipelineError:
        return None  # not here, and not to be had piece by piece
    return skeleton.safetensors_skeleton(made, files, target, environment.python)


def of_weights(resolved: Resolved) -> list[ModelFile]:
    """The files of a model without its projector."""
    return [file for file in resolved.files if file.name != resolved.mmproj]


def readables(model: Model, resolved: Resolved, files: Iterable[ModelFile]) -> list[Readable]:
    """The model's files wherever they are, their headers read at once. Raises PipelineError."""
    from pipeline.core.parallel import for_each

    readable: list[Readable] = []
    for file in files:
        path = resolved.folder / file.name
        here = path if path.is_file() else next(fetch.elsewhere(resolved, file), None)
        if here:
            readable.append(contents.local(here, file.name))
        elif resolved.source["type"] == "hf" and not model.request.offline:
            repo, commit = str(resolved.source["ref"]), str(resolved.source["revision"])
            readable.append(hub.readable(repo, commit, file))
        else:
            raise PipelineError(f"{file.name}: is not here yet")
    for_each(lambda file: file.get(0, min(file.size, hub.FIRST_READ)), readable, AT_ONCE)
    return readable


def foreign_code(model: Model, chain: Chain) -> list[str]:
    """The classes that the files of a model name that is converted, as far as they can be read.
    Raises PipelineError."""
    if chain.conversion is None:
        return []
    named = [file for file in chain.resolved.files if foreign.may_name(file.name)]
    try:
        files = readables(model, chain.resolved, named)
    except PipelineError:
        return []  # not here, and not to be had piece by piece: the conversion looks again
    return foreign.classes(files)


def require_convertible(model: Model, chain: Chain) -> None:
    """Raise PipelineError where the converter fails without the code that a model brings: it is
    tried on headers alone, before its weights are fetched. The converter must be here."""
    unquantized(model, chain)


def folder(run: Path, identity: str) -> Path:
    """Where the headers of a GGUF are kept, by the identity of its first file."""
    return _top(run) / _name(identity)


def folders(model: Model, resolved: Resolved) -> list[Path]:
    """Where the headers of a model may have been kept."""
    names = [resolved.slug, *(_name(file.identity) for file in resolved.files)]
    return [model.home.run / "headers" / name for name in names if name]


def _name(identity: str) -> str:
    return identity.rpartition(":")[2][:24]


@cache
def _top(run: Path) -> Path:
    """Where skeletons are kept; for this run alone where the home is full or read-only."""
    folder = run / "headers"
    try:
        require_writable(folder)
        require_space(folder, HEADER_BYTES)
    except PipelineError:
        folder = Path(tempfile.mkdtemp(prefix="llama-pipeline-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
