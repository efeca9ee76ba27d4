"""Which llama.cpp is active: the pinned one, or one that `upgrade` switched to.

`bins/active.json` names it, and the one before it. Without that file the pins hold; switching
replaces it in one step.
"""

from __future__ import annotations

import json
from pathlib import Path

from msgspec import Struct, convert, to_builtins

from pipeline.core.errors import PipelineError, doitw
from pipeline.core.paths import Home
from pipeline.core.store import json_file

SHORT = 12  # digits of a commit in the names of folders


class Revision(Struct, frozen=True, kw_only=True):
    """A commit of llama.cpp with git's hash of its files; `name` is its tag or branch, if known."""

    commit: str
    tree: str
    name: str = ""
    date: str = ""  # such as 2026-10-10

    def __str__(self) -> str:
        words = (self.name, self.commit[:SHORT], self.date and f"of {self.date}")
        return " ".join(filter(None, words))

    @property
    def full(self) -> str:
        """The whole commit, with the name that it has."""
        return f"{self.commit} ({self.name})" if self.name else self.commit


class Active(Struct, frozen=True, kw_only=True):
    """The active revision and the one before it; None is the pinned one."""

    active: Revision | None = None
    previous: Revision | None = None


def file(home: Home) -> Path:
    """The file that says which is active."""
    return home.bins / "active.json"


def read(home: Home) -> Active | None:
    """What the file says; None where nothing was ever switched. Raises PipelineError."""
    path = file(home)
    try:
        return convert(json.loads(path.read_text(encoding="utf-8")), Active)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise PipelineError(
            f"{path}: cannot be read ({error}); it says which llama.cpp is active",
            f"go back to the pinned one: {doitw('upgrade to=pinned yes=1')}",
        ) from None


def write(home: Home, state: Active) -> None:
    """Replace the file in one step. Raises OSError."""
    json_file.write(file(home), to_builtins(state), indent=1)
