"""npm, at work in a folder of its own: fetch a project's packages, and build it."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from msgspec import Struct

from pipeline.core.environment import without_credentials
from pipeline.core.errors import PipelineError
from pipeline.core.log import info
from pipeline.core.paths import Home
from pipeline.core.process import LAST_LINES, capture, last_lines, run
from pipeline.core.progress import bar
from pipeline.core.store import stat_cache

INSTALL = ("ci", "--ignore-scripts", "--no-audit", "--no-fund", "--include=dev")
BUILD = ("run", "build")
# Each download is said, which shows that npm is alive; it tries three times, without long pauses.
NETWORK = ("--loglevel=http", "--fetch-retry-mintimeout=1000", "--fetch-retry-maxtimeout=5000")
DOWNLOADS = 10_000  # lines of a log that they take at most
PATIENCE, BUILD_PATIENCE = 300.0, 3600.0  # seconds without a word
# Of the user's variables these change what is made.
DROPPED = ("LLAMA_", "VITE_", "PUBLIC_", "NODE_ENV")
# Its own credentials, for the registry. The build, which runs the packages' code, gets none.
ITS_OWN = ("NPM_", "NODE_AUTH_TOKEN")
WITHOUT = "ui=off builds the server without its page"
# The lowest version of each line that the page's packages accept; newer lines are all accepted.
LOWEST_NODE = {20: (20, 19), 22: (22, 13), 24: (24, 0)}
NODE_HINT = (
    "install Node.js 20.19, 22.13, 24 or newer with its npm, as nodejs.org has it for every "
    "system; or ui=off builds the server without its page"
)


class Node(Struct, frozen=True):
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
        raise PipelineError("Node.js is not installed (node)", NODE_HINT)
    version = _version(Path(path), home.run / "node.json")
    if not is_accepted_node(version):
        reason = f"is version {version}" if version else "does not name its version"
        raise PipelineError(
            f"{path}: {reason}, and llama.cpp's page needs {_accepted()}", NODE_HINT
        )
    if not npm:
        raise PipelineError(f"npm is not installed, only Node.js {version}", NODE_HINT)
    return Node(path, npm, version)


def is_accepted_node(version: str) -> bool:
    """Whether the page's packages take this version of Node.js."""
    numbers = tuple(int(number) for number in version.split(".")) if version else (0,)
    lowest = LOWEST_NODE.get(numbers[0])
    return numbers >= lowest if lowest else numbers[0] > max(LOWEST_NODE)


def _accepted() -> str:
    *others, last = (".".join(map(str, version)) for version in LOWEST_NODE.values())
    return f"{', '.join(others)}, {last} or newer"


def _version(node: Path, cache: Path) -> str:
    """Its version; the program is run once for each file found there."""
    cached = stat_cache.recall(cache, node)
    if cached is not None:
        return str(cached)
    before = stat_cache.stamp(node)
    answer = re.fullmatch(r"v(\d+\.\d+\.\d+)\S*", (capture([node, "--version"]) or "").strip())
    version = answer[1] if answer else ""
    with node.open("rb") as file:
        # A version manager's script stays the same while what it starts changes.
        # And the steps create the home; looking at them does not.
        if version and cache.parent.is_dir() and file.read(2) != b"#!":
            stat_cache.remember(cache, node, version, before)
    return version


class Project(Struct, frozen=True):
    """A folder with a package-lock.json, in which npm works."""

    folder: Path
    node: Node
    log: Path

    def install(self, *, offline: bool = False, patience: float = PATIENCE) -> None:
        """Fetch the packages, each with the hash that the lock file has of it, and run nothing of
        theirs. Raises PipelineError."""
        lock = json.loads((self.folder / "package-lock.json").read_text(encoding="utf-8"))
        total, done = len(lock["packages"]), 0

        def count(line: str) -> None:
            nonlocal done
            if line.startswith("npm http fetch GET 200 "):
                done = min(done + 1, total)
                update(done, total)

        words = (*INSTALL, "--offline" if offline else "--prefer-offline", *NETWORK)
        with bar("fetching the packages of llama.cpp's page") as update:
            env = environment(self.node, keep=ITS_OWN)
            status = self._npm(words, env, on_line=count, patience=patience)
        if status and offline:
            raise self._failed(words, status, "offline=1 allows only what npm has in its cache")
        if status:
            advice = "check the network and npm's settings (npm config list)"
            raise self._failed(words, status, advice)

    def build(self, variables: dict[str, str]) -> None:
        """Run the project's own build. Raises PipelineError."""
        info("building llama.cpp's page, which takes a minute or two")
        env = environment(self.node) | variables
        status = self._npm(BUILD, env, append=True, patience=BUILD_PATIENCE)
        if status:
            raise self._failed(BUILD, status)

    def _npm(
        self,
        words: Sequence[str],
        env: dict[str, str],
        *,
        on_line: Callable[[str], None] | None = None,
        append: bool = False,
        patience: float | None = None,
    ) -> int:
        return run(
            [self.node.npm, *words],
            log=self.log,
            env=env,
            cwd=self.folder,
            on_line=on_line,
            append=append,
            patience=patience,
        )

    def _failed(self, words: Sequence[str], status: int, advice: str = "") -> PipelineError:
        output = self._output()
        if "ENOSPC" in output:
            advice = "the disk is full: free some space and run the same command again"
        hints = (advice, f"the whole log is {self.log}", WITHOUT)
        return PipelineError(
            f"llama.cpp's page could not be built (npm {words[0]} ended with {status}):\n{output}",
            "; ".join(filter(None, hints)),
        )

    def _output(self) -> str:
        """The end of the log without its downloads."""
        lines = last_lines(self.log, DOWNLOADS).splitlines()
        return "\n".join([line for line in lines if "| npm http " not in line][-LAST_LINES:])


def environment(node: Node, keep: Sequence[str] = ()) -> dict[str, str]:
    """What npm is run with: itself a script, it must find this very Node.js. `keep`: see
    `without_credentials`."""
    clean = without_credentials(os.environ, keep)
    kept = {name: clean[name] for name in clean if not name.startswith(DROPPED)}
    search = [str(Path(node.path).parent), kept.get("PATH", os.defpath)]
    return {**kept, "PATH": os.pathsep.join(search), "SOURCE_DATE_EPOCH": "0", "TZ": "UTC"}
