"""What has to run before what, where that depends on the model that is named."""

from __future__ import annotations

from pipeline.commands.model import Steps
from pipeline.models import quants


def lacks_model(steps: Steps) -> str:
    """What has to be said yet, for what works on models."""
    if steps.request.reference or steps.configured:
        return ""
    return "which model? Say model=… (model=demo for a first try)"


def lacks_config(steps: Steps) -> str:
    """What has to be said yet, for what works on many servers."""
    if steps.configured:
        return ""
    return "which servers? Say config=… (configs/ has examples) or profile=…"


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
    needed = any(step in comes_first(model) for model in steps.models.values())
    return [] if needed or not steps.models else ["resolve"]
