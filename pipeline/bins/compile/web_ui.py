"""llama.cpp's own page, built by npm from its source, for the server to embed.

npm works in a copy: the source tree stays as it was checked. The same source gives the same
files, byte for byte, in whatever folder they are made.
"""

from __future__ import annotations

import filecmp
import shutil
import time
from fnmatch import fnmatch
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from pipeline.core import log
from pipeline.core.errors import PipelineError, doitw
from pipeline.core.paths import Home
from pipeline.core.process import last_lines
from pipeline.core.store import artifacts, receipts
from pipeline.core.store.locks import only_one
from pipeline.core.store.publish import remove, require_space
from pipeline.core.store.receipts import Recipe
from pipeline.core.text import size

from . import git_tree, node
from .active import SHORT
from .node import Node
from .source import Source, files

INSIDE = "tools/ui"  # of the source, and of a build folder
WORK_BYTES = 800_000_000  # of the packages and what is made with them
# With both off the build embeds what `place` put into its folder, and fetches nothing.
OPTIONS = ("-DLLAMA_BUILD_UI=OFF", "-DLLAMA_USE_PREBUILT_UI=OFF", "-DLLAMA_UI_GZIP=ON")
# Left alone, SvelteKit takes the time of day for the version that the page names.
CONFIG = """\
import config from './svelte.config.upstream.js';
config.kit.version = {{ ...config.kit.version, name: '{version}' }};
export default config;
"""
# What scripts/ui-assets.cmake of the source asks for, in whatever folder of the page it lies.
DEMANDED = (
    *("index.html", "manifest.webmanifest", "sw.js", "build.json", "version.json"),
    *("bundle*.js", "bundle*.css", "workbox*.js"),
)


class Ui(Struct, frozen=True, kw_only=True):
    """The page of a source, and the Node.js to build it with."""

    source: Source
    node: Node
    home: Home

    @property
    def target(self) -> Path:
        """One for each llama.cpp that was switched to: so the way back needs no Node.js."""
        upgrade = self.source.upgrade
        return _pages(self.home) / (f"page-{upgrade.commit[:SHORT]}" if upgrade else "page")

    @property
    def log(self) -> Path:
        return self.home.logs / "ui.log"


def choose(
    requested: str, source: Source, home: Home, *, offline: bool = False
) -> tuple[Ui | None, str]:
    """The page to embed for `ui=auto|on|off` and, where there is none, why not.

    Raises PipelineError where `on` cannot be.
    """
    if requested == "off":
        return None, "ui=off"
    try:
        return _find(source, home, offline), ""
    except PipelineError as error:
        if requested == "on":
            raise
        return None, error.message


def recipe(ui: Ui) -> Recipe:
    """Everything that the page depends on, known without reading its files."""
    return {
        "step": "ui",
        "source": ui.source.recipe(),
        "node": ui.node.version,
        "commands": [list(node.INSTALL), list(node.BUILD)],
    }


def is_current(ui: Ui) -> bool:
    """Whether the page is as this recipe made it."""
    return git_tree.is_current(ui.target, recipe(ui))


def make(ui: Ui, *, offline: bool = False, force: bool = False) -> None:
    """Build and publish the page, unless already done. Raises PipelineError."""
    with artifacts.locked_folder(ui.target):
        if not force and is_current(ui):
            return
        start = time.monotonic()
        work = _work(ui.home)
        remove(work)  # a killed run's
        try:
            _copy(ui.source, work)
            made_of = git_tree.folder_hash(work)
            if force or not _is_of(ui, made_of):
                _build(ui, work, made_of[:12], offline)
        finally:
            remove(work)
        git_tree.record(
            ui.target,
            recipe(ui),
            source={"tree": git_tree.folder_hash(ui.target), "made_of": made_of},
            size=page_bytes(ui.target),
            seconds=time.monotonic() - start,
        )


