"""Which members of an archive may be unpacked, and where. Nothing is read or written here.

The rules are those of every system at once, so that an archive means the same on each.
"""

from __future__ import annotations

import posixpath
import unicodedata
from collections.abc import Iterable
from enum import Enum
from pathlib import Path

from msgspec import Struct

from .errors import PipelineError
from .paths import is_windows_device
from .text import size

MOST_BYTES = 16_000_000_000
MOST_FILES = 20_000  # and folders
RATIO = 100  # programs compress to a third or a fifth
RATIO_FROM = 64_000_000  # bytes; what unpacks to less is never a bomb
LONGEST_PART, LONGEST_PATH = 255, 1024  # bytes
MOST_LINKS = 40  # one after the other, as Linux follows them
FORBIDDEN = frozenset('\\:*?"<>|')


class MemberKind(Enum):
    FILE = "file"
    FOLDER = "folder"
    SYMLINK = "symbolic link"
    HARDLINK = "hard link"


class Member(Struct, frozen=True, kw_only=True):
    """A member as the archive describes it. `odd` says why no archive may have such a member."""

    name: str
    kind: MemberKind
    size: int = 0
    mode: int = 0
    link: str = ""
    odd: str = ""


def most_unpacked(packed: int) -> int:
    """The most bytes that an archive of `packed` bytes may unpack to."""
    return RATIO_FROM + RATIO * packed


class _RefusedError(Exception):
    """Why a member is refused."""


def refusal(archive: Path, name: str, why: str) -> PipelineError:
    """The error for the member `name`, which may be hostile or very long itself."""
    shown = repr(name) if len(name) <= 120 else f"{name[:120]!r}…"
    return PipelineError(
        f"{archive.name}: {shown} {why}",
        "nothing of it was unpacked; use an archive from a source that you trust",
    )


def judge(archive: Path, members: Iterable[Member], packed: int) -> Contents:
    """What to unpack of an archive of `packed` bytes. Raises PipelineError for what is refused.

    Stops at the first such member, so that `members` need not be read to their end.
    """
    contents, name = Contents(packed), ""
    try:
        for member in members:
            name = member.name
            contents.add(member)
        for name in contents.leads:
            contents.follow(name)
    except _RefusedError as why:
        raise refusal(archive, name, str(why)) from None
    if not contents.files:
        raise PipelineError(f"{archive.name}: contains no files")
    return contents


def path_of(name: str) -> str:
    """The path of a member in the tree, "" for the top itself."""
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name):
        raise _RefusedError("has control characters or bytes that are not UTF-8 in its name")
    if name.startswith(("/", "\\")) or name[1:2] == ":":
        raise _RefusedError("is an absolute path")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    for part in parts:
        _check_part(part)
    path = "/".join(parts)
    if len(path.encode()) > LONGEST_PATH:
        raise _RefusedError(f"is longer than {LONGEST_PATH} bytes")
    return path


def _check_part(part: str) -> None:
    if part == "..":
        raise _RefusedError("leads out of the archive with ..")
    if forbidden := sorted(FORBIDDEN & set(part)):
        raise _RefusedError(f"has {' '.join(forbidden)} in its name, which Windows does not allow")
    if part.endswith((".", " ")):
        raise _RefusedError("has a name that ends in a dot or a space; Windows drops them")
    if is_windows_device(part):
        raise _RefusedError(f"has the name of a Windows device ({part})")
    if len(part.encode()) > LONGEST_PART:
        raise _RefusedError(f"has a name longer than {LONGEST_PART} bytes")


class Contents:
    """What is unpacked, by path. `links` maps each link to the file that it leads to."""

    def __init__(self, packed: int) -> None:
        self.files: dict[str, Member] = {}
        self.links: dict[str, tuple[MemberKind, str]] = {}
        self.folders: set[str] = set()
        self.leads: dict[str, Member] = {}  # the links, before it is known where they end
        self._packed = packed  # bytes of the archive
        self._named: set[str] = set()
        self._spelled: dict[str, str] = {}  # as a disk that ignores letter case sees it
        self.bytes = 0  # that they take on a disk, where links may be copies

    def add(self, member: Member) -> None:
        if member.odd:
            raise _RefusedError(member.odd)
        path = path_of(member.name)
        if not path:
            if member.kind is MemberKind.FOLDER:
                return
            raise _RefusedError("has no name")
        if member.kind is not MemberKind.FOLDER and member.mode & 0o6000:
            raise _RefusedError("has its setuid or setgid bit set")
        self._place(path, member.kind)
        if member.kind is MemberKind.FILE:
            self._weigh(member.size)
            self.files[path] = member
        elif member.kind is not MemberKind.FOLDER:
            self.leads[path] = member

    def _place(self, path: str, kind: MemberKind) -> None:
        """Take the path: no two members have the same, and none is inside a file or a link."""
        parts = path.split("/")
        for depth in range(1, len(parts)):
            above = "/".join(parts[:depth])
            self._spell(above)
            if above in self.files or above in self.leads:
                raise _RefusedError(f"is inside {above!r}, which is not a folder")
            self.folders.add(above)
        self._spell(path)
        if path in self._named:
            raise _RefusedError("is in the archive twice")
        self._named.add(path)
        if kind is MemberKind.FOLDER:
            self.folders.add(path)
        elif path in self.folders:
            raise _RefusedError("is also a folder")

    def _spell(self, path: str) -> None:
        folded = unicodedata.normalize("NFC", path).casefold()
        known = self._spelled.setdefault(unicodedata.normalize("NFC", folded), path)
        if known != path:
            raise _RefusedError(f"and {known!r} are the same name where letter case does not count")
        if len(self._spelled) > MOST_FILES:
            raise _RefusedError(f"is one more than the {MOST_FILES} files that are allowed")

    def _weigh(self, count: int) -> None:
        self.bytes += count
        if count < 0 or self.bytes > MOST_BYTES:
            raise _RefusedError(
                f"makes it {size(self.bytes)} in total; allowed are {size(MOST_BYTES)}"
            )
        if self.bytes > most_unpacked(self._packed):
            raise _RefusedError(
                f"makes it {size(self.bytes)} out of an archive of {size(self._packed)}: "
                f"more than {RATIO} to 1"
            )

    def follow(self, path: str) -> None:
        """Lead a link to its file. Links end at files, so a folder is never one in disguise."""
        end = path
        for _ in range(MOST_LINKS):
            end = _next(end, self.leads[end])
            if end in self.files:
                self._weigh(self.files[end].size)
                self.links[path] = (self.leads[path].kind, end)
                return
            if end not in self.leads:
                raise _RefusedError(
                    f"is a link to {end[:120]!r}, which is not a file in the archive"
                )
        raise _RefusedError("is a link that leads only to more links")


def _next(path: str, member: Member) -> str:
    """Where a link leads: from its own folder, a hard link from the top."""
    place = posixpath.dirname(path) if member.kind is MemberKind.SYMLINK else ""
    end = posixpath.normpath(posixpath.join(place, member.link))
    if end == ".." or end.startswith(("/", "../")):
        raise _RefusedError(f"is a link that leads out of the archive, to {member.link[:120]!r}")
    return "" if end == "." else end
