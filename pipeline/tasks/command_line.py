"""The words of a command line, before doit sees them.

doit knows tasks, `name=value` and options of its own. People also write `--name value`,
`--name=value` and `--name`, with - for _, and a mistake should be answered by what there is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipeline.bins.compile import source
from pipeline.commands import request
from pipeline.commands import variables as all_variables
from pipeline.core.errors import UsageError, did_you_mean, doitw
from pipeline.core.paths import home, project_version
from pipeline.core.variables import NO, YES, Variable, flag, variables

from .step import AnyStep, Step
from .table import STEPS

COMMANDS = (
    *("list", "help", "run", "clean", "forget", "info", "ignore", "dumpdb", "strace"),
    *("completion", "tabcompletion", "reset-dep"),
)  # doit's, with options of their own
PRINTING = ("list", "help", "info", "completion", "tabcompletion")
OF_TASKS = ("list", "help", "run", "clean", "forget", "info", "ignore", "strace", "reset-dep")
SERVER = "server."
ANY_OPTION = Variable(f"{SERVER}NAME", str, "any other option of llama-server, `_` for `-`")

HELP = ("-h", "--help")
# What users of other tools type, and its name here.
TASKS_ELSEWHERE = {
    **{"pull": "prepare", "download": "fetch", "start": "up", "stop": "down", "status": "ps"},
    **{"build": "build_bins", "install": "install_package", "quantise": "quantize"},
}
DIAGNOSTICS = "print_diagnostics"  # an option elsewhere, a task here
DOCTOR = "doctor"
PUBLIC = tuple(step for step in STEPS if not step.name.startswith("_"))
WITH_WORDS = {step.name for step in STEPS if isinstance(step, Step) and step.run_with}


def understood(words: Sequence[str], *, is_plain: bool = False) -> list[str]:
    """The words as doit takes them. With `is_plain` options of doit's own may stand before a task.
    Raises UsageError."""
    end = words.index("--") if "--" in words else len(words)
    own = list(words[:end])
    if "" in own:
        raise UsageError("a word of the command line is empty", "leave it out")
    first = next((word for word in own if not word.startswith("-") and "=" not in word), "")
    command = first if first in COMMANDS else "run" if is_plain else ""
    if {*HELP}.intersection(own) and first in {step.name for step in PUBLIC}:
        return ["help", first]
    if WITH_WORDS.isdisjoint(own) and command in ("", "run"):
        _require_whole(own)
    return [*_words(own, command), *words[end:]]


def _words(own: list[str], command: str) -> list[str]:
    """The words before `--`. doit takes options of a command right behind it alone."""
    rest, dashed, named, others = deque(own), list[str](), list[str](), list[str]()
    if command in own:
        rest.remove(command)
    while rest:
        word = rest.popleft()
        if word.startswith("-") and len(word) > 1:
            takes = _option(word, options(command)) if command else None
            if takes is not None:
                dashed += [word, rest.popleft()] if takes and rest else [word]
                continue
            name, given, value = word.lstrip("-").partition("=")
            plain = name.replace("-", "_")
            if plain == DIAGNOSTICS:
                named.append(DOCTOR)
                others.insert(0, DOCTOR)
                continue
            parser = _parser(word, plain, command)
            if not given:
                value = _value(word, rest, is_flag=parser is flag)
            key = name if name.startswith(SERVER) else plain  # a server's option keeps its dashes
            others.append(f"{key}={value}")
        elif "=" in word:
            others.append(word)
        else:
            if not _is_free(word, command, named):
                _require_known(word, command)
            named.append(word)
            others.append(word)
    if command == "info" and len(named) != 1:
        raise UsageError("info: needs one task", doitw("info TASK"))
    _require_one_value(word for word in others if "=" in word)
    first = [command] if command in own else []
    return [*first, *dashed, *others]


def _require_whole(words: list[str]) -> None:
    """Raise UsageError where a space stands beside the = of a variable."""
    tasks = {step.name for step in STEPS}
    for before, word, after in zip(["", *words], words, [*words[1:], ""], strict=False):
        name, value = (before, word[1:] or after) if word[0] == "=" else (word[:-1], after)
        is_open = word.find("=") == len(word) - 1 and after and "=" not in after
        is_value = after[:1] != "-" and after.partition(":")[0] not in tasks
        if word[0] == "=" or (is_open and is_value):
            whole = f"{name or 'NAME'}={value or 'VALUE'}"
            raise UsageError(f"{word}: a space stands beside the =", f"write {whole}")


def _require_one_value(words: Iterable[str]) -> None:
    """Raise UsageError where a variable is given two values: doit would take the last one."""
    given: dict[str, str] = {}
    for word in words:
        name, _, value = word.partition("=")
        before = given.setdefault(name.replace("-", "_"), value)
        if before != value:
            raise UsageError(
                f"{name}={before} and {name}={value} contradict each other",
                f"leave one {name}= out",
            )


def _is_free(word: str, command: str, named: list[str]) -> bool:
    """Whether a word means what it likes: for another program, or for doit alone."""
    if command and command not in OF_TASKS:
        return True
    takes_words = command in ("", "run") and not WITH_WORDS.isdisjoint(named)
    return takes_words or (command in ("clean", "run", "list") and "*" in word)


def _require_known(word: str, command: str) -> None:
    """Raise UsageError where there is no such task."""
    tasks = [step.name for step in STEPS]
    if word.partition(":")[0] in tasks:
        return
    known = [name for name in tasks if not name.startswith("_")]
    if command == "help":
        if word in ("task", f"{SERVER}NAME", *COMMANDS, *parsers()):
            return
        near = did_you_mean(word, [*known, *COMMANDS, *parsers()])
        raise UsageError(f"{word}: there is no such task, variable or command{near}", _all())
    if word in TASKS_ELSEWHERE:
        raise UsageError(f"{word}: there is no such task", f"here it is {TASKS_ELSEWHERE[word]}")
    raise UsageError(f"{word}: there is no such task{did_you_mean(word, known)}", _all())


def _all() -> str:
    return f"{doitw('list')} shows all tasks"


def options(command: str) -> dict[str, bool]:
    """The options of a command of doit's, as they are written: whether each takes a value."""
    from doit.cmd_base import get_loader
    from doit.doit_cmd import DoitMain

    main = DoitMain()
    commands = main.get_cmds()
    loader = get_loader(main.config, None, commands)
    made = commands.get_plugin(command)(task_loader=loader, config=main.config, cmds=commands)
    names: dict[str, bool] = {}
    for each in made.get_options():
        takes = each.type is not bool
        names |= {f"-{each.short}": takes} if each.short else {}
        names |= {f"--{each.long}": takes} if each.long else {}
        names |= {f"--{each.inverse}": False} if each.inverse else {}
    return names


