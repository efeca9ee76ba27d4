"""llama.cpp's source tree: the one that `upgrade` switched to, else the submodule where it is
checked out, else the pinned archive.

Each is used only if git's hash of its files is the expected one. A modified submodule is used too,
for that is why people modify it, but reported, and recorded under another identity than the pin.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct, convert, to_builtins

from pipeline.core import log, packages
from pipeline.core.errors import PipelineError
from pipeline.core.paths import REPOSITORY, Home
from pipeline.core.pins import pins
from pipeline.core.store import artifacts, receipts
from pipeline.core.store.publish import flush_folder, remove
from pipeline.core.text import size

from . import active, git_tree, upstream
from .active import SHORT, Revision

UNPACKED_BYTES = 180_000_000  # of the pinned tree
ARCHIVE_BYTES = 40_000_000  # of another revision's archive, about
MOST_BYTES = 4 * 1024**3  # of any tree
PINNED = "pinned"


class Source(Struct, frozen=True, kw_only=True):
    """A tree of llama.cpp's source. `tree` is its identity; `local`: a submodule that is not at
    the pin; `fetched`: unpacked, not the submodule; `upgrade`: not the pinned one, but one of
    upstream's by a choice of the user's."""

    folder: Path
    commit: str
    tree: str
    local: bool = False
    fetched: bool = False
    upgrade: Revision | None = None

    @property
    def revision(self) -> Revision:
        """With its name: `submodule` for one that is not at the pin."""
        name = "submodule" if self.local else PINNED
        return self.upgrade or Revision(commit=self.commit, tree=self.tree, name=name)

    def recipe(self) -> Mapping[str, Any]:
        """How receipts name it."""
        return {"commit": self.commit, "tree": self.tree}


def submodule() -> Path:
    """Where the submodule is, or would be if it were checked out."""
    return REPOSITORY / "vendor" / "llama.cpp"


def find(home: Home) -> Source:
    """Which source there is, or would be once `fetch` ran. Raises PipelineError."""
    state = active.read(home)
    return upgraded(home, state.active) if state and state.active else pinned(home)


def pinned_revision() -> Revision:
    """What the pins name."""
    return Revision(commit=pins().llama_cpp_commit, tree=pins().llama_cpp_tree, name=PINNED)


def active_revision(home: Home) -> Revision:
    """The one that is switched to, else the pinned one; a submodule may hold another. Raises
    PipelineError."""
    state = active.read(home)
    return (state and state.active) or pinned_revision()


def upgraded(home: Home, revision: Revision) -> Source:
    """The source of a revision of upstream's."""
    return Source(
        folder=_folder(home, revision.commit),
        commit=revision.commit,
        tree=revision.tree,
        fetched=True,
        upgrade=revision,
    )


def pinned(home: Home) -> Source:
    """The submodule, or the source of the pinned archive. Raises PipelineError."""
    if (submodule() / "CMakeLists.txt").exists():
        return _submodule(submodule())
    return Source(
        folder=_folder(home, pins().llama_cpp_commit),
        commit=pins().llama_cpp_commit,
        tree=pins().llama_cpp_tree,
        fetched=True,
    )


def unpacked(home: Home) -> list[Revision]:
    """The revisions of upstream's whose sources are here."""
    entries = receipts.load(home.bins / ".source").values()
    sources = [dict(each.source or {}) for each in entries]
    return [convert(each, Revision) for each in sources if each.pop("type", "") == "upstream"]


def _folder(home: Home, commit: str) -> Path:
    return home.bins / ".source" / f"llama.cpp-{commit[:SHORT]}"


def is_current(source: Source) -> bool:
    """Whether the source is on disk as it was when it was checked."""
    if not source.fetched:
        return True  # `find` reads the submodule's state each time
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
        if source.folder.is_dir() and git_tree.folder_hash(source.folder) == source.tree:
            flush_folder(source.folder)  # whoever copied it may not have done so
        else:
            with artifacts.new_folder(source.folder, need=UNPACKED_BYTES) as made:
                _get(source, home, made, offline=offline)
        seconds = time.monotonic() - start
        git_tree.record(
            source.folder,
            _recipe(source),
            size=UNPACKED_BYTES,
            seconds=seconds,
            source={"type": "upstream", **to_builtins(source.upgrade)} if source.upgrade else None,
        )


def _get(source: Source, home: Home, made: Path, *, offline: bool) -> None:
    """Unpack it into the folder `made`. Raises PipelineError where its files are others."""
    if source.upgrade:
        tar = made.with_name(f"{made.name}.tar")
        with upstream.archive(source.upgrade, submodule(), tar, offline=offline) as archive:
            tree, origin = _unpack(archive, "", made), f"the archive of llama.cpp {source.upgrade}"
        hint = "another program may answer in GitHub's place; it was not used"
    else:
        archive = packages.fetch(pins().llama_cpp_archive, home, offline=offline)
        log.info(f"unpacking llama.cpp {source.commit[:SHORT]}")
        tree, origin = _unpack(archive, pins().llama_cpp_archive.folder, made), str(archive)
        hint = "correct the pins in pipeline/pins.toml"
    if tree != source.tree:
        raise PipelineError(
            f"{origin}: the tree hash of its files is {tree}, expected {source.tree}", hint
        )


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
    archive = None if source.upgrade else pins().llama_cpp_archive.sha256
    return {"step": "source", **source.recipe(), "archive": archive}


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
    commit, committed = _git(folder, "rev-parse", "HEAD", "HEAD^{tree}").split()
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
    status, output, error = git_tree.git(folder, *words)
    if status != 0:
        raise PipelineError(
            f"{folder}: `git {' '.join(words)}` fails there: {error.strip()}",
            "install or set up git, or empty the folder to use the pinned archive",
        )
    return output


def _unpack(archive: Path, inside: str, target: Path) -> str:
    """Unpack the files below `inside` into `target`, or below the one folder on top of all where
    that is empty; returns git's tree hash of them.

    Only plain files are taken, each under its own checked name, so that nothing in the archive
    can reach another place. Raises PipelineError.
    """
    import gzip  # slow to load, like tarfile, and seldom needed
    import tarfile
    import zlib

    blobs: dict[str, git_tree.Blob] = {}
    room = MOST_BYTES
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                inside = inside or member.name.partition("/")[0]
                folder, _, name = member.name.partition(inside + "/")
                if folder or not name or name == ".git" or not member.isreg():
                    continue
                if ".." in Path(name).parts or Path(name).is_absolute() or Path(name).drive:
                    raise PipelineError(f"{archive}: a file in it is named {member.name!r}")
                room -= member.size
                if room < 0:
                    raise PipelineError(f"{archive}: unpacks to more than {size(MOST_BYTES)}")
                content = tar.extractfile(member)
                data = content.read() if content else b""  # None for what is not a regular file
                path = target / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
                executable = bool(member.mode & 0o100)
                path.chmod(0o755 if executable else 0o644)
                mode = git_tree.PROGRAM if executable else git_tree.FILE
                blobs[name] = (mode, git_tree.blob(data))
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        reason = str(error).partition("\n")[0].rstrip(":")
        raise PipelineError(
            f"{archive.name}: is damaged or incomplete: {reason}",
            "run the same command again; if it stays so, see whether a proxy or a login page "
            "answers in GitHub's place",
        ) from None
    return git_tree.tree_hash(blobs)
