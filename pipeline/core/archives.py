"""Unpack an untrusted archive: a `.tar`, `.tar.gz`, `.tgz` or `.zip`.

The standard library reads them; what it would accept from a hostile archive is refused. All members
are checked (see `members`) before anything is written, and again while writing.
"""

from __future__ import annotations

import copy
import gzip
import io
import os
import posixpath
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO

from .errors import PipelineError
from .members import Contents, Member, MemberKind, judge, most_unpacked, refusal
from .paths import CHOSEN_BY
from .process import WINDOWS
from .store.publish import remove, require_space

CHANGED = "changed while the archive was read"

BLOCK = 128 * 1024
# Bytes: of all headers before one member of a tar, and of a zip's list of its members.
MOST_HEADERS, MOST_LIST = 64 * 1024, 4 * 1024 * 1024
MOST_GLOBAL = 100  # tar headers that hold for all members
MOST_LINK = 1024  # bytes that say where a link leads
UNLIMITED = 1 << 62
ENDINGS = {".tar": "tar", ".tar.gz": "tar.gz", ".tgz": "tar.gz", ".zip": "zip"}

Members = Generator[tuple[Member, IO[bytes] | None], None, None]


def unpack(archive: Path, target: Path, chosen_by: str = CHOSEN_BY) -> list[Path]:
    """Unpack into `target`, which must not exist; `chosen_by` says which variable sets its place.
    Returns the sorted paths of all files and links.

    Files get mode 0755 if anybody may run them, else 0644. Raises PipelineError for what is
    refused; after any error there is no `target`.
    """
    kind = kind_of(archive)
    with closing(members(archive, kind)) as stream:
        contents = judge(archive, (member for member, _ in stream), archive.stat().st_size)
    require_space(target.parent, contents.bytes, chosen_by)
    target.mkdir()
    try:
        with closing(members(archive, kind)) as stream:
            return _write(archive, contents, stream, target)
    except BaseException:
        remove(target)
        raise


def _write(archive: Path, contents: Contents, packed: Members, target: Path) -> list[Path]:
    target.chmod(0o755)
    for folder in (target / path for path in sorted(contents.folders)):
        folder.mkdir()
        folder.chmod(0o755)
    paths = {member: path for path, member in contents.files.items()}
    for member, stream in packed:
        if member.kind is MemberKind.FILE and stream:
            if member not in paths:
                raise refusal(archive, member.name, CHANGED)
            _write_file(archive, member, stream, target / paths.pop(member))
    if paths:
        raise refusal(archive, next(iter(paths.values())), CHANGED)
    for path, (kind, end) in contents.links.items():
        if kind is MemberKind.SYMLINK and not WINDOWS:
            (target / path).symlink_to(os.path.relpath(end, posixpath.dirname(path)))
        else:  # on Windows creating links is a privilege
            shutil.copy(target / end, target / path)
    return sorted(target / path for path in (*contents.files, *contents.links))


def _write_file(archive: Path, member: Member, stream: IO[bytes], path: Path) -> None:
    count = 0
    with _damage_is_an_error(archive), path.open("xb") as file:
        while count <= member.size and (block := stream.read(BLOCK)):
            count += len(block)
            file.write(block)
    if count != member.size:
        raise refusal(
            archive, member.name, f"does not have the {member.size} bytes that its header says"
        )
    path.chmod(0o755 if member.mode & 0o111 else 0o644)


def kind_of(archive: Path) -> str:
    """`tar`, `tar.gz` or `zip`, by its content; its name must say the same."""
    by_name = next((ENDINGS[end] for end in ENDINGS if archive.name.lower().endswith(end)), "")
    try:
        with archive.open("rb") as file:
            by_content = _kind_by_content(file.read(tarfile.BLOCKSIZE))
    except OSError as error:
        raise PipelineError(f"{archive}: cannot be read: {error.strerror}") from None
    if not by_content or by_content != by_name:
        unknown = "of no known format"
        raise PipelineError(
            f"{archive.name}: by its name it is {by_name or unknown}, by its content "
            f"{by_content or unknown}",
            f"known are {', '.join(ENDINGS)}; give it the right name",
        )
    return by_name


def _kind_by_content(head: bytes) -> str:
    if head.startswith(b"\x1f\x8b"):
        return "tar.gz"
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return "zip"
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return ""
    return "tar"


def members(archive: Path, kind: str) -> Members:
    """Each member and, of a file, its content: read it before you take the next member.

    Raises PipelineError where the archive is damaged.
    """
    raw = gzip.GzipFile(archive) if kind == "tar.gz" else io.FileIO(archive)
    with _damage_is_an_error(archive), raw, _Guarded(raw) as file:
        yield from _zip_members(file) if kind == "zip" else _tar_members(file)
        if kind == "tar.gz":
            file.left = most_unpacked(archive.stat().st_size)
            _read_to_end(file)


