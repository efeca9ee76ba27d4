"""What is prepared beside a model, by the same steps: a smaller model that drafts for it, and LoRA
adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import chain as chained
from pathlib import Path, PurePath
from typing import Any

from pipeline.core.errors import PipelineError, UsageError
from pipeline.core.paths import Home
from pipeline.core.store import stat_cache
from pipeline.models import checkpoint, gguf, resolve, safetensors, vocabulary
from pipeline.models.adapter import BASE_CONFIG, CONFIG, base_misfit, file_misfit, peft_misfit
from pipeline.serve.server import Server

from . import estimate, headers
from .estimate import MemoryEstimate
from .model import Model

MTP = "draft-mtp"  # a --spec-type: a head of the model itself drafts
SIMPLE = "draft-simple"  # a --spec-type: the one with a whole model of its own
DRAFT_OPTIONS = ("--spec-draft-model", "--model-draft")
DRAFT_HINT = "use a smaller model of the same family, or draft=ngram, which needs none"
NO_HEAD = "the model has no head for multi-token prediction"
ADAPTER_HINT = "use one made for this model"
VECTOR_HINT = "use one made with this model"


def check(models: Iterable[Model]) -> None:
    """Raise UsageError where a draft or an adapter is already known not to fit its model."""
    for model in models:
        with model.placed():
            _check(model)


def _check(model: Model) -> None:
    if model.draft:
        theirs, own = vocabulary_of(model), vocabulary_of(model.draft)
        why = theirs and own and vocabulary.difference(theirs, own)
        if why:
            name = model.draft.require_reference().text
            raise UsageError(f"draft={name}: cannot draft for this model: {why}", DRAFT_HINT)
    if lacks_head(model):
        raise UsageError(f"draft=mtp: {NO_HEAD}", DRAFT_HINT)
    for adapter in model.adapters:
        if why := misfit(adapter, model):
            raise UsageError(f"lora={name_of(adapter)}: {why}", ADAPTER_HINT)


def is_ready(models: Iterable[Model]) -> bool:
    """Whether every draft and adapter is made, and its model, and the adapters fit; the start of
    the server compares the drafts."""
    for model in models:
        group = (model, *model.beside.values())
        if len(group) > 1 and not all(x.is_made(x.require_chain()) for x in group):
            return False
        if lacks_head(model) or any(misfit(adapter, model) for adapter in model.adapters):
            return False
    return True


def difference(cache: Path, file: Path, model: Path, compare: Callable[[], str]) -> str:
    """Why `file` does not fit `model`, by `compare`; empty where it does, which is remembered in
    `cache` while neither changes. Raises PipelineError."""
    key = [str(model), *stat_cache.stamp(model)]
    if stat_cache.recall(cache, file) == key:
        return ""
    stamp = stat_cache.stamp(file)
    why = compare()
    if not why:
        stat_cache.remember(cache, file, key, stamp)
    return why


def require_served(server: Server, model: Path, home: Home) -> None:
    """Raise UsageError where a server's draft has another vocabulary than its `model`: llama-server
    would go on without it; or one of its adapters or control vectors is for another model, or the
    model has no head that is to draft."""
    draft = Path(server.folder, draft_file(server))
    if draft_file(server) and SIMPLE in server.argument("--spec-type") and draft.is_file():

        def compare() -> str:
            return vocabulary.difference(vocabulary.of_gguf(model), vocabulary.of_gguf(draft))

        if why := difference(home.run / "drafts.json", draft, model, compare):
            why = f"{draft.name}: cannot draft for this model: {why}"
            raise UsageError(f"{server.name}: {why}", DRAFT_HINT)
    by_head = MTP in server.argument("--spec-type").split(",") and not draft_file(server)
    if by_head and not gguf.read_cached(model, home.run).heads:
        raise UsageError(f"{server.name}: spec_type {MTP}: {NO_HEAD}", DRAFT_HINT)
    for adapter, _ in server.adapters:
        if adapter.is_file() and (why := adapter_difference(adapter, model, home)):
            raise UsageError(f"{server.name}: {adapter}: {why}", ADAPTER_HINT)
    for vector, _ in server.control_vectors:
        from pipeline.models import control_vector

        if vector.is_file() and (why := control_vector.misfit(vector, model)):
            raise UsageError(f"{server.name}: {vector}: {why}", VECTOR_HINT)


# Drafts


def draft_file(server: Server) -> str:
    """The draft model that a server's options name, as they name it; empty for none."""
    return next(filter(None, map(server.argument, DRAFT_OPTIONS)), "")


