"""llama.cpp's source tree: the submodule where it is checked out, else the pinned archive.

Either is taken only if git's hash of its files is the pinned one. A submodule that somebody
changed is used, because that is why people change it, but said and recorded under another
identity than the pinned one.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct

from pipeline.core import environment, log, packages
from pipeline.core.errors import PipelineError
from pipeline.core.paths import REPOSITORY, Home
from pipeline.core.pins import pins
from pipeline.core.process import outcome
from pipeline.core.store import artifacts, receipts
from pipeline.core.store.publish import remove

from . import git_tree

UNPACKED_BYTES = 180_000_000  # of the pinned tree


class Source(Struct, frozen=True, kw_only=True):
    """A tree of llama.cpp's source. `tree` is its identity; `local`: not the pinned one;
    `fetched`: out of the pinned archive, not the submodule."""

    folder: Path
    commit: str
    tree: str
    local: bool = False
    fetched: bool = False

    def recipe(self) -> Mapping[str, Any]:
        """How receipts name it."""
        return {"commit": self.commit, "tree": self.tree}


def find(home: Home) -> Source:
    """Which source there is, or would be once `fetch` ran. Raises PipelineError."""
    submodule = REPOSITORY / "vendor" / "llama.cpp"
    if (submodule / "CMakeLists.txt").exists():
        return _submodule(submodule)
    return Source(
        folder=home.bins / ".source" / f"llama.cpp-{pins().llama_cpp_commit[:12]}",
        commit=pins().llama_cpp_commit,
        tree=pins().llama_cpp_tree,
        fetched=True,
    )


def is_current(source: Source) -> bool:
    """Whether the source is on disk as it was when it was checked."""
    if not source.fetched:
        return True  # a submodule is asked anew each time by `find`
    return git_tree.is_current(source.folder, _recipe(source))


def fetch(source: Source, home: Home, *, offline: bool = False) -> None:
    """Put the source on disk, unless it is there already. Raises PipelineError."""
    if not source.fetched:
        return
    with artifacts.locked_folder(source.folder):
        if is_current(source):
            return
        start = time.monotonic()
        # Times differ after a copy: the hash decides, as it would for a file.
        if not (source.folder.is_dir() and git_tree.folder_hash(source.folder) == source.tree):
            archive = packages.fetch(pins().llama_cpp_archive, home, offline=offline)
            with artifacts.new_folder(source.folder, need=UNPACKED_BYTES) as made:
                log.info(f"unpacking llama.cpp {source.commit[:12]}")
                tree = _unpack(archive, pins().llama_cpp_archive.folder, made)
                if tree != source.tree:
                    raise PipelineError(
                        f"{archive}: its llama.cpp has the tree hash {tree}, pinned is "
                        f"{source.tree}",
                        "correct the pins in pipeline/pins.toml",
                    )
        seconds = time.monotonic() - start
        git_tree.record(source.folder, _recipe(source), size=UNPACKED_BYTES, seconds=seconds)


def files(source: Source, inside: str) -> list[str]:
    """The files below its folder `inside` that are part of it: not what git ignores there."""
    folder = source.folder / inside
    if not source.fetched and (source.folder / ".git").exists():
        words = ("--cached", "--others", "--exclude-standard", "-z")
        listed = dict.fromkeys(_git(folder, "ls-files", *words).split("\0"))
        return [name for name in listed if name and os.path.lexists(folder / name)]
    return [Path(entry.path).relative_to(folder).as_posix() for entry in git_tree.files(folder)]


def clean(source: Source) -> None:
    """Remove what `fetch` unpacked; never the submodule."""
    if source.fetched:
        remove(source.folder)
        receipts.invalidate(source.folder)


def forget(source: Source) -> None:
    """Drop the receipt of what `fetch` unpacked."""
    if source.fetched:
        receipts.invalidate(source.folder)


def _recipe(source: Source) -> Mapping[str, Any]:
    return {"step": "source", **source.recipe(), "archive": pins().llama_cpp_archive.sha256}


def _submodule(folder: Path) -> Source:
    """The checked-out submodule, with its identity from git, or from its files without git."""
    pinned = pins()
    if not (folder / ".git").exists():
        tree = git_tree.folder_hash(folder)
        if tree != pinned.llama_cpp_tree:
            raise PipelineError(
                f"{folder}: holds files that are not the pinned llama.cpp (tree {tree}) and no "
                "git to say what they are",
                "empty the folder to use the pinned archive, or run: "
                "git submodule update --init vendor/llama.cpp",
            )
        return Source(folder=folder, commit=pinned.llama_cpp_commit, tree=tree)
    heads = _git(folder, "rev-parse", "HEAD", "HEAD^{tree}").split()
    commit, committed = heads[0], heads[1]
    changes = _git(folder, "status", "--porcelain", "-z", "--no-renames", "--untracked-files=all")
    if committed == pinned.llama_cpp_tree and not changes:
        return Source(folder=folder, commit=pinned.llama_cpp_commit, tree=committed)
    identity = f"{committed}+{_changes_hash(folder, changes)}" if changes else committed
    return Source(folder=folder, commit=commit, tree=identity, local=True)


def _changes_hash(folder: Path, changes: str) -> str:
    """A short hash of which files differ from the commit, and how."""
    digest = hashlib.sha256()
    for line in filter(None, changes.split("\0")):
        file = folder / line[3:]
        content = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "gone"
        digest.update(f"{line[3:]}\0{content}\0".encode())
    return digest.hexdigest()[:16]


def _git(folder: Path, *words: str) -> str:
    clean = environment.without_credentials(os.environ)
    env = {name: value for name, value in clean.items() if not name.startswith("GIT_")}
    command = ["git", "-C", str(folder), *words]
    status, output, error = outcome(command, env=env | {"GIT_OPTIONAL_LOCKS": "0"})
    if status != 0:
        raise PipelineError(
            f"{folder}: `git {' '.join(words)}` fails there: {error.strip()}",
            "install or set up git, or empty the folder to use the pinned archive",
        )
    return output


def _unpack(archive: Path, inside: str, target: Path) -> str:
    """Unpack the files below `inside` into `target`; returns git's tree hash of them.

    Only plain files are taken, each under its own checked name, so that nothing in the archive
    can reach another place.
    """
    blobs: dict[str, git_tree.Blob] = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            folder, _, name = member.name.partition(inside + "/")
            if folder or not name or name == ".git" or not member.isreg():
                continue
            if ".." in Path(name).parts or Path(name).is_absolute() or Path(name).drive:
                raise PipelineError(f"{archive}: a file in it is named {member.name!r}")
            content = tar.extractfile(member)
            data = content.read() if content else b""  # None for what is no regular file
            path = target / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            executable = bool(member.mode & 0o100)
            path.chmod(0o755 if executable else 0o644)
            blobs[name] = (git_tree.PROGRAM if executable else git_tree.FILE, git_tree.blob(data))
    return git_tree.tree_hash(blobs)
