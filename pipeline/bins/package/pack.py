"""Pack a published folder of programs for other machines, as `.tar.gz` and as `.zip`."""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import json
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from msgspec import Struct, to_builtins
from msgspec.structs import replace

from pipeline.bins.binaries import program_sha256
from pipeline.core import log, sbom
from pipeline.core.errors import PipelineError, doitw
from pipeline.core.paths import Home
from pipeline.core.statement import companions
from pipeline.core.store import artifacts, receipts
from pipeline.core.store.publish import publish_beside, remove
from pipeline.core.store.receipts import Recipe

from . import bill
from .manifest import MANIFEST, NAME, ListedFile, Manifest

FORMAT = 1  # counts up when the same members become other bytes
MEMBER_TIME, MEMBER_DATE = 315_532_800, (1980, 1, 1, 0, 0, 0)  # the first day that a zip can name
GZIP_LEVEL = 6


class PackedFile(Struct, frozen=True):
    """A file to pack: its own `text`, or what is in `file`. `link`: the neighbour it leads to."""

    size: int
    sha256: str
    mode: int = 0o644
    file: Path | None = None
    text: bytes = b""
    link: str = ""


Writer = Callable[[Path, Mapping[str, PackedFile]], None]


def write_tar_gz(archive: Path, members: Mapping[str, PackedFile]) -> None:
    """Write a `.tar.gz` without names of users or times: the same members give the same bytes."""
    with (
        archive.open("wb") as file,
        gzip.GzipFile("", "wb", GZIP_LEVEL, file, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for path, member in members.items():
            info = tarfile.TarInfo(path)
            info.mtime, info.mode, info.size = MEMBER_TIME, member.mode, member.size
            if member.link:
                info.type, info.linkname, info.size = tarfile.SYMTYPE, member.link, 0
            with _proven(path, member) as content:
                tar.addfile(info, content)


def write_zip(archive: Path, members: Mapping[str, PackedFile]) -> None:
    """Write a `.zip` as Unix writes them, so that modes and links are kept."""
    with zipfile.ZipFile(archive, "w") as packed:
        for path, member in members.items():
            info = zipfile.ZipInfo(path, MEMBER_DATE)
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


class Package(Struct, frozen=True, kw_only=True):
    """What to pack: a folder of programs, and what made it. Nothing is done yet."""

    folder: Path
    commit: str
    tree: str
    platform: str
    backend: str
    portable: bool
    home: Home
    license: Path | None = None
    made_by: Recipe = {}  # the recipe of the programs
    source: Path | None = None  # llama.cpp's, where they were compiled

    @property
    def stem(self) -> str:
        stem = f"{NAME}-{self.commit[:12]}-{self.platform}-{self.backend}"
        return stem if self.portable else f"{stem}-native"

    def archive(self, ending: str) -> Path:
        return self.home.bins / "packages" / (self.stem + ending)


def members(package: Package) -> dict[str, PackedFile]:
    """Every file of the package by its path, sorted; the manifest lists all others, and so does
    the bill of materials but for these two.

    Raises PipelineError where the folder holds no llama-server, or a link that leaves it.
    """
    files = {"README.md": _text(readme(package))}
    if package.license:
        files["LICENSE"] = _file(package, package.license.resolve())
    for path in package.folder.iterdir() if package.folder.is_dir() else ():
        if not path.name.startswith(".") and not path.is_dir():
            files[f"bin/{path.name}"] = _file(package, path)
    if not {"bin/llama-server", "bin/llama-server.exe"} & files.keys():
        raise PipelineError(
            f"{package.folder}: there is no llama-server in it to pack",
            f"build it: {doitw('build_bins')}",
        )
    manifest = Manifest(
        commit=package.commit,
        tree=package.tree,
        platform=package.platform,
        backend=package.backend,
        portable=package.portable,
        files=_listed(files),
    )
    files[sbom.NAME] = _text(bill.text(manifest, package.made_by, package.source))
    manifest = replace(manifest, files=_listed(files))
    files[MANIFEST] = _text(json.dumps(to_builtins(manifest), indent=1) + "\n")
    return dict(sorted(files.items()))


def _listed(files: Mapping[str, PackedFile]) -> dict[str, ListedFile]:
    return {path: ListedFile(each.sha256, each.size) for path, each in sorted(files.items())}


def readme(package: Package) -> str:
    """The text at the package's root."""
    cpu = (
        "It chooses the code for the processor at hand when it starts."
        if package.portable
        else "It was built for the very processor of the machine that built it."
    )
    windows = package.platform.startswith("windows")
    program = "bin\\llama-server.exe" if windows else "bin/llama-server"
    terms = ", see LICENSE" if package.license else ""
    tree = f" (tree `{package.tree}`)" if package.tree else ""
    return f"""# llama.cpp for {package.platform}, {package.backend}

Programs of llama.cpp, commit `{package.commit}`{tree}. {cpu}

Unpack it anywhere and run:

    {program} --model MODEL.gguf --host 127.0.0.1 --port 8080

The libraries beside the programs belong to them: move the folder as a whole.
`{MANIFEST}` holds the sha256 of every file.

llama.cpp is published by its authors under the MIT license{terms}.
"""


def recipe(files: Mapping[str, PackedFile]) -> Recipe:
    """Everything that the bytes of an archive depend on: the manifest names all the rest."""
    return {"step": "package", "format": FORMAT, "manifest": files[MANIFEST].sha256}


def make(package: Package, *, force: bool = False) -> list[Path]:
    """Write both archives, unless already done. Raises PipelineError."""
    files = members(package)
    need = sum(member.size for member in files.values())
    for ending, write in WRITERS.items():

        def maker(path: Path, ending: str = ending, write: Writer = write) -> None:
            log.info(f"packing {package.stem}{ending}")
            write(path, files)

        artifacts.make(
            package.archive(ending),
            recipe(files),
            maker,
            need=need,
            source={"type": "programs", "recipe": package.made_by},
            force=force,
        )
    place = package.archive(sbom.SUFFIX)
    if not place.is_file() or place.read_bytes() != files[sbom.NAME].text:
        publish_beside(place, files[sbom.NAME].text)
    return [package.archive(ending) for ending in WRITERS]


def clean(package: Package) -> None:
    """Remove both archives and their receipts, and what lies beside them."""
    for ending in WRITERS:
        for path in companions(package.archive(ending)):
            remove(path)
        remove(package.archive(ending))
    remove(package.archive(sbom.SUFFIX))
    forget(package)


def forget(package: Package) -> None:
    """Drop the receipts of both archives."""
    for ending in WRITERS:
        receipts.invalidate(package.archive(ending))


def _text(text: str) -> PackedFile:
    data = text.encode()
    return PackedFile(len(data), hashlib.sha256(data).hexdigest(), text=data)


def _file(package: Package, path: Path) -> PackedFile:
    link = _neighbour(path) if path.is_symlink() else ""
    mode = 0o755 if path.stat().st_mode & stat.S_IXUSR else 0o644
    digest = program_sha256(path, package.home)
    return PackedFile(path.stat().st_size, digest, mode, path, link=link)


def _neighbour(path: Path) -> str:
    """Where a link among libraries leads. Any other link would lead nowhere elsewhere."""
    link = path.readlink()
    if len(link.parts) != 1 or not (path.parent / link).is_file():
        raise PipelineError(
            f"{path}: is a link to {link}, which is not a file in the same folder",
            f"put a file in its place, or build again: {doitw('build_bins force=1')}",
        )
    return str(link)
