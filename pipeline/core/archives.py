"""Unpack an untrusted archive.

All members are checked (see `members`) before anything is written, and again while writing.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import IO

from .archive_formats import BLOCK, Members, damage_is_an_error, kind_of, members
from .members import Contents, Member, MemberKind, judge, refusal
from .process import WINDOWS
from .store.publish import remove, require_space

MOST_BYTES = 16_000_000_000
MOST_FILES = 20_000
CHANGED = "changed while the archive was read"


def unpack(
    archive: Path,
    target: Path,
    *,
    most_bytes: int = MOST_BYTES,
    most_files: int = MOST_FILES,
    strip_top: bool = False,
) -> list[Path]:
    """Unpack into `target`, which must not exist. Returns the sorted paths of all files and links.

    `strip_top` drops a single top-level folder. Files get mode 0755 if anybody may run them, else
    0644. Raises PipelineError for what is refused; after any error there is no `target`.
    """
    kind = kind_of(archive)
    with closing(members(archive, kind)) as stream:
        contents = judge(
            archive,
            (member for member, _ in stream),
            most_bytes=most_bytes,
            most_files=most_files,
            packed=archive.stat().st_size,
        )
    require_space(target.parent, contents.total())
    target.mkdir()
    try:
        top = contents.top() if strip_top else ""
        with closing(members(archive, kind)) as stream:
            return _write(archive, contents, stream, target, len(top))
    except BaseException:
        remove(target)
        raise


def _write(
    archive: Path, contents: Contents, packed: Members, target: Path, skip: int
) -> list[Path]:
    """Write everything, without the first `skip` letters of each path."""

    def place(path: str) -> Path:
        return target / path[skip:]

    target.chmod(0o755)
    for path in sorted(contents.folders):
        place(path).mkdir(exist_ok=path[skip:] == "")
        place(path).chmod(0o755)
    paths = {member: path for path, member in contents.files.items()}
    for member, stream in packed:
        if member.kind is MemberKind.FILE and stream:
            if member not in paths:
                raise refusal(archive, member.name, CHANGED)
            _write_file(archive, member, stream, place(paths.pop(member)))
    if paths:
        raise refusal(archive, next(iter(paths.values())), CHANGED)
    for path, (kind, end) in contents.links.items():
        if kind is MemberKind.SYMLINK and not WINDOWS:
            place(path).symlink_to(os.path.relpath(place(end), place(path).parent))
        else:  # on Windows creating links is a privilege
            shutil.copy(place(end), place(path))
    return sorted(place(path) for path in (*contents.files, *contents.links))


def _write_file(archive: Path, member: Member, stream: IO[bytes], path: Path) -> None:
    count = 0
    with path.open("xb") as file:
        for block in _blocks(archive, stream):
            count += len(block)
            if count > member.size:
                break
            file.write(block)
    if count != member.size:
        raise refusal(
            archive, member.name, f"does not have the {member.size} bytes that its header says"
        )
    path.chmod(0o755 if member.mode & 0o111 else 0o644)


def _blocks(archive: Path, stream: IO[bytes]) -> Iterator[bytes]:
    with damage_is_an_error(archive):
        while block := stream.read(BLOCK):
            yield block
