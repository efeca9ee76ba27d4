"""`name=value` on the command line: which names there are, and what their values may be."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from .errors import UsageError, did_you_mean

YES = {"1", "true", "yes", "on"}
NO = {"0", "false", "no", "off", ""}


@dataclass(frozen=True, slots=True)
class Variable:
    """One variable. `parse` returns the value or raises ValueError with what is allowed."""

    name: str
    parse: Callable[[str], object]


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


def choice(*words: str) -> Callable[[str], str]:
    """One of `words`, in any letter case."""

    def parse(value: str) -> str:
        word = value.strip().lower()
        if word not in words:
            raise ValueError(f"one of {', '.join(words)}{did_you_mean(word, words)}")
        return word

    return parse


def read(given: Mapping[str, str], table: Iterable[Variable]) -> dict[str, object]:
    """The given variables, parsed. All mistakes are reported at once.

    Raises UsageError.
    """
    known = {variable.name: variable for variable in table}
    values: dict[str, object] = {}
    wrong = []
    for name, value in given.items():
        if name not in known:
            wrong.append(f"{name}: there is no such variable{did_you_mean(name, list(known))}")
            continue
        try:
            values[name] = known[name].parse(value)
        except ValueError as allowed:
            wrong.append(f"{name}={value}: must be {allowed}")
    if wrong:
        raise UsageError("\n".join(wrong), "docs/variables.md lists every variable")
    return values
