"""What can be said before any work: the home is writable, what is local is sound, and what will be
needed is there."""

from __future__ import annotations

from pipeline import models
from pipeline.bins import binaries
from pipeline.core import log, paths
from pipeline.core.errors import UsageError
from pipeline.core.paths import Home
from pipeline.models import quants

from . import resolve
from .model import Model


def require_writable(home: Home) -> None:
    """Raise PipelineError where nothing can be made."""
    for folder in (home.root, home.run, home.logs, home.models, home.bins):
        paths.require_writable(folder)


def check(model: Model) -> None:
    """Raise PipelineError where a run that makes something would fail."""
    require_writable(model.home)
    if model.request.wanted.quant == quants.ALL:
        raise UsageError("quant=all: is for plan alone", "name one, or say quant=auto")
    check_request(model)
    path = model.request.reference and model.request.reference.path
    if model.request.force and path:  # what is known of it may be out of date
        models.resolve.forget(path, model.home)
        resolve.look(model, path)


def check_request(model: Model) -> None:
    """As `check`, for runs that make nothing."""
    request, home, source = model.request, model.home, model.llama_cpp
    reference, wanted = request.reference, request.wanted
    model.programs.require_device()
    external = binaries.external(home)
    quant = wanted.quant or quants.DEFAULT
    is_converted = reference is not None and reference.kind in ("demo", "folder")
    if external and is_converted and quant not in quants.DIRECT:
        external.program("llama-quantize")
    if external and wanted.imatrix and models.imatrix.is_text(wanted.imatrix):
        external.program("llama-imatrix")
    if reference and reference.note:
        log.info(reference.note)
    if source.local:
        log.info(
            f"{source.folder} differs from the pin; used as it is, and recorded as {source.tree}"
        )
    book = home.run / "gguf.json"
    own = request.mmproj and models.gguf.read_cached(request.mmproj, book)
    if reference and reference.path:
        if reference.kind == "gguf":
            models.resolve.gguf_path(reference.path, home)
            if own and request.mmproj:
                models.projector.require(
                    own, models.gguf.read_cached(reference.path, book), request.mmproj.name
                )
        else:
            models.resolve.check_folder(reference.path, model.architectures())
    model.chain()  # what cannot be meant is said now
    if wanted.imatrix:
        models.imatrix.require_usable(wanted.imatrix)