def _option(word: str, known: Mapping[str, bool]) -> bool | None:
    """Whether the next word is the value of this option; None where there is no such option."""
    name, given, _ = word.partition("=")
    if word.startswith("--"):
        fits = (
            [known[name]] if name in known else [v for n, v in known.items() if n.startswith(name)]
        )
        return fits[0] and not given if len(fits) == 1 else None
    for at, letter in enumerate(word[1:], start=2):
        takes = known.get(f"-{letter}")
        if takes is None or takes:
            return None if takes is None else at == len(word)
    return False


def _parser(word: str, name: str, command: str) -> object:
    """The parser of the variable that the option `word` means. Raises UsageError for none."""
    if name.startswith(SERVER) and len(name) > len(SERVER):
        return None
    table = parsers()
    if name in table:
        return table[name]
    if meant := request.elsewhere(name):
        raise UsageError(
            f"{word}: there is no such option", f"here it is --{meant.replace('_', '-')}"
        )
    near = did_you_mean(name, list(table)).replace("_", "-").replace(" mean ", " mean --")
    if command:
        near = did_you_mean(word, list(options(command))) or near
        raise UsageError(f"{word}: there is no such option{near}", doitw(f"help {command}"))
    raise UsageError(
        f"{word}: there is no such option{near}",
        f"docs/variables.md lists them all; an option of llama-server is written {SERVER}NAME=…",
    )


def _value(word: str, rest: deque[str], *, is_flag: bool) -> str:
    """What follows an option, taken from `rest`. A switch may stand alone."""
    following = rest[0].strip().lower() if rest else ""
    if is_flag:
        return rest.popleft() if following in {*YES, *NO} - {""} else "1"
    if not rest or rest[0].startswith("--"):
        raise UsageError(f"{word}: needs a value", f"write {word}=…")
    return rest.popleft()


def parsers() -> Mapping[str, object]:
    """The parser of each variable, by its name: loaded only where an option is written."""
    return {each.name: each.parse for each in all_variables.TABLE}


def read_by(step: AnyStep[Any]) -> list[Variable]:
    """The variables that a step reads, in the order of their groups."""
    names = [
        each
        for group, members in all_variables.GROUPS.items()
        for each in variables(members).values()
        if (group in step.reads or each.name in step.reads) and step.name in (each.of or step.name)
    ]
    return [*names, *([ANY_OPTION] if "server" in step.reads else [])]


def require_read(words: Iterable[str], given: Mapping[str, str]) -> None:
    """Raise UsageError where a variable is given that no step among `words` reads."""
    names = {word.partition(":")[0] for word in words}
    steps = [step for step in STEPS if step.name in names]
    if not steps or any(step not in PUBLIC for step in steps) or any("*" in x for x in names):
        return  # such as `list` or `clean q*`: which steps are meant is not known here
    others = [step for step in STEPS if step.name in {step.also for step in steps}]
    others += [step for step in STEPS if step.name in {step.also for step in others}]
    taken = {each.name for step in (*steps, *others) for each in read_by(step)}
    named = ", ".join(step.name for step in steps)
    errors = [
        f"{name}={value}: not a variable of {named}"
        for name, value in given.items()
        if (f"{SERVER}NAME" if name.startswith(SERVER) else name) not in taken
    ]
    if errors:
        raise UsageError("\n".join(errors), f"{doitw(f'help {steps[0].name}')} lists its variables")


def versions() -> str:
    """This project's, llama.cpp's and doit's."""
    from importlib.metadata import version

    return "\n".join(
        [
            f"llama-pipeline {project_version()}",
            f"llama.cpp {source.active_revision(home()).full}",
            f"doit {version('doit')}",
        ]
    )
