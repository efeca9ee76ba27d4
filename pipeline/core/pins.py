"""The pins of `pipeline/pins.toml`, and the archives that they name."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from msgspec import Struct

PINS = Path(__file__).resolve().parents[1] / "pins.toml"


class Archive(Struct, frozen=True, kw_only=True):
    """A package from which the files in `folder` are used; sizes in bytes."""

    package: str
    version: str
    kind: str  # "sdist" or "wheel"
    file: str
    folder: str
    sha256: str
    size: int


class PinnedFile(Struct, frozen=True):
    """A file inside an archive."""

    size: int
    sha256: str


class PinnedPrebuilt(Struct, frozen=True, kw_only=True):
    """Upstream's own programs: the default `release`, and one archive of it, which is the `file`
    inside a package: for which platform and backend, and the files in it with their sha256."""

    release: str
    platform: str
    backend: str
    file: str
    sha256: str
    size: int
    archive: Archive
    files: Mapping[str, str]


class Pins(Struct, frozen=True, kw_only=True):
    """Everything that is downloaded, by identity."""

    llama_cpp_commit: str
    llama_cpp_tree: str
    llama_cpp_archive: Archive
    demo_name: str
    demo_archive: Archive
    demo_files: Mapping[str, PinnedFile]
    torch: str
    torch_index: str
    prebuilt: PinnedPrebuilt


@cache
def pins() -> Pins:
    """Read the pins, once."""
    data: dict[str, Any] = tomllib.loads(PINS.read_text(encoding="utf-8"))
    llama_cpp, demo, converter = data["llama_cpp"], data["demo"], data["converter"]
    return Pins(
        llama_cpp_commit=llama_cpp["commit"],
        llama_cpp_tree=llama_cpp["tree"],
        llama_cpp_archive=Archive(**llama_cpp["archive"]),
        demo_name=demo["name"],
        demo_archive=Archive(**demo["archive"]),
        demo_files={name: PinnedFile(**file) for name, file in demo["files"].items()},
        torch=converter["torch"],
        torch_index=converter["torch_index"],
        prebuilt=_prebuilt(data["prebuilt"]),
    )


def _prebuilt(table: Mapping[str, Any]) -> PinnedPrebuilt:
    lines = [line.split("  ", 1) for line in table["files"].splitlines()]
    files = {name: digest for digest, name in lines}
    return PinnedPrebuilt(**{**table, "archive": Archive(**table["archive"]), "files": files})
