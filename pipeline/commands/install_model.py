"""Prepared files where a profile wants them: its `model_root` and `hf_filename`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.core import paths
from pipeline.core.errors import PipelineError
from pipeline.core.store.locks import only_one
from pipeline.core.store.publish import full_disk_is_an_error, publish_same
from pipeline.models import gguf

from . import serve
from .model import Model

if TYPE_CHECKING:
    from pipeline.serve.config.configuration import InstanceSpec


def require_writable(specs: Iterable[InstanceSpec]) -> None:
    """Raise PipelineError where a prepared file could not be put where it is wanted."""
    for spec in specs:
        if spec.download_to is None:
            continue
        try:
            paths.require_writable(spec.download_to.parent)
        except PipelineError as error:
            hint = "let this user write there (of a container: --user), or download it yourself"
            raise PipelineError(error.message, hint) from None


def install(model: Model, spec: InstanceSpec) -> None:
    """Have the prepared files where they are wanted. The model itself, or its first part, comes
    last: it says that all is there. Raises PipelineError."""
    if spec.download_to is None:
        return
    first, *parts = gguf.shards(model.require_chain().final)
    files = installed(model, spec)
    files |= {part: spec.download_to.with_name(part.name) for part in parts}
    with (
        full_disk_is_an_error(spec.download_to.parent, "llamacpp.model_root"),
        only_one(spec.download_to),
    ):
        for file in [*(file for file in files if file != first), first]:
            if not files[file].exists():
                publish_same(file, files[file])


def installed(model: Model, spec: InstanceSpec) -> dict[Path, Path]:
    """Where a profile wants the model, by its first part, and its projector."""
    from pipeline.serve.config.configuration import projector_of

    if spec.download_to is None:
        return {}
    first, target = model.require_chain().final, spec.download_to
    # llama.cpp finds the parts of a split model by their names
    target = target.with_name(first.name) if gguf.SHARD.fullmatch(first.name) else target
    projector = None if model.request.mmproj else serve.projector(model)
    return {first: target} | ({projector: projector_of(target)} if projector else {})
