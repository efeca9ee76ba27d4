"""The options of one instance: their words on a command line, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pipeline.core.errors import did_you_mean
from pipeline.core.variables import NO, YES
from pipeline.serve.flags import Flag
from pipeline.serve.instance import LLAMA_CPP

from .configuration import Draft, Value
from .mistakes import shown
from .renamed import RENAMED

OPTIONAL = "[VALUE]"  # vLLM: the option may stand alone
SEVERAL = " ..."  # vLLM: it takes all words up to the next option


def words(server: Mapping[str, Value]) -> list[str]:
    """Text or number: `--key value`; true: `--key`; false: nothing; a list: once for each."""
    found: list[str] = []
    for name, value in server.items():
        if value is True:
            found.append(f"--{name}")
        elif value is not False:
            for one in value if isinstance(value, list) else [value]:
                found += [f"--{name}", str(one)]
    return found


def typed(given: Mapping[str, str], flags: Mapping[str, Flag]) -> dict[str, Value]:
    """Options of the command line as a file would hold them: `jinja=1` is true, `port=1` is 1."""
    found: dict[str, Value] = {}
    for key, text in given.items():
        flag = flags.get(key.replace("_", "-"))
        is_switch = flag is not None and not flag.value and text.lower() in YES | NO
        found[key] = text.lower() in YES if is_switch else text
    return found


@dataclass(frozen=True, slots=True)
class Given:
    """What an instance says of the options, in its table or in extra_args, under any alias."""

    draft: Draft
    flags: Mapping[str, Flag]

    def value(self, name: str) -> Value | None:
        """The value that counts: the last one; None where it is not given."""
        flag = self.flags.get(name)
        aliases = {f"--{name}", *(flag.names if flag else ())}
        found: Value | None = None
        for key, value in self.draft.server.items():
            if f"--{key}" in aliases:
                found = value
        extra = self.draft.extra_args
        for at, word in enumerate(extra):
            head, equals, tail = word.partition("=")
            if spelled(head) in aliases:
                takes = flag is None or bool(flag.value)
                following = extra[at + 1] if takes and at + 1 < len(extra) else True
                found = tail if equals else following
        return found

    def text(self, *names: str) -> str:
        """The value of the first of `names` that has one, as a text; empty where none has."""
        for name in names:
            value = self.value(name)
            if isinstance(value, list):
                value = value[-1] if value else None
            if value is not None and not isinstance(value, bool):
                return str(value)
        return ""

    def is_on(self, *names: str) -> bool:
        """Whether one of these switches is given and not false."""
        return any(self.value(name) not in (None, False) for name in names)

    def says(self, *names: str) -> bool:
        """Whether one of these is given at all, false included."""
        return any(self.value(name) is not None for name in names)


def spelled(word: str) -> str:
    """A word of the command line as both servers read it: `_` in long names is `-`."""
    return word.replace("_", "-") if word.startswith("--") else word


def mistakes(draft: Draft, flags: Mapping[str, Flag], program: str) -> Iterator[str]:
    """What `program` would refuse among the options of the table; extra_args are taken as they are.

    No flags: they are not known.
    """
    for name, value in draft.server.items() if flags else ():
        why = _wrong(name, value, flags, draft.engine, program)
        if why:
            yield f"{draft.at(f'server.{name}')}{why}"


def remarks(draft: Draft, flags: Mapping[str, Flag]) -> Iterator[str]:
    """What is allowed and may not mean what it seems to."""
    for name, value in draft.server.items():
        place = draft.at(f"server.{name}")
        if value is False and f"no-{name}" in flags:
            off = f"no-{name}".replace("-", "_")
            yield f"{place} = false: leaves the option out; {off} = true turns it off"
        if not isinstance(value, list) or len(value) < 2:
            continue
        if draft.engine == LLAMA_CPP:
            yield f"{place}: llama-server takes the last one alone; for all, one text with commas"
        elif name in flags and flags[name].value.endswith(SEVERAL):
            yield f"{place}: vLLM takes the last one alone; for all, extra_args after one --{name}"


def _wrong(name: str, value: Value, flags: Mapping[str, Flag], engine: str, program: str) -> str:
    if unknown := _unknown(name, flags, engine, program):
        return f": {unknown}"
    flag = flags[name.partition(".")[0]]
    if value is False or "." in name:
        return ""
    if value is True:
        if not flag.value or flag.value == OPTIONAL:
            return ""
        if flag.choices:
            return f" = true: must be one of {', '.join(flag.choices)}, in quotes"
        return f" = true: --{name} takes a value: {flag.value}"
    if not flag.value:
        return f" = {shown(value)}: --{name} takes no value; write true, or leave it out"
    for one in value if isinstance(value, list) else [value]:
        if flag.choices and str(one) not in flag.choices:
            near = did_you_mean(str(one), flag.choices)
            return f" = {shown(one)}: must be one of {', '.join(flag.choices)}{near}"
    return ""


def _unknown(name: str, flags: Mapping[str, Flag], engine: str, program: str) -> str:
    """Why `program` has no such option, or nothing. What follows a dot is a key of vLLM's JSON."""
    name = name.partition(".")[0]
    if name in flags:
        return ""
    new = RENAMED.get(name, "") if engine == LLAMA_CPP else ""
    if new.replace("_", "-") in flags:
        return f"{program} has no --{name} any more; use {new}"
    return f"{program} has no --{name}{did_you_mean(name, list(flags)).replace('-', '_')}"
