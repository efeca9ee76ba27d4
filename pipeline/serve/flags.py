"""The options of a llama-server, read from the `--help` of the very program that will run."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from msgspec import Struct, convert, to_builtins

from pipeline.core.errors import PipelineError
from pipeline.core.process import indented, outcome
from pipeline.core.store import json_file

# One option of the help: its names, and after a space the hint of its value, if it takes one.
OPTION = re.compile(r"((?:-{1,2}\w[\w.-]*,\s*)*-{1,2}\w[\w.-]*)(?: (\S.*?))?(?:\s{2,}|$)")

WORDS = re.compile(r"[A-Z]+( [A-Z]+)+")  # a hint of several values

# Such an option is listed, and refused when it is used.
REMOVED = "the argument has been removed"

# Without its backend, which a build may lack, this option ends the program with an error.
RPC, NO_RPC = "rpc", ("RPC not supported in this build", "failed to find RPC backend")

# Choices that stand in the description: `allowed values: f32, f16`, or a line for each.
ALLOWED = re.compile(r"allowed values:\s*([\w,\s.-]+)")
BULLET = re.compile(r"^- ([\w+-]+)(?: \(default\))?:", re.M)
# A wrong value, in the words of the program, before the help of its option.
REFUSED = re.compile(r'error while handling argument "[^"]*": (.*?)(?:\n\nusage:|\Z)', re.S)
LAST_LINES = 5  # of what a program printed that did not run
DEFAULT = re.compile(r"\(default:\s*([\w+-]+)\)")


class Flag(Struct, frozen=True):
    """One option: its longest name, the hint of its value, empty where it takes none."""

    name: str
    value: str
    names: tuple[str, ...] = ()  # all of them, with their dashes
    help: str = ""  # what it is for

    @property
    def plain_names(self) -> set[str]:
        """All of them, without their dashes."""
        return {name.lstrip("-") for name in self.names}

    @property
    def takes(self) -> int:
        """How many words of the command line it takes: two for the hint `START END`."""
        return len(self.value.split()) if WORDS.fullmatch(self.value) else 1

    @property
    def choices(self) -> list[str]:
        """The values it takes, where the help lists them: `[on|off|auto]`, `{none,mean}`."""
        listed = re.fullmatch(r"[\[{<]([\w.-]+(?:[|,][\w.-]+)+)[\]}>]", self.value)
        if listed:
            words = re.split(r"[|,]", listed[1])
            return [] if ".." in words else words  # `<dev1,dev2,..>` is an example
        if allowed := ALLOWED.search(self.help):
            return re.findall(r"[\w.-]+", allowed[1])
        if self.value in ("MODE", "TYPE", "FORMAT"):
            words = BULLET.findall(self.help)
            return list(dict.fromkeys([*words, *DEFAULT.findall(self.help)])) if words else []
        return []


def parse_help(text: str) -> dict[str, Flag]:
    """Every long name without its dashes (`ctx-size`) and the option it stands for."""
    entries: list[tuple[re.Match[str], list[str]]] = []
    for line in text.splitlines():
        if match := OPTION.match(line):
            entries.append((match, [line[match.end() :]]))
        elif entries and line.startswith(" "):  # its description goes on
            entries[-1][1].append(line.strip())
    flags: dict[str, Flag] = {}
    for match, lines in entries:
        names, description = tuple(re.split(r",\s*", match[1])), "\n".join(lines).strip()
        for name in names if REMOVED not in description else ():
            if name.startswith("--"):
                flags[name[2:]] = Flag(name, match[2] or "", names, description)
    return flags


def read(program: Path, sha256: str, cache: Path) -> dict[str, Flag]:
    """The options of `program`, cached by its sha256. Raises PipelineError."""
    why = ""

    def ask() -> dict[str, Flag]:
        nonlocal why
        status, out, err = outcome([program, "--help"])
        if status:
            why = f" (it ended with status {status}):\n{indented(out + err, LAST_LINES)}"
        flags = {} if status else parse_help(out + err)
        if RPC in flags and not has_rpc(program):
            del flags[RPC]
        return flags

    if flags := cached(cache / f"{sha256}.json", ask, "model"):
        return flags
    raise PipelineError(f"{program}: its --help lists no options of llama.cpp{why}")


def has_rpc(program: Path) -> bool:
    """Whether its option --rpc works: it is listed in any case."""
    _, out, err = outcome([program, f"--{RPC}", "127.0.0.1:1", "--version"])
    return not any(text in out + err for text in NO_RPC)


def refusal(program: Path, words: Sequence[str], env: Mapping[str, str]) -> str:
    """Why `program` does not take these words on this machine; empty where it does. It reads them
    all before it prints its version and ends."""
    _, out, err = outcome([program, *words, "--version"], env=env)
    if not (match := REFUSED.search(err)):
        return ""
    text = re.sub(r":\s*\n\s*", ": ", f"{match[1]}\n{out}")
    return "; ".join(line.strip() for line in text.splitlines() if line.strip())


def cached(known: Path, ask: Callable[[], dict[str, Flag]], option: str) -> dict[str, Flag]:
    """The options in the cache file `known`; where there are none, those that `ask` returns, which
    are kept there. Empty where `option` is not among them: another program's help."""
    if flags := json_file.read(known, lambda data: convert(data, dict[str, Flag])):
        return flags
    flags = ask()
    if option not in flags:
        return {}
    with contextlib.suppress(OSError):  # asked again next time
        known.parent.mkdir(parents=True, exist_ok=True)
        json_file.write(known, to_builtins(flags))
    return flags
