"""The steps undone: `clean` removes files with their receipts, `forget` the receipts alone."""

from __future__ import annotations

from pathlib import Path

from pipeline.bins.compile import cuda_toolkit, source, web_ui
from pipeline.core.download import discard
from pipeline.core.store import artifacts, receipts
from pipeline.core.store.locks import only_one
from pipeline.core.store.publish import part, remove
from pipeline.models import converter, resolve

from . import estimate
from .model import Steps


def clean_source(steps: Steps) -> None:
    with only_one(steps.llama_cpp.folder):
        source.clean(steps.llama_cpp)


def forget_source(steps: Steps) -> None:
    source.forget(steps.llama_cpp)


def clean_bins(steps: Steps) -> None:
    with only_one(steps.programs.source.target):
        steps.programs.source.clean()


def forget_bins(steps: Steps) -> None:
    steps.programs.forget()


def clean_toolkit(steps: Steps) -> None:
    release = steps.programs.release
    if release:
        with only_one(cuda_toolkit.place(steps.home, release)):
            cuda_toolkit.clean(steps.home, release)


def forget_toolkit(steps: Steps) -> None:
    if release := steps.programs.release:
        cuda_toolkit.forget(steps.home, release)


def clean_page(steps: Steps) -> None:
    web_ui.clean(steps.home)


def forget_page(steps: Steps) -> None:
    web_ui.forget(steps.home)


def clean_converter(steps: Steps) -> None:
    with only_one(converter.folder(steps.home)):
        converter.clean(steps.home)


def forget_converter(steps: Steps) -> None:
    converter.forget(steps.home)


def forget_resolve(steps: Steps) -> None:
    """What the hub answered, or what was found out about the user's own files."""
    reference = steps.require_reference()
    if steps.decides_quant():
        remove(steps.decision_path(steps.require_resolved()))
    if reference.kind == "hub":
        remove(steps.stored_path())
    else:
        resolve.forget(reference.path, steps.home)


def clean_resolve(steps: Steps) -> None:
    """As `forget_resolve`, and the headers that were read for plan and quant=auto."""
    resolved = steps.known()
    forget_resolve(steps)
    for folder in estimate.header_folders(steps, resolved) if resolved else ():
        remove(folder)


def targets(steps: Steps, step: str) -> list[Path]:
    """The files of the model that a step made or would make. Raises PipelineError."""
    chain = steps.require_chain()
    if step == "fetch":
        resolved = chain.resolved
        return [] if resolved.local else [resolved.folder / file.name for file in resolved.files]
    made = chain.conversion if step == "convert" else chain.quantization
    return [made.target] if made else []


def clean(steps: Steps, step: str) -> None:
    """Remove what the step made, and what a cut download left."""
    chain = steps.require_chain()
    between = chain.conversion if chain.quantization else None
    for target in targets(steps, step):
        with only_one(target):
            discard(part(target))
            if between and target == between.target:
                artifacts.discard(target)  # what was made from it stays up to date
            else:
                remove(target)
                receipts.invalidate(target)


def forget(steps: Steps, step: str) -> None:
    for target in targets(steps, step):
        receipts.invalidate(target)
