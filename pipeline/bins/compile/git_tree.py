"""git's hash of a tree of files, computed without git: it proves whose files they are. The receipts
of folders that are such trees; and the program git, for a checkout.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.core.environment import without_credentials
from pipeline.core.process import outcome
from pipeline.core.store import receipts
from pipeline.core.store.publish import is_cut
from pipeline.core.store.receipts import Entry, Recipe

# A file's mode as git writes it, and the SHA-1 of its blob.
Blob = tuple[str, bytes]
FILE, PROGRAM, LINK = "100644", "100755", "120000"


def blob(data: bytes) -> bytes:
    """The SHA-1 that git gives to a file's content (git's identity, not a secret)."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).digest()


def tree_hash(blobs: Mapping[str, Blob]) -> str:
    """git's tree hash, in hex, of files given by their path with `/` between its parts."""
    entries: list[tuple[str, str, bytes]] = []
    folders: dict[str, dict[str, Blob]] = {}
    for path, (mode, digest) in blobs.items():
        name, slash, rest = path.partition("/")
        if slash:
            folders.setdefault(name, {})[rest] = (mode, digest)
        else:
            entries.append((name, mode, digest))
    for name, inside in folders.items():
        entries.append((name, "40000", bytes.fromhex(tree_hash(inside))))
    # git sorts a folder as though its name ended in a slash
    entries.sort(key=lambda entry: os.fsencode(entry[0] + "/" * (entry[1] == "40000")))
    data = b"".join(
        b"%s %s\0%s" % (mode.encode(), os.fsencode(name), digest) for name, mode, digest in entries
    )
    return hashlib.sha1(b"tree %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def files(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Every file below `folder`, a `.git` at its top left out."""
    waiting = [folder]
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    if entry.name != ".git":
                        waiting.append(Path(entry.path))
                elif entry.name != ".git":
                    yield entry


def folder_hash(folder: Path) -> str:
    """git's tree hash of all files below `folder`. Reads every byte."""
    blobs: dict[str, Blob] = {}
    for entry in files(folder):
        path = Path(entry.path)
        if entry.is_symlink():
            each = LINK, blob(os.fsencode(path.readlink()))
        else:
            mode = PROGRAM if entry.stat().st_mode & 0o100 else FILE
            each = mode, blob(path.read_bytes())
        blobs[path.relative_to(folder).as_posix()] = each
    return tree_hash(blobs)


def stamp(folder: Path) -> str:
    """A hash over name, size and time of every file: changes where any file may have changed."""
    lines = []
    for entry in files(folder):
        stat = entry.stat(follow_symlinks=False)
        lines.append(f"{entry.path[len(str(folder)) :]}\0{stat.st_size}\0{stat.st_mtime_ns}")
    return hashlib.sha256(os.fsencode("\n".join(sorted(lines)))).hexdigest()


def is_current(folder: Path, recipe: Recipe) -> bool:
    """Whether the folder is as `record` recorded it, made by this recipe."""
    entry = receipts.of(folder)
    return (
        entry is not None
        and entry.recipe == recipe
        and folder.is_dir()
        and not is_cut(folder)
        and entry.sha256 == stamp(folder)
    )


def record(
    folder: Path,
    recipe: Recipe,
    *,
    size: int,
    seconds: float,
    source: Mapping[str, Any] | None = None,
) -> None:
    """Write the receipt of the folder as a whole: its stamp stands for the files' hashes, which
    `recipe` or `source` has as the tree hash."""
    entry = Entry(
        recipe=recipe,
        source=source,
        size=size,
        mtime_ns=0,
        sha256=stamp(folder),
        made_at=receipts.now(),
        seconds=round(seconds, 1),
    )
    receipts.change(folder, entry)


def git(folder: Path, *words: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a git command in `folder`. It gets no credentials, nor the
    variables that name another repository, and writes nothing into this one."""
    clean = without_credentials(os.environ)
    env = {name: value for name, value in clean.items() if not name.startswith("GIT_")}
    command = ["git", "-C", str(folder), *words]
    return outcome(command, env=env | {"GIT_OPTIONAL_LOCKS": "0"})