def vocabulary_of(model: Model) -> vocabulary.Vocabulary | None:
    """From the GGUF's header; without the converter, from the model's tokenizer.json."""
    chain = model.require_chain()
    if header := headers.of_model(model, chain):
        return vocabulary.of_gguf(header)
    named = [file for file in chain.resolved.files if file.name == "tokenizer.json"]
    try:
        files = headers.readables(model, chain.resolved, named)
    except PipelineError:
        return None  # not here, and not to be had piece by piece
    return vocabulary.of_tokenizer(files[0].whole()) if files else None


def lacks_head(model: Model) -> bool:
    """Whether a head of the model is to draft that its file, as far as it is known, has not."""
    if model.request.spec_type != MTP or (chain := model.chain()) is None:
        return False
    file = headers.of_model(model, chain)
    return file is not None and not gguf.read(file).heads


def draft_estimate(model: Model) -> MemoryEstimate | None:
    """What the draft of a model takes; None without one."""
    return estimate.outlook(model.draft, model.draft.require_chain()) if model.draft else None


def planned_draft(model: Model) -> dict[str, Any] | None:
    """How tokens are drafted for the model: with another one, or by llama-server's own means."""
    if model.request.spec_type:
        return {"type": model.request.spec_type}
    ahead = draft_estimate(model)
    if model.draft is None or ahead is None:
        return None
    chain = model.draft.require_chain()
    named = {"model": chain.resolved.name, "why": chain.resolved.why, "file": str(chain.final)}
    return {"type": SIMPLE, **named, "file_bytes": ahead.bytes}


def draft_warnings(model: Model, header: gguf.Header | None) -> list[str]:
    """What could draft for a model and does not: layers that its file brings for it."""
    if header and header.heads and not (model.draft or model.request.spec_type):
        return [f"the model has a head that drafts ({header.heads} layers): draft=mtp uses it"]
    return []


# Adapters


def name_of(adapter: Model) -> str:
    """As it was typed, without its scale."""
    return adapter.require_reference().text


def adapter_difference(adapter: Path, model: Path, home: Home) -> str:
    """Why a GGUF is no adapter for `model`; empty where it is one. Raises PipelineError."""
    cache = home.run / "adapters.json"
    return difference(cache, adapter, model, lambda: file_misfit(adapter, gguf.shards(model)))


def misfit(adapter: Model, model: Model) -> str:
    """Why an adapter does not fit `model`, by what can be read of both now; else empty. Raises
    PipelineError where it is no adapter."""
    chain, of_model = adapter.require_chain(), model.chain()
    if of_model is None:  # quant=auto is not decided yet
        return ""
    base = chain.resolved.base
    if base is None or adapter.is_made(chain):
        file, header = headers.of_model(adapter, chain), headers.of_model(model, of_model)
        return adapter_difference(file, header, model.home) if file and header else ""
    resolved = of_model.resolved
    try:
        if resolved.kind == "safetensors":
            return peft_misfit(shapes(adapter), shapes(model))
        (config,) = [file for file in base.files if file.name == BASE_CONFIG]
        data = headers.readables(adapter, base, [config])[0].whole()
    except PipelineError:
        return ""  # not here, and not to be had piece by piece: the start compares what was made
    header = headers.of_model(model, of_model)
    document = checkpoint.document(data, BASE_CONFIG)
    return base_misfit(document, gguf.read(header)) if header else ""


def shapes(model: Model) -> Mapping[str, list[int]]:
    """The shapes of its tensors, of safetensors. Raises PipelineError."""
    resolved = model.require_resolved()
    weights = [file for file in resolved.files if file.name.endswith(".safetensors")]
    heads = [safetensors.head(file) for file in headers.readables(model, resolved, weights)]
    return dict(chained.from_iterable(head.shapes.items() for head in heads))


def adapter_bytes(adapter: Model) -> int:
    """The bytes of its GGUF, whether or not it is there yet: all of it is loaded."""
    chain = adapter.require_chain()
    if chain.final.is_file():
        return chain.final.stat().st_size
    return chain.conversion.need if chain.conversion else chain.resolved.bytes


def scale_of(adapter: Model) -> float:
    """The scale that was typed, else 1."""
    scale = adapter.request.scale
    return 1.0 if scale is None else scale


def served_adapters(model: Model) -> tuple[tuple[PurePath, float], ...]:
    """The files of a model's adapters with their scales, as its server gets them."""
    return tuple((each.require_chain().final, scale_of(each)) for each in model.adapters)


def planned_adapters(model: Model) -> list[dict[str, Any]]:
    """The adapters as plain values. Sizes in bytes."""
    return [
        {
            "name": chain.resolved.name,
            "why": chain.resolved.why,
            "file": str(chain.final),
            "file_bytes": adapter_bytes(each),
            "scale": scale_of(each),
        }
        for each in model.adapters
        for chain in [each.require_chain()]
    ]


def adapter_warnings(model: Model) -> list[str]:
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
