"""`manifest.json` of a package: what `pack` writes, and what `install` checks in anybody's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from msgspec import Meta, Struct, json

from pipeline.bins.build_options import TAG
from pipeline.core import log
from pipeline.core.errors import PipelineError

MANIFEST = "manifest.json"
NAME = "llama-cpp"
SCHEMA = 1
MOST_BYTES = 4_000_000
HINT = "nothing of it was installed; get the complete archive again"


class ListedFile(Struct, frozen=True):
    """A file of the package, but for the manifest itself; size in bytes."""

    sha256: str
    size: int


class Manifest(Struct, frozen=True, kw_only=True):
    """Fields that another program's manifest may lack have a default."""

    schema: int = SCHEMA
    name: str = NAME
    commit: Annotated[str, Meta(pattern=rf"(?a)\A(?:{TAG})\Z")]
    tree: str = ""
    platform: str = ""
    backend: str = ""
    portable: bool = False
    files: dict[str, ListedFile]


def check(archive: Path, made: Path, digests: Mapping[Path, str]) -> str:
    """The commit that the manifest names, once every file proved to be as it says; without a
    manifest "". `digests` is the sha256 of every file unpacked into `made`.
    """
    path = made / MANIFEST
    if path not in digests:
        log.info(f"{archive.name}: has no {MANIFEST}, so its files are taken as they are")
        return ""
    try:
        manifest = _read(path)
    except (ValueError, RecursionError) as error:
        raise PipelineError(
            f"{archive.name}: its {MANIFEST} cannot be read: {str(error)[:200]}", HINT
        ) from None
    files = {
        file.relative_to(made).as_posix(): ListedFile(digest, file.stat().st_size)
        for file, digest in digests.items()
        if file != path
    }
    for name in sorted(manifest.files.keys() | files.keys()):
        if manifest.files.get(name) != files.get(name):
            why = "is not in the archive" if name not in files else "is not the file listed"
            why = "is not listed" if name not in manifest.files else why
            raise PipelineError(f"{archive.name}: {name[:120]!r} {why} in its {MANIFEST}", HINT)
    return manifest.commit


def _read(path: Path) -> Manifest:
    """Raises ValueError, RecursionError."""
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"it is larger than {MOST_BYTES} bytes")
    manifest = json.decode(path.read_bytes(), type=Manifest)
    if manifest.schema != SCHEMA:
        raise ValueError(f"schema {manifest.schema}, this version reads {SCHEMA}")
    return manifest
