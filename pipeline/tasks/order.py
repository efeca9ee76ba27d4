"""What has to run before what, where that depends on the model that is named."""

from __future__ import annotations

from pipeline.models import quants

from .steps import Steps


def lacks_model(steps: Steps) -> bool:
    return steps.request.reference is None


def comes_first(steps: Steps) -> list[str]:
    """What has to be there for `resolve`: of a folder the source knows the architectures, and
    quant=auto asks the programs and the converter. All else is resolved before any of it."""
    reference = steps.request.reference
    if reference and steps.request.wanted.quant == quants.AUTO:
        is_converted = reference.kind in ("demo", "folder")
        return ["source", "build_bins", *(["converter"] if is_converted else [])]
    return ["source"] if reference and reference.kind == "folder" else []


def after_resolve(steps: Steps, step: str) -> list[str]:
    """`resolve`, unless it needs `step` itself."""
    return [] if lacks_model(steps) or step in comes_first(steps) else ["resolve"]
