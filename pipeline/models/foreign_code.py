"""Code that a model brings along. It never runs.

A repository's JSON may name Python classes (`auto_map`), which transformers imports from the
model's folder, from any folder, or from what the user's Hugging Face cache holds of any repository.
The converter gets such files without these keys. There is no switch that lets the code run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any

from pipeline.core.errors import PipelineError

from .contents import Readable

# Keys that make transformers, or its caller, import code that is not its own.
KEYS = ("auto_map", "custom_pipelines", "custom_generate", "trust_remote_code")
VOCABULARIES = ("tokenizer.json", "vocab.json", "added_tokens.json", "model.safetensors.index.json")
# One of these, or an escaped ASCII letter, which may hide one. Nothing else is parsed.
SUSPECT = re.compile(rb"%b|\\u00[4-7]" % b"|".join(key.encode() for key in KEYS), re.IGNORECASE)


def utf8(name: str, data: bytes) -> bytes:
    """A text as the converter reads it, in UTF-8 without a byte order mark; other editors write
    UTF-16. Raises PipelineError where it is no text."""
    encoding = json.detect_encoding(data)
    try:
        text = data.decode(encoding).removeprefix("\ufeff")
    except ValueError as error:
        raise PipelineError(
            f"{name}: cannot be read as {encoding}: {error}", "get it again, or save it as UTF-8"
        ) from None
    return data if encoding == "utf-8" else text.encode()


def without(name: str, data: bytes) -> bytes:
    """The JSON file `name` without the keys that name code; the same bytes where there are none.
    Raises PipelineError where it is nested too deep to be searched."""
    with _depth_is_an_error(name):
        code: list[Any] = []
        rest = _split(_parsed(data) if may_name(name) else None, code)
        return json.dumps(rest, indent=1).encode() if code else data


def classes(files: Iterable[Readable]) -> list[str]:
    """The classes that a model's files name: `FILE names CLASS for USE`. Raises PipelineError."""
    texts = []
    for file in files:
        name, code = file.name, list[Any]()
        if may_name(name):
            with _depth_is_an_error(name):
                _split(_parsed(utf8(name, file.whole())), code)
        for auto_map in code:
            if isinstance(auto_map, list):  # before 2022 it was a list, for the tokenizer
                auto_map = {"AutoTokenizer": auto_map}
            for use, value in auto_map.items() if isinstance(auto_map, dict) else ():
                # A tokenizer has two: the slow one and the fast one; either may be null.
                values = value if isinstance(value, list) else [value]
                texts += [f"{name} names {v} for {use}" for v in values if isinstance(v, str)]
    return texts


def may_name(file: str) -> bool:
    """Whether transformers takes classes from a file: not from a vocabulary, whose words may look
    like such keys."""
    return file.endswith(".json") and PurePosixPath(file).name not in VOCABULARIES


def explained(model: str, code: Sequence[str], message: str, hint: str = "") -> tuple[str, str]:
    """The message and hint for a failed conversion, with the code that was left out."""
    if not code:
        return message, hint
    listed = "; ".join(code[:3])
    return (
        f"{message}\n{model} brings code of its own, which never runs here: {listed}",
        "convert it where you trust its code, and serve the .gguf",
    )


@contextmanager
def _depth_is_an_error(name: str) -> Iterator[None]:
    try:
        yield
    except RecursionError:
        raise PipelineError(f"{name}: is nested too deep") from None


def _parsed(data: bytes) -> Any:
    """None where nothing in it can name code, or it is not JSON."""
    if not SUSPECT.search(data):
        return None
    try:
        return json.loads(data.decode())
    except ValueError:
        return None


def _split(value: Any, code: list[Any]) -> Any:
    """`value` without the KEYS in it, at any depth; what they hold is added to `code`."""
    if isinstance(value, dict):
        code += [inner for key, inner in value.items() if key in KEYS]
        return {key: _split(inner, code) for key, inner in value.items() if key not in KEYS}
    return [_split(inner, code) for inner in value] if isinstance(value, list) else value
