"""The settings that `tune` found for a model, as `serve` and `up` use them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pipeline.core.store import receipts, stat_cache
from pipeline.report import host
from pipeline.report.tuned import Conditions, load
from pipeline.report.tuning_axes import PLACING
from pipeline.serve.config.options import ResolvedOptions

from .model import Model


def options(model: Model, file: Path) -> Mapping[str, str]:
    """llama-server's options for the GGUF `file` of `model`; none where it was not tuned here with
    these programs. Nothing is hashed."""
    if not (file.is_file() and model.binaries.has("llama-server")):
        return {}
    digest = receipts.known_sha256(file) or stat_cache.recall(_digests(model), file)
    kept = load(key(model, str(digest)).place(model.home.run)) if digest else None
    return kept.options if kept else {}


def digest(model: Model, file: Path) -> str:
    """SHA-256 of the GGUF `file`, of a split one that of its first part."""
    return receipts.known_sha256(file) or stat_cache.identity(_digests(model), file)


def _digests(model: Model) -> Path:
    return model.home.run / "sha256.json"


def key(model: Model, digest: str) -> Conditions:
    """What a result for the model with this sha256 is valid for."""
    given = ResolvedOptions(model.spec, {})
    placed = {name: text for name in (*PLACING, "cpu-moe") if (text := _text(given, name))}
    cards, draft = model.spec.control.gpu_ids, model.request.draft
    drafts = draft.reference.text if draft and draft.reference else model.request.spec_type
    return Conditions(
        program=model.binaries.sha256("llama-server"),
        model=digest,
        host=host.describe(),
        ctx_size=given.number("ctx-size"),
        placed=placed
        | ({"gpu_ids": cards} if cards else {})
        | ({"draft": drafts} if drafts else {}),
    )


def _text(given: ResolvedOptions, name: str) -> str:
    value = given.value(name)
    return "" if value is None else str(value)
