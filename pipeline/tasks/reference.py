"""What is generated from the tables of steps and variables: `help`, and the page of variables.

python -m pipeline.tasks.reference      writes the table in docs/variables.md anew
"""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Iterator
from typing import Any

from pipeline.commands.variables import GROUPS, TABLE
from pipeline.core.errors import doitw
from pipeline.core.paths import REPOSITORY
from pipeline.core.variables import OneOf, Variable, flag, variables

from .command_line import ANY_OPTION, PUBLIC, read_by
from .step import AnyStep
from .table import STEPS

PAGE = REPOSITORY / "docs" / "variables.md"
HEAD = "| variable | meaning | default |\n| --- | --- | --- |\n"


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
    known = {"model": "demo", "config": "FILE", "pkg": "FILE"}
    usual = "1" if each.parse is flag else "…"
    first = each.parse.words[0] if isinstance(each.parse, OneOf) else usual
    return f"{each.name}={known.get(each.name, first)}"


def plain(text: str) -> str:
    """Markdown as a terminal shows it."""
    text = re.sub(r"\[([^\]]+)\]\(([^)#]+)(?:#[^)]*)?\)", r"\1 (docs/\2)", text)
    return text.replace("`", "")


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
