"""`name=value` on the command line: which names there are, and what their values may be.

Variables are the fields of dataclasses, made by `variable`: a field has the parser, the help and
the default, and what is read, printed by `help`, written to docs/variables.md and completed by
shells comes from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import field, fields
from typing import Any, TypeVar

from msgspec import Struct
from msgspec.structs import replace

from .errors import UsageError, did_you_mean

YES = {"1", "true", "yes", "on"}
NO = {"0", "false", "no", "off", ""}


class Variable(Struct, frozen=True):
    """A variable. `parse` returns the value or raises ValueError with what is allowed; `help` and
    `default` are Markdown; `of` are the steps that read it, if others read its group as well."""

    name: str
    parse: Callable[[str], object]
    help: str = ""
    default: str = ""
    of: tuple[str, ...] = ()


def variable(
    parse: Callable[[str], object],
    help: str,
    default: object = None,
    *,
    shown: str | None = None,
    of: tuple[str, ...] = (),
    name: str = "",
) -> Any:
    """A field of a dataclass of variables. `shown` is its default in words, `name` what users
    write where that is not the field's name."""
    if shown is None:
        plain = int(default) if isinstance(default, bool) else default
        shown = "" if plain is None else str(plain)
    entry = Variable(name, parse, help, shown, of)
    return field(default=default, metadata={Variable: entry})


def variables(group: type) -> dict[str, Variable]:
    """The variables of a dataclass, by the names of their fields."""
    entries = {field.name: field.metadata.get(Variable) for field in fields(group)}
    return {
        name: entry if entry.name else replace(entry, name=name)
        for name, entry in entries.items()
        if entry is not None
    }


Group = TypeVar("Group")


def fill(group: type[Group], values: Mapping[str, object], **more: object) -> Group:
    """A dataclass of variables with those of `values` that are its own; `more` are other fields."""
    own = {n: values[v.name] for n, v in variables(group).items() if v.name in values}
    return group(**{**own, **more})


def text(value: str) -> str:
    """Anything but nothing."""
    if not value.strip():
        raise ValueError("a value; leave the variable out to get the default")
    return value.strip()


def flag(value: str) -> bool:
    """1 or 0, true or false, yes or no, on or off."""
    if value.strip().lower() in YES:
        return True
    if value.strip().lower() in NO:
        return False
    raise ValueError("1 or 0 (also true, false, yes, no, on, off)")


def integer(low: int, high: int) -> Callable[[str], int]:
    """A whole number from `low` to `high`, both included."""

    def parse(value: str) -> int:
        digits = value.strip().isdecimal() and len(value) < 20
        number = int(value) if digits else low - 1
        if not low <= number <= high:
            raise ValueError(f"a whole number from {low} to {high}")
        return number

    return parse


class OneOf(Struct, frozen=True):
    """One of `words`, in any letter case."""

    words: tuple[str, ...]

    def __call__(self, value: str) -> str:
        word = value.strip().lower()
        if word not in self.words:
            raise ValueError(f"one of {', '.join(self.words)}{did_you_mean(word, self.words)}")
        return word


def choice(*words: str) -> OneOf:
    return OneOf(words)


def path(value: str) -> str:
    """As `text`: shells complete it with files."""
    return text(value)


def read(
    requested: Mapping[str, str],
    table: Iterable[Variable],
    synonym: Callable[[str], str] = lambda name: "",
) -> dict[str, object]:
    """The requested variables, parsed. `synonym` maps what other programs call a variable to its
    name here. Raises UsageError with all errors.
    """
    known = {entry.name: entry for entry in table}
    values: dict[str, object] = {}
    errors = []
    for name, value in requested.items():
        if name not in known:
            near = f"; here it is {same}" if (same := synonym(name)) else ""
            near = near or did_you_mean(name, list(known))
            errors.append(f"{name}: there is no such variable{near}")
            continue
        try:
            values[name] = known[name].parse(value)
        except ValueError as allowed:
            errors.append(f"{name}={value}: must be {allowed}")
    if errors:
        raise UsageError("\n".join(errors), "docs/variables.md lists every variable")
    return values
