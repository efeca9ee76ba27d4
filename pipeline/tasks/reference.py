"""What is generated from the tables of steps and variables: `help`, the page of variables, and the
completion of shells.

    python -m pipeline.tasks.reference      writes the table in docs/variables.md anew
"""

from __future__ import annotations

import re
import shlex
import shutil
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import PurePath
from typing import Any

from pipeline.commands.variables import GROUPS, SERVER, TABLE
from pipeline.core.errors import doitw
from pipeline.core.paths import REPOSITORY
from pipeline.core.variables import OneOf, Variable, flag, path, variables

from .command_line import COMMANDS
from .step import AnyStep
from .table import STEPS

PAGE = REPOSITORY / "docs" / "variables.md"
HEAD = "| variable | meaning | default |\n| --- | --- | --- |\n"
ANY_OPTION = Variable(f"{SERVER}NAME", str, "any other option of llama-server, `_` for `-`")
PUBLIC = tuple(step for step in STEPS if not step.name.startswith("_"))
SHELLS = ("bash", "zsh", "fish")


def read_by(step: AnyStep[Any]) -> list[Variable]:
    """The variables that a step reads, in the order of their groups."""
    names = [
        each
        for group, members in GROUPS.items()
        for each in variables(members).values()
        if (group in step.reads or each.name in step.reads) and step.name in (each.of or step.name)
    ]
    return [*names, *([ANY_OPTION] if "server" in step.reads else [])]


# docs/variables.md


def page(text: str) -> str:
    """The page with its table of variables as it should be."""
    start = text.index(HEAD)
    end = text.index("\n\n", start) + 1
    return text[:start] + HEAD + "".join(map(row, rows())) + text[end:]


def rows() -> Iterator[Variable]:
    last = [*variables(GROUPS["server"])][-1]
    for each in TABLE:
        yield each
        if each.name == last:
            yield ANY_OPTION


def row(each: Variable) -> str:
    default = f" {each.default} |" if each.default else " |"
    return f"| `{each.name}` | {meaning(each)} |{default}\n"


def meaning(each: Variable) -> str:
    readers = [step.name for step in PUBLIC if each in read_by(step)]
    steps = each.of or (readers if len(readers) == 1 else ())
    return f"of {', '.join(f'`{name}`' for name in steps)}: {each.help}" if steps else each.help


# help


def help_of(name: str) -> str:
    """A step with its variables, or a variable; empty where there is none of that name."""
    width = max(60, min(shutil.get_terminal_size().columns, 100))
    for step in STEPS:
        if step.name == name:
            return "\n".join(_step(step, width)) + "\n"
    for each in (*TABLE, ANY_OPTION):
        if each.name == name:
            return "\n".join(_variable(each, width)) + "\n"
    return ""


def _step(step: AnyStep[Any], width: int) -> Iterator[str]:
    yield f"{step.name}  {step.help}"
    table = read_by(step)
    if not table:
        return
    yield f"\nVariables, as in {doitw(f'{step.name} {example(table[0])}')}\n"
    wide = max(len(each.name) for each in table)
    for each in table:
        default = f" [{plain(each.default)}]" if each.default else ""
        lines = textwrap.wrap(plain(each.help) + default, width - wide - 4)
        yield f"  {each.name:<{wide}}  {lines[0]}"
        yield from (f"  {'':<{wide}}  {line}" for line in lines[1:])


def _variable(each: Variable, width: int) -> Iterator[str]:
    yield from textwrap.wrap(f"{each.name}=  {plain(meaning(each))}", width)
    if each.default:
        yield from textwrap.wrap(f"default: {plain(each.default)}", width)
    names = [step.name for step in PUBLIC if each in read_by(step)]
    yield from textwrap.wrap(f"read by: {', '.join(names)}", width)


def example(each: Variable) -> str:
    known = {"model": "model=demo", "config": "config=FILE", "pkg": "pkg=FILE"}
    return known.get(each.name, f"{each.name}={next(iter(values(each)), '…')}")


def plain(text: str) -> str:
    """Markdown as a terminal shows it."""
    text = re.sub(r"\[([^\]]+)\]\(([^)#]+)(?:#[^)]*)?\)", r"\1 (docs/\2)", text)
    return text.replace("`", "")


# shells


def values(each: Variable) -> tuple[str, ...]:
    """What a shell offers as the value of a variable."""
    if isinstance(each.parse, OneOf):
        return each.parse.words
    return ("1", "0") if each.parse is flag else ()


def completion(shell: str) -> str:
    """A script that completes tasks, their variables and the values of these in that shell."""
    program = PurePath(shlex.split(doitw("list"))[0]).name
    by_task = {step.name: [each.name for each in read_by(step)] for step in PUBLIC}
    files = [each.name for each in TABLE if each.parse is path]
    fixed = {each.name: values(each) for each in TABLE if values(each)}
    write = {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell]
    text = write(by_task, files, fixed)
    return text.replace("@first@", " ".join([*by_task, *COMMANDS])).replace("@program@", program)


