"""The two kinds of errors that end a run, and what their hints say."""

from __future__ import annotations

import os
import sys
from pathlib import PurePath


class PipelineError(Exception):
    """Something could not be done. `message` says what and where, `hint` the next step."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  hint: {self.hint}" if self.hint else self.message


class UsageError(PipelineError):
    """Wrong usage or configuration, detected before any work: exit status 3."""


def did_you_mean(word: str, known: list[str] | tuple[str, ...], cutoff: float = 0.6) -> str:
    """`; did you mean X?` for the nearest of `known`, or nothing. `cutoff`: 1 would be the same."""
    import difflib

    swapped = [each for each in known if each.casefold() == word.casefold()]
    swapped += [each for each in known if sorted(each) == sorted(word)]  # the same letters
    near = swapped or difflib.get_close_matches(word, known, n=1, cutoff=cutoff)
    return f"; did you mean {near[0]}?" if near else ""


def doitw(words: str) -> str:
    """The command line `words` as the reader of a hint would type it: `./doitw up`, `doit up`.

    The script doitw sets LLAMA_PIPELINE_COMMAND to the name by which it was called.
    """
    import shlex
    import shutil

    if is_plain_doit():
        return f"doit {words}"
    name = os.environ.get("LLAMA_PIPELINE_COMMAND", "")
    if not name:
        return f"{'doitw' if sys.platform == 'win32' else './doitw'} {words}"
    base = PurePath(name).name
    if shutil.which(base) == name:  # what a shell finds by itself needs no folder
        name = base
    return f"{name if sys.platform == 'win32' else shlex.quote(name)} {words}"


def is_plain_doit() -> bool:
    """Whether doit itself was typed."""
    program = PurePath(sys.argv[0])
    return program.stem == "doit" or program.parts[-2:] == ("doit", "__main__.py")
