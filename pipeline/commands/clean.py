"""The steps undone: `clean` removes files with their receipts, `forget` the receipts alone."""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.bins.compile import cuda_toolkit, source
from pipeline.core.download import discard
from pipeline.core.paths import Home
from pipeline.core.statement import companions
from pipeline.core.store import artifacts, receipts
from pipeline.core.store.locks import only_one
from pipeline.core.store.publish import part, remove
from pipeline.models import converter, mix_file, resolve

from . import headers, uses
from . import remove as removal
from .model import Model
from .programs import Programs


def clean_source(programs: Programs) -> None:
    with only_one(programs.llama_cpp.folder):
        source.clean(programs.llama_cpp)


def clean_bins(programs: Programs) -> None:
    with only_one(programs.source.target):
        programs.source.clean()


def clean_toolkit(programs: Programs) -> None:
    if release := programs.release:
        toolkit = cuda_toolkit.folder(programs.home, release)
        with only_one(toolkit.path):
            toolkit.clean()


def forget_toolkit(programs: Programs) -> None:
    if release := programs.release:
        cuda_toolkit.folder(programs.home, release).forget()


def clean_converter(home: Home) -> None:
    folder = converter.installed(home).folder
    with only_one(folder):
        remove(folder)


def forget_resolve(model: Model) -> None:
    """Drop what the hub answered, or what is cached of the user's own files."""
    reference = model.require_reference()
    if model.decides_quant():
        remove(model.decision_path(model.require_resolved()))
    if reference.kind == "hub":
        remove(model.stored_path())
    else:
        resolve.forget(reference.path, model.home)


def clean_resolve(model: Model) -> None:
    """As `forget_resolve`, and the headers that were read for plan and quant=auto."""
    resolved = model.known()
    forget_resolve(model)
    for folder in headers.folders(model, resolved) if resolved else ():
        remove_files(folder)


def remove_files(folder: Path) -> None:
    """Remove the files of a folder, each under its lock. The locks stay, and so does the folder:
    another run may hold one, or wait for it."""
    for file in receipts.files_in(folder):
        with only_one(file):
            remove(file)


def targets(model: Model, step: str) -> list[Path]:
    """The files of the model that a step made or would make. Raises PipelineError."""
    chain = model.require_chain()
    if step == "fetch":
        resolved = chain.resolved
        return [] if resolved.local else [resolved.folder / file.name for file in resolved.files]
    made = [chain.conversion, chain.projector] if step == "convert" else [chain.quantization]
    mixes = [chain.quantization.mix] if chain.quantization and chain.quantization.budget else []
    return [*(each.target for each in made if each), *(mixes if step == "quantize" else [])]


def clean(model: Model, step: str) -> None:
    """Remove what the step made, or left half made. Raises PipelineError where a server uses it."""
    chain = model.require_chain()
    between = chain.conversion if chain.quantization else None
    files = targets(model, step)
    real = {Path(os.path.realpath(file)) for file in files}
    users = [use for use in uses.running(model.home) if use.file in real]
    removal.require_unused(model.request.named, users)
    for target in files:
        with only_one(target):
            discard(part(target))
            remove(mix_file.work_folder(part(target)))
            for path in companions(target):
                remove(path)
            if between and target == between.target:
                artifacts.discard(target)  # what was made from it stays up to date
            else:
                remove(target)
                receipts.invalidate(target)
    made = chain.quantization if step == "quantize" else None
    if made and made.budget:
        digest = made.input_identity(model.home)
        for path, of in mix_file.results_of(model.home):
            if of == digest:
                remove(path)


def forget(model: Model, step: str) -> None:
    for target in targets(model, step):
        receipts.invalidate(target)
