"""Files become an archive: the same bytes for the same files, whoever packs them and when."""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pipeline.core.errors import PipelineError

FORMAT = 1  # counts up when the same members become other bytes
TIME, DATE = 315_532_800, (1980, 1, 1, 0, 0, 0)  # the first day that a zip can name
LEVEL = 6


@dataclass(frozen=True, slots=True)
class PackedFile:
    """A file to pack: its own `text`, or what is in `file`. `link`: the neighbour it leads to."""

    size: int
    sha256: str
    mode: int = 0o644
    file: Path | None = None
    text: bytes = b""
    link: str = ""


Writer = Callable[[Path, Mapping[str, PackedFile]], None]


def write_tar_gz(archive: Path, members: Mapping[str, PackedFile]) -> None:
    """Write a `.tar.gz` with neither names nor times of its own."""
    with (
        archive.open("wb") as file,
        gzip.GzipFile("", "wb", LEVEL, file, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for path, member in members.items():
            info = tarfile.TarInfo(path)
            info.mtime, info.mode, info.size = TIME, member.mode, member.size
            if member.link:
                info.type, info.linkname, info.size = tarfile.SYMTYPE, member.link, 0
            with _proven(path, member) as content:
                tar.addfile(info, content)


def write_zip(archive: Path, members: Mapping[str, PackedFile]) -> None:
    """Write a `.zip` as Unix writes them, so that modes and links are kept."""
    with zipfile.ZipFile(archive, "w") as packed:
        for path, member in members.items():
            info = zipfile.ZipInfo(path, DATE)
            info.create_system = 3
            info.compress_type = zipfile.ZIP_DEFLATED
            info.file_size = member.size  # decides whether its header has room for a large one
            kind = stat.S_IFLNK if member.link else stat.S_IFREG
            info.external_attr = (kind | member.mode) << 16
            with _proven(path, member) as content, packed.open(info, "w") as into:
                if member.link:
                    into.write(member.link.encode())
                    continue
                while block := content.read(256 * 1024):
                    into.write(block)


WRITERS: Mapping[str, Writer] = {".tar.gz": write_tar_gz, ".zip": write_zip}


class _Hashed(io.BufferedReader):
    """A file that is hashed as it is read."""

    def __init__(self, raw: io.RawIOBase) -> None:
        super().__init__(raw)
        self.digest = hashlib.sha256()

    def read(self, count: int | None = -1, /) -> bytes:
        data = super().read(count)
        self.digest.update(data)
        return data


@contextmanager
def _proven(path: str, member: PackedFile) -> Iterator[IO[bytes]]:
    """The content of a member; what was read of it must be what was hashed before."""
    if member.link or not member.file:
        yield io.BytesIO(member.text)
        return
    changed = PipelineError(
        f"{member.file}: changed while it was packed as {path}", "run the same command again"
    )
    try:
        with _Hashed(io.FileIO(member.file)) as file:
            yield file
            if file.read(1) or file.digest.hexdigest() != member.sha256:
                raise changed
    except OSError as error:
        if error.errno not in (None, errno.ENOENT):  # None: it is shorter than it was
            raise
        raise changed from None
