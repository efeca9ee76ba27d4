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
    words = shlex.split(command.partition(" -- ")[0])  # what follows is pytest's
    # The models on disk that the pages speak of are not here.
    variables = [w for w in words if "=" in w and not w.startswith(("model=~", "model=model."))]
    listed = bare("list", "-q", *variables).out.split()
    named = [w for w in words if "=" not in w and not w.startswith("-")]
    assert named, "a task or a command of doit"
    assert all(word in [*listed, "list", "forget", "clean"] for word in named)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target
