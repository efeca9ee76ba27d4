"""The text of a YAML file as tables, and the line on which each of them stands."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.core.errors import UsageError

from .mistakes import Path as Keys
from .mistakes import require_none
from .sources import TOO_DEEP, text_of


@dataclass(frozen=True, slots=True)
class Read:
    """What a file holds."""

    told: Any
    root: yaml.Node | None

    def line(self, path: Keys) -> int | None:
        """The line of what stands at `path`, or of the table that it is missing from."""
        node, found = self.root, None
        for key in path:
            if not isinstance(node, yaml.MappingNode):
                break
            pair = next((pair for pair in node.value if pair[0].value == key), None)
            if pair is None:
                break
            node, found = pair[1], pair[0].start_mark.line + 1
        return found


def read(file: Path) -> Read:
    """Read `file`. Raises UsageError that names the line."""
    text = text_of(file)
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        twice = [] if root is None else list(_twice(root, set()))
        require_none(f"{file.name}: line {line}: {key} is given twice" for line, key in twice)
        return Read(loader.construct_document(root) if root else None, root)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise UsageError(f"{file}: {where}is no YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UsageError(f"{file}: is no YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise UsageError(f"{file}: {TOO_DEEP}") from None


def _twice(node: yaml.Node, seen: set[int]) -> Iterator[tuple[int, str]]:
    """Line and name of each key that its table has already. An anchor is looked at once."""
    if id(node) in seen or not isinstance(node, yaml.CollectionNode):
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _twice(item, seen)
        return
    names: set[str] = set()
    for key, value in node.value:
        if isinstance(key, yaml.ScalarNode):
            if key.value in names and key.value != "<<":
                yield key.start_mark.line + 1, key.value
            names.add(key.value)
        yield from _twice(value, seen)
