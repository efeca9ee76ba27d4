"""The pages say what there is: variables, commands and links."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from conftest import REPOSITORY, Doit

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
COMMANDS = re.findall(
    r"^(?:[A-Z_]+=\S+ )*\./doitw (.+?)(?:\s+#.*)?$",
    "\n".join(page.read_text(encoding="utf-8") for page in PAGES),
    re.M,
)


def test_the_page_of_variables_is_complete() -> None:
    from pipeline.tasks.variables import TABLE

    text = (REPOSITORY / "docs" / "variables.md").read_text(encoding="utf-8")
    told = set(re.findall(r"^\| `([a-z0-9_]+)` \|", text, re.M))
    assert told == {variable.name for variable in TABLE}


@pytest.mark.parametrize("command", sorted(set(COMMANDS)))
def test_commands_in_the_pages_are_understood(bare: Doit, command: str) -> None:
    """Each is read as doit would run it, up to the point where work begins."""
    words = [word for word in shlex.split(command) if "path" not in word and ".gguf" not in word]
    words = [word for word in words if not word.startswith("model=~")]
    assert bare("list", "-q", *(word for word in words if "=" in word)).status == 0
    task = words[0] if words[0] not in ("list", "forget", "clean") else words[1]
    assert f"{task} " in bare("list").out or task.startswith("-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target
