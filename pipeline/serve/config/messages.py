"""Error messages about a file: where, which value, what is allowed, the nearest right word."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.core.errors import UsageError, did_you_mean
from pipeline.serve.server import LLAMA_CPP

from . import synonyms, tables

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic_core import ErrorDetails

Keys = tuple[str | int, ...]  # from the outermost table inwards
FileKind = TypeVar("FileKind", bound="BaseModel")
HINT = "docs/instances.md and docs/profiles.md list the keys"
LONGEST_VALUE = 60
SECRETS = ("api_key", "hf_token")  # keys whose values are not shown

ALLOWED = {
    "bool_type": "must be true or false",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "string_type": "must be a text, in quotes",
    "list_type": "must be a list",
    "dict_type": "must be a table",
    "model_type": "must be a table",
    "finite_number": "must be a finite number",
    "string_too_short": "must not be empty",
    "missing": "is missing",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than_equal": "must be at most {le:g}",
    "greater_than": "must be more than {gt:g}",
    "literal_error": "must be {expected}",
    "value_error": "{error}",  # of our own validators
}

# What is often meant by a value in place of the table at `instance` and at `instance.NAME`.
WHERE = {
    1: "; each instance is a table of its own, such as [instance.chat.server]",
    2: "; options of all instances go below [instance.server]",
}


def dotted(path: Keys) -> str:
    """The path as it is written in the file: a part with a dot is quoted."""
    parts = map(str, path)
    return ".".join(
        part if re.fullmatch(r"[\w-]+", part) else json.dumps(part, ensure_ascii=False)
        for part in parts
    )


def shown(value: object) -> str:
    """A value for a message, cut where it is long."""
    if isinstance(value, (dict, list)):
        return "{…}" if isinstance(value, dict) else "[…]"
    text = str(value)
    if isinstance(value, (str, bool)):
        text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}…"


def require_none(errors: Iterable[str], hint: str = HINT) -> None:
    """Raise UsageError that names every error, each once."""
    if lines := "\n".join(dict.fromkeys(errors)):
        raise UsageError(lines, hint)


def validated(
    kind: type[FileKind], table: dict[str, Any], add_error: Callable[[Keys, str], None]
) -> FileKind:
    """`table` as a `kind`; each error is added with its path, and left out of the result."""
    from pydantic import ValidationError

    left_out: set[Keys] = set()
    while True:  # each round leaves out what was wrong, so the next one finds less
        try:
            return kind.model_validate(table)
        except ValidationError as error:
            for details in error.errors(include_url=False):
                path = tuple(details["loc"])
                if path not in left_out:  # it is missing only now
                    add_error(path, _text(details, path))
                left_out.add(path)
                _leave_out(table, path[:-1] if details["type"] == "missing" else path)


def _text(details: ErrorDetails, path: Keys) -> str:
    """What is wrong with the value at `path`, as it follows the path in a message."""
    if details["type"] == "extra_forbidden":
        allowed = tables.keys(path[:-1])
        near = _by_meaning(path, allowed) or did_you_mean(str(path[-1]), allowed)
        return f": there is no such key{near or '; the keys are ' + ', '.join(allowed)}"
    known_text = ALLOWED.get(details["type"])
    text = known_text.format(**details.get("ctx", {})) if known_text else details["msg"]
    if details["type"] == "model_type" and path[0] == "instance":
        text += WHERE.get(len(path), "")
    silent = isinstance(details["input"], dict) or any(part in SECRETS for part in path[-1:])
    value = "" if silent else f" = {shown(details['input'])}"
    near = ""
    if details["type"] == "literal_error" and isinstance(details["input"], str):
        near = did_you_mean(details["input"], re.findall(r"'([^']+)'", text))
    return f"{value}: {text}{near}"


def _by_meaning(path: Keys, allowed: list[str]) -> str:
    """`; did you mean X?` for a key of other programs, or an option outside of its table."""
    name = str(path[-1]).replace("_", "-")
    key = synonyms.KEYS.get(name, "")
    if key not in allowed and path[0] == "instance" and len(path) == 3:
        key = f"server.{option}" if (option := synonyms.option(name, LLAMA_CPP)) else ""
        return f"; did you mean {key.replace('-', '_')}?" if key else ""
    return f"; did you mean {key}?" if key in allowed else ""


def _leave_out(content: Any, path: Keys) -> None:
    """Remove the value at `path`, or the list that it is an item of."""
    for depth, part in enumerate(path):
        if depth == len(path) - 1 or isinstance(path[depth + 1], int):
            content.pop(part, None)
            return
        content = content.get(part, {})
