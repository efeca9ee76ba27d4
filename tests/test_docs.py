"""The pages say what there is: variables, commands and links."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY, Doit

from pipeline.tasks.command_line import understood

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
COMMANDS = re.findall(
    r"^(?:[A-Z_]+=\S+ )*\./doitw (.+?)(?: \| source)?(?:\s+#.*)?$",
    "\n".join(page.read_text(encoding="utf-8") for page in PAGES),
    re.M,
)


def test_the_page_of_variables_is_the_generated_one() -> None:
    from pipeline.tasks import reference

    text = reference.PAGE.read_text(encoding="utf-8")
    assert text == reference.page(text), "python -m pipeline.tasks.reference writes it"


# The files that the pages speak of are not here.
MISSING = ("model=~", "model=model.", "lora=style.", "pkg=", "key=", "public_key=", "provenance=")
MISSING += ("attestation=bundle", "text=domain.")


def workflow() -> dict[str, Any]:
    """The example of docs/ci.md."""
    text = (REPOSITORY / "docs" / "ci.md").read_text(encoding="utf-8")
    (found,) = re.findall(r"^```yaml\n(.*?)^```$", text, re.M | re.S)
    read: dict[str, Any] = yaml.safe_load(found)
    return read


STEPS = workflow()["jobs"]["package"]["steps"]
RUN = [found for step in STEPS for found in re.findall(r"\./doitw ([^)\n]+)", step.get("run", ""))]


def test_the_workflow_keys_its_cache_by_the_recipe() -> None:
    (cache,) = [step for step in STEPS if "cache" in step.get("uses", "")]
    (key,) = [step for step in STEPS if step.get("id") == "recipe"]
    assert "./doitw recipe" in key["run"] and "steps.recipe.outputs.key" in cache["with"]["key"]
    assert [command.split()[0] for command in RUN] == ["recipe", "build_bins", "package"]
    # what the recipe is asked for is what is built, and packed
    assert RUN[0].split()[1:] == RUN[1].split()[1:]


@pytest.mark.parametrize("command", sorted({*COMMANDS, *RUN}))
def test_commands_in_the_pages_are_understood(bare: Doit, command: str) -> None:
    """Each is read as doit would run it, up to the point where work begins."""
    own, _, _ = command.partition(" -- ")  # what follows is another program's
    words = shlex.split(own.partition(" > ")[0])
    variables = [w for w in words if "=" in w and not w.startswith(MISSING)]
    listed = bare("list", "-q", *variables).out.split()
    if words[0] in ("help", "completion"):
        understood(words)
        return
    named = [w for w in words if "=" not in w and not w.startswith("-")]
    assert named, "a task or a command of doit"
    assert all(word in [*listed, "list", "forget", "clean"] for word in named)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target
