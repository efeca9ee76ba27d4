"""Draft models: a second model, prepared by the same steps, that drafts for the first."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pipeline.core.errors import PipelineError, UsageError
from pipeline.core.paths import Home
from pipeline.core.store import stat_cache
from pipeline.models import gguf, skeleton, vocabulary
from pipeline.models.gguf import Header
from pipeline.serve.server import Server

from . import estimate
from .estimate import MemoryEstimate
from .model import Model

SIMPLE = "draft-simple"  # a --spec-type: the one with a whole model of its own
HINT = "use a smaller model of the same family, or draft=ngram, which needs none"


def check(models: Iterable[Model]) -> None:
    """Raise UsageError where a draft has another vocabulary than its model, as far as that is known
    before the two are here."""
    for model in models:
        if model.draft:
            theirs, own = vocabulary_of(model), vocabulary_of(model.draft)
            why = theirs and own and vocabulary.difference(theirs, own)
            if why:
                name = model.draft.require_reference().text
                raise UsageError(f"draft={name}: cannot draft for this model: {why}", HINT)


def are_here(models: Iterable[Model]) -> bool:
    """Whether every draft is made, and its model: then `require_served` checks them."""
    pairs = [(model, model.draft) for model in models if model.draft]
    both = (each for pair in pairs for each in pair)
    return all(estimate.is_made(each, each.require_chain()) for each in both)


def vocabulary_of(model: Model) -> vocabulary.Vocabulary | None:
    """From the GGUF's header; without the converter, from the model's tokenizer.json."""
    chain = model.require_chain()
    if header := estimate.header_file(model, chain):
        return vocabulary.of_gguf(header)
    named = [file for file in chain.resolved.files if file.name == "tokenizer.json"]
    try:
        files = estimate.readables(model, chain.resolved, named)
    except PipelineError:
        return None  # not here, and not to be had piece by piece
    return vocabulary.of_tokenizer(skeleton.whole(files[0])) if files else None


def outlook(model: Model) -> MemoryEstimate | None:
    """What the draft of a model takes; None without one."""
    return estimate.outlook(model.draft, model.draft.require_chain()) if model.draft else None


def warnings(model: Model, header: Header | None) -> list[str]:
    """What could draft for a model and does not: layers that its file brings for it."""
    if header and header.heads and not (model.draft or model.request.spec_type):
        return [f"the model has a head that drafts ({header.heads} layers): draft=mtp uses it"]
    return []


def require_served(server: Server, model: Path, home: Home) -> None:
    """Raise UsageError where a server's draft has another vocabulary than its `model`: llama-server
    would go on without it."""
    names = ("--spec-draft-model", "--model-draft")
    named = next(filter(None, map(server.argument, names)), "")
    draft = Path(server.folder, named)
    if not named or SIMPLE not in server.argument("--spec-type") or not draft.is_file():
        return
    cache, key = home.run / "drafts.json", [str(model), *stat_cache.stamp(model)]
    if stat_cache.recall(cache, draft) == key:
        return
    stamp = stat_cache.stamp(draft)
    if why := vocabulary.difference(vocabulary.of_gguf(model), vocabulary.of_gguf(draft)):
        raise UsageError(f"{server.name}: {draft.name}: cannot draft for this model: {why}", HINT)
    stat_cache.remember(cache, draft, key, stamp)


def shown(server: Server, output: str, model: Path, home: Home) -> str:
    """How a server drafts, for its summary; empty where it does not. `output` is what it
    has printed."""
    kind = server.argument("--spec-type")
    draft = server.argument("--spec-draft-model") or server.argument("--model-draft")
    if kind and "failed to initialize speculative" in output:
        return "not used: llama-server could not, as its log says"
    if kind in ("", "none"):
        head = model.is_file() and gguf.read_cached(model, home.run / "gguf.json").heads
        return "none; the model has a head for it: draft=mtp uses it" if head else ""
    return f"{Path(draft).name} ({kind})" if draft else f"{kind}, without a model"
