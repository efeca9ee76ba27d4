"""Node.js and npm of this machine, with which llama.cpp's page is built."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.errors import PipelineError
from pipeline.core.paths import Home
from pipeline.core.process import capture
from pipeline.core.store import stat_cache

# The lowest version of each line that the page's packages accept; newer lines are all accepted.
LOWEST = {20: (20, 19), 22: (22, 13), 24: (24, 0)}
HINT = (
    "install Node.js 20.19, 22.13, 24 or newer with its npm, as nodejs.org has it for every "
    "system; or ui=off builds the server without its page"
)


@dataclass(frozen=True, slots=True)
class Node:
    """Node.js: the programs, and the version as 20.19.0."""

    path: str
    npm: str
    version: str


def find_node(home: Home) -> Node | None:
    """Node.js, where it is here with its npm and new enough."""
    try:
        return require_node(home)
    except PipelineError:
        return None


def require_node(home: Home) -> Node:
    """Node.js of PATH. Raises PipelineError that says what is missing or too old."""
    path, npm = shutil.which("node"), shutil.which("npm")
    if not path:
        raise PipelineError("Node.js is not here (node)", HINT)
    version = _version(Path(path), home.run / "node.json")
    if not is_accepted(version):
        told = f"is version {version}" if version else "does not name its version"
        raise PipelineError(f"{path}: {told}, and llama.cpp's page needs {_accepted()}", HINT)
    if not npm:
        raise PipelineError(f"npm is not here, only Node.js {version}", HINT)
    return Node(path, npm, version)


def is_accepted(version: str) -> bool:
    """Whether the page's packages take this version of Node.js."""
    numbers = tuple(int(number) for number in version.split(".")) if version else (0,)
    lowest = LOWEST.get(numbers[0])
    return numbers >= lowest if lowest else numbers[0] > max(LOWEST)


def _accepted() -> str:
    *others, last = (".".join(map(str, version)) for version in LOWEST.values())
    return f"{', '.join(others)}, {last} or newer"


def _version(node: Path, book: Path) -> str:
    """The version that it names; asked once for each file that stands there."""
    known = stat_cache.recall(book, node)
    if known is not None:
        return str(known)
    before = stat_cache.stamp(node)
    told = re.fullmatch(r"v(\d+\.\d+\.\d+)\S*", (capture([node, "--version"]) or "").strip())
    version = told[1] if told else ""
    with node.open("rb") as file:
        # A version manager's script stays the same while what it starts changes.
        # And a home that is not there yet is made by the steps, not by who looks at them.
        if version and book.parent.is_dir() and file.read(2) != b"#!":
            stat_cache.remember(book, node, version, before)
    return version