def _cases(table: Iterable[tuple[str, str]]) -> str:
    return "\n".join(f"        {name}) {text} ;;" for name, text in table)


def _names(names: Iterable[str]) -> str:
    return " ".join(f"{name.removesuffix('NAME')}=".replace(".=", ".") for name in names)


BASH = r"""# bash completion, made by `doitw completion bash`
_doitw() {
    local line="${COMP_LINE:0:COMP_POINT}" word task="" each options="" before=""
    local -a words
    read -ra words <<< "$line"
    word="${line##* }"
    for each in "${words[@]:1}"; do
        [[ $each != *=* && $each != "$word" ]] && { task="$each"; break; }
    done
    COMPREPLY=()
    # bash splits words at = where COMP_WORDBREAKS has it, and then puts in what follows alone
    [[ $COMP_WORDBREAKS == *=* ]] || before="${word%%=*}="
    case "$word" in
@files@
        *=*)
            case "${word%%=*}" in
@fixed@
            esac
            for each in $options; do
                [[ $each == "${word#*=}"* ]] && COMPREPLY+=("$before$each ")
            done ;;
        *)
            case "$task" in
@tasks@
                "" | help | list | info | clean | forget | run) options="@first@" ;;
            esac
            for each in $options; do
                [[ $each == "$word"* ]] || continue
                [[ $each == *= || $each == *. ]] || each+=" "
                COMPREPLY+=("$each")
            done ;;
    esac
}
complete -o nospace -F _doitw @program@
"""


def _bash(
    by_task: dict[str, list[str]], files: list[str], fixed: dict[str, tuple[str, ...]]
) -> str:
    pattern = " | ".join(f"{name}=*" for name in files)
    compgen = "local IFS=$'\\n'\n            compopt -o filenames 2>/dev/null\n"
    compgen += '            COMPREPLY=($(compgen -f -P "$before" -- "${word#*=}"))'
    return (
        BASH.replace("@files@", f"        {pattern})\n            {compgen} ;;")
        .replace("@fixed@", _cases((n, f'options="{" ".join(v)}"') for n, v in fixed.items()))
        .replace("@tasks@", _cases((n, f'options="{_names(v)}"') for n, v in by_task.items()))
    )


ZSH = r"""#compdef @program@
# zsh completion, made by `doitw completion zsh`
_doitw() {
    local task="" each
    local -a options
    for each in ${words[2,CURRENT-1]}; do
        [[ $each != *=* ]] && { task=$each; break; }
    done
    if [[ $PREFIX == *=* ]]; then
        case ${PREFIX%%=*} in
@fixed@
            (@files@) compset -P '*='; _files; return ;;
        esac
        compset -P '*='
        compadd -a options
        return
    fi
    case $task in
@tasks@
        (""|help|list|info|clean|forget|run) compadd -- @first@; return ;;
    esac
    compadd -S "" -a options
}
compdef _doitw @program@
"""


def _zsh(by_task: dict[str, list[str]], files: list[str], fixed: dict[str, tuple[str, ...]]) -> str:
    return (
        ZSH.replace("@files@", "|".join(files))
        .replace("@fixed@", _cases((f"({n}", f"options=({' '.join(v)})") for n, v in fixed.items()))
        .replace("@tasks@", _cases((f"({n}", f"options=({_names(v)})") for n, v in by_task.items()))
    )


def _fish(
    by_task: dict[str, list[str]], files: list[str], fixed: dict[str, tuple[str, ...]]
) -> str:
    lines = [
        "# fish completion, made by `doitw completion fish`",
        "function __doitw_task",
        "    set -l words (commandline -opc)[2..-1]",
        "    string match -v -- '*=*' $words | head -1",
        "end",
        "complete -c @program@ -f",
        "complete -c @program@ -n 'test -z (__doitw_task)' -a '@first@'",
        "complete -c @program@ -n 'contains -- (__doitw_task) help list info clean forget run'"
        f" -a '{' '.join(by_task)}'",
    ]
    for task, names in by_task.items():
        words = [w for n in names for w in (f"{n}={v}" for v in fixed.get(n, ("",)))]
        text = " ".join(word.replace("NAME=", "") for word in words)
        if words:
            lines.append(
                f"complete -c @program@ -n 'contains -- (__doitw_task) {task}' -a '{text}'"
            )
    for name in files:
        lines.append(
            f"complete -c @program@ -n 'string match -q -- \"{name}=*\" (commandline -ct)'"
            f' -a \'(__fish_complete_path (string replace -- {name}= "" (commandline -ct)) |'
            f' string replace -r "^" {name}=)\''
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
