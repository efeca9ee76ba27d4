"""Prepared files where a profile wants them: its `model_root` and `hf_filename`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.core import paths
from pipeline.core.errors import PipelineError
from pipeline.core.store.locks import only_one
from pipeline.core.store.publish import full_disk_is_an_error, publish_same
from pipeline.models import gguf

from . import serve

if TYPE_CHECKING:
    from pipeline.serve.config.configuration import InstanceSpec

    from .model import Steps
    from .servers import Configured


def require_writable(steps: Steps) -> None:
    """Raise PipelineError where a prepared file could not be put where it is wanted."""
    for draft in steps.configured.configuration.enabled if steps.configured else ():
        if draft.download_to is None:
            continue
        try:
            paths.require_writable(draft.download_to.parent)
        except PipelineError as error:
            hint = "let this user write there (of a container: --user), or download it yourself"
            raise PipelineError(error.message, hint) from None


def place(steps: Steps) -> None:
    """Have the prepared files where they are wanted. The model itself, or its first part, comes
    last: it says that all is there. Raises PipelineError."""
    if (configured := steps.configured) is None:
        return
    for draft in configured.configuration.enabled:
        if draft.download_to is None:
            continue
        first, *parts = gguf.shards(configured.steps_of(draft).require_chain().final)
        files = placed(configured, draft)
        files |= {part: draft.download_to.with_name(part.name) for part in parts}
        with (
            full_disk_is_an_error(draft.download_to.parent, "llamacpp.model_root"),
            only_one(draft.download_to),
        ):
            for file in [*(file for file in files if file != first), first]:
                if not files[file].exists():
                    publish_same(file, files[file])


def placed(configured: Configured, draft: InstanceSpec) -> dict[Path, Path]:
    """Where a profile wants the model, by its first part, and its projector."""
    from pipeline.serve.config.configuration import projector_of

    if draft.download_to is None:
        return {}
    steps, target = configured.steps_of(draft), draft.download_to
    first = steps.require_chain().final
    # llama.cpp finds the parts of a split model by their names
    target = target.with_name(first.name) if gguf.SHARD.fullmatch(first.name) else target
    projector = None if steps.request.mmproj else serve.projector(steps)
    return {first: target} | ({projector: projector_of(target)} if projector else {})
