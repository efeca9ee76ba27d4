"""What a page is made of: the files that llama.cpp's build embeds."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

from . import git_tree

# What scripts/ui-assets.cmake of the source asks for, in whatever folder of the page it lies.
DEMANDED = (
    *("index.html", "manifest.webmanifest", "sw.js", "build.json", "version.json"),
    *("bundle*.js", "bundle*.css", "workbox*.js"),
)


def files(folder: Path) -> dict[str, Path]:
    """Every file by its path below the folder; none where there is no folder."""
    found = [Path(entry.path) for entry in git_tree.files(folder)] if folder.is_dir() else []
    return {path.relative_to(folder).as_posix(): path for path in found}


def size(folder: Path) -> int:
    """The bytes of all its files."""
    return sum(path.stat().st_size for path in files(folder).values())


def missing(folder: Path) -> list[str]:
    """What a folder lacks to be a page; an empty file counts as none."""
    names = [path.name for path in files(folder).values() if path.stat().st_size]
    return [wanted for wanted in DEMANDED if not any(fnmatch(name, wanted) for name in names)]