@contextmanager
def _damage_is_an_error(archive: Path) -> Iterator[None]:
    """Turn what the libraries raise for damaged archives into a PipelineError."""
    try:
        yield
    except (
        *(tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, struct.error),
        *(EOFError, ValueError, LookupError, ArithmeticError, RuntimeError),
    ) as error:
        raise PipelineError(
            f"{archive.name}: is damaged or cut short: {error}",
            "nothing of it was unpacked; download or copy it again",
        ) from None


class _Guarded(io.BufferedReader):
    """A file of which no more than `left` bytes can be read: headers say how long they are."""

    left = UNLIMITED
    last = b""

    def read(self, count: int | None = -1, /) -> bytes:
        if count is None or count < 0:
            count = self.left
        if count > self.left:
            raise EOFError(f"{count} more bytes would have to be read, which is too much")
        self.last = super().read(count)
        self.left -= len(self.last)
        return self.last

    def seek(self, to: int, whence: int = os.SEEK_SET, /) -> int:
        if whence == os.SEEK_SET and to < 0:  # not an error of the disk
            raise EOFError("it points to before its start")
        return super().seek(to, whence)


def _tar_members(file: _Guarded) -> Members:
    before = -1
    file.left = MOST_HEADERS
    with tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as tar:
        while info := tar.next():
            file.left = UNLIMITED
            tar.members.clear()  # type: ignore[attr-defined]  # or it keeps every header
            if info.offset <= before or len(tar.pax_headers) > MOST_GLOBAL:
                raise tarfile.ReadError("its headers make no sense")
            before = info.offset
            yield _tar_member(info), tar.extractfile(info) if info.isreg() else None
            file.left = MOST_HEADERS
    if file.last != bytes(tarfile.BLOCKSIZE):  # tarfile takes anything else for the end too
        raise tarfile.ReadError("the tar has no end, or something else in the middle")


def _tar_member(info: tarfile.TarInfo) -> Member:
    links = {tarfile.SYMTYPE: MemberKind.SYMLINK, tarfile.LNKTYPE: MemberKind.HARDLINK}
    odd = ""
    if info.isdev():
        odd = "is a device or a fifo"
    elif info.issparse():
        odd = "is a sparse file"
    elif not (info.isreg() or info.isdir() or info.type in links):
        odd = f"is not a file, folder or link (its type is {info.type!r})"
    return Member(
        name=info.name,
        kind=MemberKind.FOLDER if info.isdir() else links.get(info.type, MemberKind.FILE),
        size=info.size if info.isreg() else 0,
        mode=info.mode,
        link=info.linkname,
        odd=odd,
    )


def _read_to_end(file: _Guarded) -> None:
    """After a tar's end come padding and gzip's checksum. Garbage after those is fine."""
    try:
        while file.read(BLOCK):
            pass
    except gzip.BadGzipFile as error:
        if not str(error).startswith("Not a gzipped file"):
            raise


def _zip_members(file: _Guarded) -> Members:
    file.left = MOST_LIST
    with zipfile.ZipFile(file) as archive:
        file.left = UNLIMITED
        for info in archive.infolist():
            member = _zip_member(archive, info)
            if member.odd:
                yield member, None
                continue
            longer = copy.copy(info)
            longer.file_size += 1  # else a stream longer than stated is silently cut there
            with archive.open(longer) as stream:
                yield member, stream


def _zip_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Member:
    name, mode = info.orig_filename, info.external_attr >> 16  # `filename` ends at a NUL
    kind, odd, link = MemberKind.FILE, "", ""
    if info.flag_bits & 1:
        odd = "is encrypted"
    elif info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        odd = f"is packed by method {info.compress_type}; stored and deflated are known"
    elif stat.S_ISLNK(mode) and info.file_size > MOST_LINK:
        odd = "is a link with too long a target"
    elif stat.S_ISLNK(mode):
        kind, link = MemberKind.SYMLINK, archive.read(info).decode("utf-8", "surrogateescape")
    elif stat.S_ISDIR(mode) or name.endswith("/"):
        kind = MemberKind.FOLDER
        odd = "is a folder with content" if info.file_size else ""
    elif stat.S_IFMT(mode) not in (0, stat.S_IFREG):
        odd = "is a device, a fifo or a socket"
    return Member(name=name, kind=kind, size=info.file_size, mode=mode, link=link, odd=odd)
