"""Whether a draft model has the vocabulary of its model, by llama.cpp's rule
(common_speculative_are_compatible in its common/speculative.cpp): llama-server itself only logs a
difference, and goes on without the draft."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct, field

from . import gguf

FIRST = 5  # the tokens before it may differ
MOST_ADDED = 128  # tokens that only one of the two may have


class Vocabulary(Struct, frozen=True, kw_only=True):
    """The texts of a model's tokens by their number, and what its GGUF says of them. `size` is 0,
    and some texts are missing, where only a tokenizer.json was read."""

    texts: Mapping[int, bytes]
    size: int = 0
    values: Mapping[str, Any] = field(default_factory=dict)


def of_gguf(path: Path) -> Vocabulary:
    """The vocabulary in a GGUF, or in its skeleton. Raises PipelineError."""
    header = gguf.read(path)
    return Vocabulary(
        texts=dict(enumerate(gguf.tokens(path, header))),
        size=header.vocabulary,
        values=header.values,
    )


def of_tokenizer(data: bytes) -> Vocabulary | None:
    """The vocabulary in a tokenizer.json; None where it is of a form that is not known here. Added
    tokens are left out: the converter may write them differently."""
    try:
        words = json.loads(data)["model"]["vocab"]
        if isinstance(words, list):  # Unigram
            words = {word: number for number, (word, _) in enumerate(words)}
        return Vocabulary(texts={int(number): str(word).encode() for word, number in words.items()})
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def difference(model: Vocabulary, draft: Vocabulary) -> str:
    """Why `draft` cannot draft for `model`; empty where it can, as far as is known."""
    for key in ("model", *_ends(model, draft, "bos"), *_ends(model, draft, "eos")):
        theirs, own = (each.values.get(f"tokenizer.ggml.{key}") for each in (model, draft))
        if None not in (theirs, own) and theirs != own:
            return f"its tokenizer has {key} {own}, the model's {theirs}"
    if model.size and draft.size and abs(model.size - draft.size) > MOST_ADDED:
        return f"it has {draft.size} tokens, the model {model.size}"
    for number in sorted(model.texts.keys() & draft.texts.keys()):
        if number >= FIRST and model.texts[number] != draft.texts[number]:
            texts = (each.texts[number].decode("utf-8", "replace") for each in (draft, model))
            return "its token {} is {!r}, the model's {!r}".format(number, *texts)
    return ""


def _ends(model: Vocabulary, draft: Vocabulary, name: str) -> list[str]:
    """The keys about a text's begin or end that must agree: whether a token is added, and which."""
    added = f"add_{name}_token"
    both = [each.values.get(f"tokenizer.ggml.{added}") for each in (model, draft)]
    return [added, f"{name}_token_id"] if all(both) else [added]
