"""`name=value` on the command line: which names there are, and what their values may be.

Variables are attributes of a `Group`, made by `variable`: each has the parser, the help and the
default, and what is read, printed by `help`, written to docs/variables.md and completed by shells
comes from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self, TypeVar, dataclass_transform

from msgspec import Struct
from msgspec.structs import force_setattr

from .errors import UsageError, did_you_mean
from .text import is_digits

YES = {"1", "true", "yes", "on"}
NO = {"0", "false", "no", "off", ""}
NOTHING = {"str": "", "bool": False, "tuple": ()}  # by the type of an attribute, as it is written


class Variable(Struct, frozen=True):
    """A variable. `parse` returns the value or raises ValueError with what is allowed; `help` and
    `default` are Markdown; `of` are the steps that read it, if others read its group as well;
    `unset` is its value where it is not given."""

    name: str
    parse: Callable[[str], object]
    help: str = ""
    default: str = ""
    of: tuple[str, ...] = ()
    unset: object = None

    def __set_name__(self, owner: type, name: str) -> None:
        """Take the name of the attribute, and what its type has for nothing."""
        kind = owner.__annotations__[name]
        if not self.name:
            force_setattr(self, "name", name)
        if self.unset is None and not kind.endswith("None"):
            force_setattr(self, "unset", NOTHING[kind.partition("[")[0]])
        if self.unset is False and not self.default:
            force_setattr(self, "default", "0")

    def __get__(self, group: Group | None, owner: type) -> object:
        """The default of an attribute of a group, where the group has no value of its own."""
        return self if group is None else self.unset


def variable(
    parse: Callable[[str], object],
    help: str,
    default: object = None,
    *,
    shown: str | None = None,
    of: tuple[str, ...] = (),
    name: str = "",
) -> Any:
    """An attribute of a group. Its default is by its type, unless `default` is given: None, False,
    or empty. `shown` is the default in words, `name` what users write where that is not the
    attribute's name."""
    if shown is None and isinstance(default, str):
        shown = f"`{default}`"
    elif shown is None:
        shown = "" if default is None else str(int(default) if default is True else default)
    return Variable(name, parse, help, shown, of, default)


@dataclass_transform(kw_only_default=True, frozen_default=True)
class Group:
    """Variables that belong together, and what follows from them: annotated attributes with their
    defaults. It is used as a frozen dataclass, which would compile its methods at every start."""

    def __init__(self, **values: object) -> None:
        if unknown := [name for name in values if not hasattr(type(self), name)]:
            raise TypeError(f"{type(self).__name__} has no {', '.join(unknown)}")
        vars(self).update(values)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__}.{name} cannot be changed")

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return False
        names = vars(self).keys() | vars(other).keys()
        return all(getattr(self, name) == getattr(other, name) for name in names)

    def replace(self, **values: object) -> Self:
        """A copy of the group with other values."""
        return type(self)(**{**vars(self), **values})


def variables(group: type[Group]) -> dict[str, Variable]:
    """The variables of a group, by the names of their attributes."""
    members = {name: each for base in reversed(group.__mro__) for name, each in vars(base).items()}
    return {name: each for name, each in members.items() if isinstance(each, Variable)}


AnyGroup = TypeVar("AnyGroup", bound=Group)


def fill(group: type[AnyGroup], values: Mapping[str, object], **more: object) -> AnyGroup:
    """A group with those of `values` that are its own; `more` are attributes beside them."""
    own = {n: values[v.name] for n, v in variables(group).items() if v.name in values}
    return group(**{**own, **more})


def text(value: str) -> str:
    """Any text that is not blank."""
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
        word = value.strip()
        number = int(word) if is_digits(word) and len(word) < 20 else low - 1
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
    """Any text that is not blank; shells complete it with files."""
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
