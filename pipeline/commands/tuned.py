"""The settings that `tune` found for a model, as `serve` and `up` use them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pipeline.core.errors import doitw
from pipeline.core.store import receipts, stat_cache
from pipeline.report import host
from pipeline.report.tuned import FOLDER, Conditions, TuneResult, load
from pipeline.report.tuning_axes import BENCH, PLACING, THREADS_BATCH
from pipeline.serve.config.options import ResolvedOptions

from .model import Model


def options(model: Model, file: Path, typed: ResolvedOptions) -> Mapping[str, str]:
    """llama-server's options for the GGUF `file` of `model`; none where it was not tuned here with
    these programs, and the options that were given then. `typed` are the user's options. Nothing is
    hashed."""
    wanted = _wanted(model, file, typed)
    kept = load(wanted.place(model.home.run)) if wanted else None
    return kept.options if kept and not _others(typed, kept) else {}


def warnings(model: Model, file: Path, typed: ResolvedOptions) -> list[str]:
    """Why settings that `tune` found for the GGUF `file` are not used here."""
    if (wanted := _wanted(model, file, typed)) is None:
        return []
    if kept := load(wanted.place(model.home.run)):
        reasons = _others(typed, kept) if kept.options else []
    else:
        results = [
            each
            for path in sorted((model.home.run / FOLDER).glob("*.json"))
            if (each := load(path))
        ]
        keys = [each.key for each in results if each.options and each.key.model == wanted.model]
        reasons = min((differences(key, wanted) for key in keys), key=len, default=[])
    if not reasons:
        return []
    return [
        f"tuned settings are not used: they were measured with {', '.join(reasons)}; "
        f"{doitw('tune')} measures again, tuned=no leaves them out"
    ]


def differences(key: Conditions, wanted: Conditions) -> list[str]:
    """What a result is valid for, where it is not what is wanted."""
    found = []
    if key.program != wanted.program:
        found.append("another llama-server")
    if key.host != wanted.host:
        found.append("another machine")
    if key.ctx_size != wanted.ctx_size:
        found.append(f"ctx_size={key.ctx_size}" if key.ctx_size else "no ctx_size given")
    if key.placed != wanted.placed:
        found.append("other options for devices or drafts")
    return found


def given(typed: ResolvedOptions) -> dict[str, str]:
    """The user's options that `tune` does not try then, though they count for the speed."""
    names = [name for name in (*BENCH, THREADS_BATCH) if name not in PLACING]
    return {name: text for name in names if (text := _text(typed, name))}


def _wanted(model: Model, file: Path, typed: ResolvedOptions) -> Conditions | None:
    """What a result for the GGUF `file` has to be valid for; None where that takes hashing it."""
    if not file.is_file():
        return None
    digest = receipts.known_sha256(file) or stat_cache.recall(model.home.digests, file)
    return key(model, str(digest), typed) if digest else None


def _others(typed: ResolvedOptions, kept: TuneResult) -> list[str]:
    """The options that were given when a result was measured, and are not given now."""
    now = given(typed)
    return [f"{name}={value}" for name, value in kept.given.items() if now.get(name) != value]


def digest(model: Model, file: Path) -> str:
    """SHA-256 of the GGUF `file`, of a split one that of its first part."""
    return receipts.known_sha256(file) or stat_cache.identity(model.home.digests, file)


def key(model: Model, digest: str, typed: ResolvedOptions) -> Conditions:
    """What a result for the model with this sha256 is valid for."""
    placed = {name: text for name in (*PLACING, "cpu-moe") if (text := _text(typed, name))}
    cards, draft = model.spec.control.gpu_ids, model.request.draft
    drafts = draft.reference.text if draft and draft.reference else model.request.spec_type
    return Conditions(
        program=model.binaries.sha256("llama-server"),
        model=digest,
        host=host.describe(),
        ctx_size=typed.number("ctx-size"),
        placed=placed
        | ({"gpu_ids": cards} if cards else {})
        | ({"draft": drafts} if drafts else {}),
    )


def _text(typed: ResolvedOptions, name: str) -> str:
    value = typed.value(name)
    return "" if value is None else str(value)