def place(ui: Ui | None, source: Source, build_folder: Path) -> None:
    """Put the page where the build in `build_folder` embeds it, or see that it finds none.

    Files that are as they should be are left alone. Raises PipelineError.
    """
    foreign = source.folder / INSIDE / "dist"
    if (foreign / "index.html").exists():
        raise PipelineError(
            f"{foreign}: llama.cpp's build would embed this page, not the chosen one",
            f"remove that folder; build the page from the source: {doitw('build_ui')}",
        )
    target = build_folder / INSIDE / "dist"
    if ui is None:
        remove(target)
        return
    with only_one(ui.target):
        if missing_files(ui.target):
            raise PipelineError(f"{ui.target}: there is no page", f"build it: {doitw('build_ui')}")
        files, placed = page_files(ui.target), page_files(target)
        for name in placed.keys() - files.keys():
            placed[name].unlink()
        for name, file in files.items():
            if name not in placed or not filecmp.cmp(file, placed[name], shallow=False):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target / name)


def clean(home: Home) -> None:
    """Remove each page, and what a killed run left of its making."""
    for page in _pages(home).glob("page*"):
        remove(page)
    remove(_work(home))
    forget(home)


def forget(home: Home) -> None:
    """Drop the receipt of each page."""
    for name in receipts.load(_pages(home)):
        receipts.invalidate(_pages(home) / name)


def _pages(home: Home) -> Path:
    return home.bins / ".ui"


def _work(home: Home) -> Path:
    return home.bins / ".build" / "ui"


def _find(source: Source, home: Home, offline: bool) -> Ui:
    if source.folder.exists() and not (source.folder / INSIDE / "package-lock.json").exists():
        raise PipelineError(f"{source.folder}: there is no page in its {INSIDE}", node.WITHOUT)
    if node.find_node(home) is None:
        # A finished page needs no Node.js, which may be on the PATH of some shells only.
        standing = Ui(source=source, node=Node("", "", ""), home=home)
        entry = receipts.of(standing.target)
        recorded = Node("", "", str(entry.recipe.get("node") if entry else ""))
        standing = replace(standing, node=recorded)
        if is_current(standing):
            return standing
    return Ui(source=source, node=node.require(home, offline=offline), home=home)


def _is_of(ui: Ui, made_of: str) -> bool:
    """Whether the finished page was made of these very files: another commit may not change
    them, and a copied folder has other times."""
    entry = receipts.of(ui.target)
    return (
        entry is not None
        and entry.source is not None
        and entry.source.get("made_of") == made_of
        and {**entry.recipe, "source": ui.source.recipe()} == recipe(ui)
        and ui.target.is_dir()
        and git_tree.folder_hash(ui.target) == entry.source.get("tree")
    )


def _copy(source: Source, work: Path) -> None:
    for name in files(source, INSIDE):
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source.folder / INSIDE / name, work / name, follow_symlinks=False)


def _build(ui: Ui, work: Path, version: str, offline: bool) -> None:
    used = ui.node if ui.node.path else node.require(ui.home, offline=offline)
    if used == node.packaged(ui.home):
        node.make(ui.home, offline=offline)
    project = node.Project(work, used, ui.log)
    require_space(work, WORK_BYTES)
    config = work / "svelte.config.js"
    if config.exists():
        config.rename(work / "svelte.config.upstream.js")
        config.write_text(CONFIG.format(version=version), encoding="utf-8")
    with artifacts.new_folder(ui.target) as made:
        made.mkdir()
        project.install(offline=offline)
        project.build({"LLAMA_UI_OUT_DIR": str(made)})
        missing = missing_files(made)
        if missing:
            raise PipelineError(
                f"npm built a page without {', '.join(missing)}:\n{last_lines(ui.log)}",
                f"the whole log is {ui.log}; {node.WITHOUT}",
            )
    log.info(f"built llama.cpp's page, {size(page_bytes(ui.target))}")


def page_files(folder: Path) -> dict[str, Path]:
    """Every file by its path below the folder; none where there is no folder."""
    paths = [Path(entry.path) for entry in git_tree.files(folder)] if folder.is_dir() else []
    return {path.relative_to(folder).as_posix(): path for path in paths}


def page_bytes(folder: Path) -> int:
    """The bytes of all its files."""
    return sum(path.stat().st_size for path in page_files(folder).values())


def missing_files(folder: Path) -> list[str]:
    """What a folder lacks to be a page; an empty file counts as none."""
    names = [path.name for path in page_files(folder).values() if path.stat().st_size]
    return [pattern for pattern in DEMANDED if not any(fnmatch(name, pattern) for name in names)]
