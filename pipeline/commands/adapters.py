"""LoRA adapters: prepared beside the model that they change, by the same steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain as chained
from pathlib import Path, PurePath
from typing import Any

from pipeline.core.errors import PipelineError, UsageError
from pipeline.core.paths import Home
from pipeline.core.store import stat_cache
from pipeline.models import checkpoint, gguf, resolve, safetensors, skeleton
from pipeline.models.adapter import BASE_CONFIG, CONFIG, base_misfit, file_misfit, peft_misfit

from . import estimate
from .model import Model

HINT = "use one made for this model"


def check(models: Iterable[Model]) -> None:
    """Raise UsageError where an adapter does not fit its model, as far as that is known before the
    two are here."""
    for model in models:
        for adapter in model.adapters:
            if why := misfit(adapter, model):
                raise UsageError(f"lora={name_of(adapter)}: {why}", HINT)


def all_fit(models: Iterable[Model]) -> bool:
    """Whether every adapter is made, and its model, and fits it."""
    pairs = [(adapter, model) for model in models for adapter in model.adapters]
    both = (each for pair in pairs for each in pair)
    is_made = all(estimate.is_made(each, each.require_chain()) for each in both)
    return is_made and not any(misfit(*pair) for pair in pairs)


def difference(adapter: Path, model: Path, home: Home) -> str:
    """Why a GGUF is no adapter for `model`; empty where it is one, which is remembered. Raises
    PipelineError."""
    book, key = home.run / "adapters.json", [str(model), *stat_cache.stamp(model)]
    if stat_cache.recall(book, adapter) == key:
        return ""
    stamp = stat_cache.stamp(adapter)
    why = file_misfit(adapter, gguf.shards(model))
    if not why:
        stat_cache.remember(book, adapter, key, stamp)
    return why


def name_of(adapter: Model) -> str:
    """As it was typed, without its scale."""
    return adapter.require_reference().text


def misfit(adapter: Model, model: Model) -> str:
    """Why an adapter does not fit `model`, by what can be read of both now; else empty. Raises
    PipelineError where it is no adapter."""
    chain, of_model = adapter.require_chain(), model.chain()
    if of_model is None:  # quant=auto is not decided yet
        return ""
    base = chain.resolved.base
    if base is None or estimate.is_made(adapter, chain):
        file, header = estimate.header_file(adapter, chain), estimate.header_file(model, of_model)
        return difference(file, header, model.home) if file and header else ""
    resolved = of_model.resolved
    try:
        if resolved.kind == "safetensors":
            return peft_misfit(shapes(adapter), shapes(model))
        (config,) = [file for file in base.files if file.name == BASE_CONFIG]
        data = skeleton.whole(estimate.readables(adapter, base, [config])[0])
    except PipelineError:
        return ""  # not here, and not to be had piece by piece: the start compares what was made
    header = estimate.header_file(model, of_model)
    document = checkpoint.document(data, BASE_CONFIG)
    return base_misfit(document, gguf.read(header)) if header else ""


def shapes(model: Model) -> Mapping[str, list[int]]:
    """Those of its tensors, of safetensors. Raises PipelineError."""
    resolved = model.require_resolved()
    weights = [file for file in resolved.files if file.name.endswith(".safetensors")]
    heads = [safetensors.head(file) for file in estimate.readables(model, resolved, weights)]
    return dict(chained.from_iterable(head.shapes.items() for head in heads))


def size(adapter: Model) -> int:
    """The bytes of its GGUF, whether or not it is there yet: all of it is loaded."""
    chain = adapter.require_chain()
    if chain.final.is_file():
        return chain.final.stat().st_size
    return chain.conversion.need if chain.conversion else chain.resolved.bytes


def sizes(model: Model) -> int:
    """The bytes of all adapters of a model."""
    return sum(map(size, model.adapters))


def served(model: Model) -> tuple[tuple[PurePath, float], ...]:
    """The files of a model's adapters with their scales, as its server gets them."""
    return tuple((each.require_chain().final, scale_of(each)) for each in model.adapters)


def scale_of(adapter: Model) -> float:
    scale = adapter.request.scale
    return 1.0 if scale is None else scale


def planned(model: Model) -> list[dict[str, Any]]:
    """The adapters as plain values. Sizes in bytes."""
    return [
        {
            "name": chain.resolved.name,
            "why": chain.resolved.why,
            "file": str(chain.final),
            "file_bytes": size(each),
            "scale": scale_of(each),
        }
        for each in model.adapters
        for chain in [each.require_chain()]
    ]


def warnings(model: Model) -> list[str]:
    """What may be wrong and need not be: an adapter that names another model."""
    name, lines = model.require_resolved().name, []
    for adapter in model.adapters:
        trained = adapter.require_resolved().base_name
        own = resolve.short_name(trained.replace("\\", "/").rstrip("/").rpartition("/")[2])
        if trained and own.casefold() != name.casefold():
            lines.append(
                f"lora={name_of(adapter)}: was trained for {trained}, by its {CONFIG}, and "
                f"the model is {name}"
            )
    return lines
