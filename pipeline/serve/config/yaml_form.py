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
from .sources import TOO_DEEP, Decimal, text_of

# Numbers of YAML 1.1 that look like others: 010 is 8, and 1:30 is 90.
MISREAD = re.compile(r"[+-]?(0[0-9_]|[\d_]+:)")
LONGEST_NUMBER = 40  # letters; Python cannot show a number of thousands of them
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
        raise UsageError(f"{file}: {where}is no YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UsageError(f"{file}: is no YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise UsageError(f"{file}: {TOO_DEEP}") from None


def _errors(node: yaml.Node, seen: set[int]) -> Iterator[tuple[int, str]]:
    """The line and the error of each key that is given twice, and of each number that YAML 1.1
    reads as another one. An anchor is looked at once."""
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
                if key.value in names and key.value != "<<":
                    yield key.start_mark.line + 1, f"{key.value} is given twice"
                names.add(key.value)
            yield from _errors(value, seen)
    elif node.tag in NUMBERS and len(node.value) > LONGEST_NUMBER:
        yield node.start_mark.line + 1, f"{node.value[:LONGEST_NUMBER]}…: is too long for a number"
    elif node.tag in NUMBERS and MISREAD.match(node.value):
        number = yaml.safe_load(node.value)
        why = f'{node.value} would be read as {number}; write "{node.value}" in quotes, or a number'
        yield node.start_mark.line + 1, why
