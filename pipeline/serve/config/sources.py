"""The text of a configuration file, and the tables in it."""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.core.errors import UsageError
from pipeline.core.text import decoded, repeated, require_short_keys

from .messages import Keys, dotted

DEEPEST = 32  # tables in tables; five are ever needed
LARGEST_BYTES = 4 * 1024 * 1024
TOO_DEEP = "its tables are nested too deeply"
TOO_LARGE = "holds a number of more than 64 bits"
# No word of a command line, path or variable can hold these.
UNUSABLE = re.compile("[\0\ud800-\udfff]")
NO_TEXT = "holds a zero byte or half of a letter, which no program can be given; leave it out"


class Decimal(float):
    """A decimal that keeps its text: a name such as 1.10 is not 1.1."""

    def __init__(self, text: str) -> None:
        self.text = text.replace("_", "")

    def __str__(self) -> str:
        return self.text


def text_of(file: Path) -> str:
    """The text of `file`. Raises UsageError."""
    try:
        if file.is_dir():
            raise UsageError(f"{file}: is a folder, not a file", "name the file in it")
        with file.open("rb") as opened:
            data = opened.read(LARGEST_BYTES + 1)
    except FileNotFoundError:
        others = ", ".join(files(file.parent, file.suffix)[:10])
        raise UsageError(
            f"{file}: there is no such file", others and f"there is {others}"
        ) from None
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise UsageError(f"{file}: cannot be read: {why}") from None
    if len(data) > LARGEST_BYTES:
        raise UsageError(f"{file}: is larger than {LARGEST_BYTES // 1024 // 1024} MB")
    try:
        text = decoded(data)
    except ValueError as error:
        raise UsageError(f"{file}: {error}") from None
    if not text.strip():
        raise UsageError(f"{file}: is empty", "configs/ has examples")
    return text


def toml(file: Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises UsageError that names line and column."""
    text = text_of(file).replace("\r\n", "\n")
    try:
        require_short_keys(text)
    except ValueError:
        raise UsageError(f"{file}: {TOO_DEEP}") from None
    try:
        return bounded(tomllib.loads(text, parse_float=Decimal), str(file))
    except tomllib.TOMLDecodeError as error:
        why, _, at = str(error).removesuffix(")").rpartition(" (at ")
        raise UsageError(f"{file}: {at}: is not TOML: {why}", _hint(text, at, why)) from None
    except ValueError:  # Python limits how many digits it reads
        raise UsageError(f"{file}: {TOO_LARGE}") from None
    except RecursionError:
        raise UsageError(f"{file}: {TOO_DEEP}") from None


def _hint(text: str, at: str, why: str) -> str:
    """What is often meant by a line that is not TOML; `at` says which one it is, `why` what is
    wrong with it."""
    if why.startswith(("Cannot overwrite", "Cannot declare", "Duplicate")):
        return "a key or a table of this name is given before; write one of them"
    number = re.match(r"line (\d+)", at)
    line = text.split("\n")[int(number[1]) - 1] if number else ""
    if re.search(r'"[^"]*\\', line):
        return (
            "write a path with backslashes in single quotes: in double ones each begins an escape"
        )
    if re.search(r"=\s*(true|false|yes|no|on|off)\s*(#|$)", line, re.IGNORECASE):
        return "a switch is true or false, in lower case"
    if re.match(r"\s*[\w.-]+\s*:", line):
        return "a value follows =, not a colon; a YAML registry is read with profile=NAME"
    if re.search(r",\s*(#|$)", line):
        return "a line ends without a comma, unless a list goes on"
    if re.search(r"=\s*[\w~./$-][^\"']*$", line):
        return 'a text is written in quotes: key = "text"'
    if re.search("[\u2018\u2019\u201c\u201d\u00a0]", line):
        return "it has quotes or spaces of a text program; type them anew"
    return "configs/ has examples"


def overrides(text: str, where: str) -> dict[str, Any]:
    """The JSON object in `text`, empty where blank. Raises UsageError that names `where`."""
    text = text.removeprefix("\ufeff")  # the byte order mark of the file that it comes from
    if not text.strip():
        return {}
    try:
        content = json.loads(
            text, object_pairs_hook=_once, parse_float=_finite, parse_constant=_finite
        )
    except json.JSONDecodeError as error:
        at = f"line {error.lineno}, column {error.colno}"
        raise UsageError(f"{where}: {at}: is not JSON: {error.msg}") from None
    except ValueError as error:
        raise UsageError(f"{where}: is not a JSON object: {error}") from None
    except RecursionError:
        raise UsageError(f"{where}: {TOO_DEEP}") from None
    if not isinstance(content, dict):
        raise UsageError(
            f"{where}: must be a JSON object", 'such as {"instance": {"chat": {"server": …}}}'
        )
    return bounded(content, where)


def bounded(tables: dict[str, Any], where: str) -> dict[str, Any]:
    """The same tables. Raises UsageError where they are nested too deeply, or hold a number that is
    too long to show, or a text that no program can be given."""
    level: list[tuple[Keys, Any]] = [((), tables)]
    for _ in range(DEEPEST):
        items = [((*path, key), item) for path, each in level for key, item in _items(each)]
        for path, item in items:
            if any(isinstance(x, str) and UNUSABLE.search(x) for x in (path[-1], item)):
                raise UsageError(f"{where}: {dotted(path)}: {NO_TEXT}")
            if isinstance(item, int) and item.bit_length() > 64:
                raise UsageError(f"{where}: {TOO_LARGE}")
        level = [(path, item) for path, item in items if isinstance(item, (dict, list))]
        if not level:
            return tables
    raise UsageError(f"{where}: {TOO_DEEP}")


def _items(each: list[Any] | dict[str, Any]) -> Iterable[tuple[str | int, Any]]:
    return enumerate(each) if isinstance(each, list) else each.items()


def merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid over `under`, table by table and key by key; null takes a key away."""
    result = dict(under)
    for key, value in over.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, dict):
            below = result.get(key)
            result[key] = merged(below if isinstance(below, dict) else {}, value)
        else:
            result[key] = value
    return result


def unused_nulls(
    under: Mapping[str, Any], over: Mapping[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    """Each null of `over` whose key `under` lacks, and the keys that are there instead."""
    for key, value in over.items():
        below = under.get(key)
        if value is None and key not in under:
            yield (*path, key), list(under)
        elif isinstance(value, dict):
            nested = below if isinstance(below, dict) else {}
            yield from unused_nulls(nested, value, (*path, key))


def holds(tables: Any, path: tuple[str | int, ...]) -> bool:
    """Whether these tables have a value at `path`."""
    for part in path:
        if isinstance(part, int):
            return isinstance(tables, list)
        if not isinstance(tables, dict) or part not in tables:
            return False
        tables = tables[part]
    return True


def _finite(text: str) -> Decimal:
    """A decimal of JSON. Raises ValueError where it is none."""
    number = Decimal(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a number")
    return number


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError(f"{repeated(name for name, _ in pairs)[0]} is given twice")
    return table


def files(folder: Path, *suffixes: str) -> list[str]:
    """The names of the files with these suffixes."""
    try:
        return sorted(path.name for path in folder.iterdir() if path.suffix in suffixes)
    except OSError:
        return []
