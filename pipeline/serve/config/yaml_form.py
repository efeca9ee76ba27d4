"""The tables of a YAML file, and the line of each."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from msgspec import Struct

from pipeline.core.errors import UsageError

from .messages import Keys, require_none
from .sources import NO_TEXT, TOO_DEEP, UNUSABLE, Decimal, text_of

# Numbers of YAML 1.1 that look like others: 010 is 8, and 1:30 is 90.
MISREAD = re.compile(r"[+-]?(0[0-9_]|[\d_]+:)")
LONGEST_NUMBER = 40  # letters; Python cannot show a number of thousands of them
# Of tables that a table merges, and of keys that it then has: merges of merges double each time.
MOST_MERGED, MOST_KEYS = 100, 10_000
NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


class Read(Struct, frozen=True):
    """The content of a YAML file."""

    content: Any
    root: yaml.Node | None

    def line(self, path: Keys) -> int | None:
        """The line of the value at `path`, or of the table that lacks it."""
        node, line = self.root, None
        for key in path:
            if not isinstance(node, yaml.MappingNode):
                break
            pair = next((pair for pair in node.value if pair[0].value == key), None)
            if pair is None:
                break
            node, line = pair[1], pair[0].start_mark.line + 1
        return line


class Loader(yaml.SafeLoader):
    """PyYAML's, with fewer silent changes: a decimal keeps its text, and `on` or `no` is a word."""

    def construct_decimal(self, node: yaml.ScalarNode) -> float:
        number: float = self.construct_yaml_float(node)
        return Decimal(node.value) if math.isfinite(number) else number

    def construct_switch(self, node: yaml.ScalarNode) -> bool | str:
        word = str(node.value)
        return word.lower() == "true" if word.lower() in ("true", "false") else word

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > MOST_KEYS:
            problem = f"a table merges more than {MOST_KEYS:,} keys"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


Loader.add_constructor("tag:yaml.org,2002:float", Loader.construct_decimal)
Loader.add_constructor("tag:yaml.org,2002:bool", Loader.construct_switch)


def read(file: Path) -> Read:
    """Read `file`. Raises UsageError that names the line."""
    text = text_of(file)
    try:
        loader = Loader(text)
        root = loader.get_single_node()
        wrong = [] if root is None else list(_errors(root, set()))
        require_none(f"{file.name}: line {line}: {why}" for line, why in wrong)
        return Read(loader.construct_document(root) if root else None, root)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise UsageError(f"{file}: {where}is not YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UsageError(f"{file}: is not YAML: {str(error).splitlines()[0]}") from None
    except (LookupError, TypeError, AttributeError):  # PyYAML's, for `!!timestamp tomorrow`
        raise UsageError(
            f"{file}: is not YAML: a value is not what its tag says", "leave tags such as !!int out"
        ) from None
    except RecursionError:
        raise UsageError(f"{file}: {TOO_DEEP}") from None


def _errors(node: yaml.Node, seen: set[int]) -> Iterator[tuple[int, str]]:
    """The line and the error of each key that is given twice, of each number that YAML 1.1 reads as
    another one, and of texts and merges that nothing needs. An anchor is looked at once."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _errors(item, seen)
    elif isinstance(node, yaml.MappingNode):
        names: set[str] = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                if why := _wrong_key(key.value, value, names):
                    yield key.start_mark.line + 1, why
                names.add(key.value)
            yield from _errors(value, seen)
    elif isinstance(node, yaml.ScalarNode) and (why := _wrong_scalar(node)):
        yield node.start_mark.line + 1, why


def _wrong_key(name: str, value: yaml.Node, before: set[str]) -> str:
    """Why a key cannot stand in a table that has the keys `before`; empty where it can."""
    if name == "<<":
        is_too_long = isinstance(value, yaml.SequenceNode) and len(value.value) > MOST_MERGED
        return f"merges more than {MOST_MERGED} tables" if is_too_long else ""
    if UNUSABLE.search(name):
        return NO_TEXT
    return f"{name} is given twice" if name in before else ""


def _wrong_scalar(node: yaml.ScalarNode) -> str:
    """Why a value cannot be used; empty where it can."""
    text, is_number = node.value, node.tag in NUMBERS
    if UNUSABLE.search(text):
        return NO_TEXT
    if is_number and len(text) > LONGEST_NUMBER:
        return f"{text[:LONGEST_NUMBER]}…: is too long for a number"
    if is_number and MISREAD.match(text):
        number = yaml.safe_load(text)
        return f'{text} would be read as {number}; write "{text}" in quotes, or a number'
    return ""
