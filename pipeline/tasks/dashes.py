"""The words behind `--`, which are another program's."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence


def before_dashes(given: Mapping[str, str]) -> dict[str, str]:
    """The variables without those of words behind `--`, which doit takes for variables, too."""
    words = sys.argv[1 : sys.argv.index("--")] if "--" in sys.argv else None
    if words is None:
        return dict(given)
    own = dict(word.split("=", 1) for word in words if "=" in word and not word.startswith("-"))
    return {name: own[name] for name in given if name in own}


def behind_dashes(words: Sequence[str]) -> list[str]:
    """The words for another program, as they were typed behind `--`: doit takes some away."""
    return sys.argv[sys.argv.index("--") + 1 :] if "--" in sys.argv else list(words)
