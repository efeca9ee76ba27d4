"""The pins of `pipeline/pins.toml`, and the archives that they name."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

from msgspec import Struct, convert

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

    @property
    def requirement(self) -> str:
        """The package and its version, as pip names them."""
        return f"{self.package}=={self.version}"


class PinnedFile(Struct, frozen=True):
    """A file inside an archive."""

    size: int
    sha256: str


class PinnedModel(Struct, frozen=True, kw_only=True):
    """A model inside an archive. `precision` is its own type; `config` is what its config.json says
    of its size, to know what it takes before it is here."""

    name: str
    kind: Literal["gguf", "safetensors"]
    precision: str
    config: Mapping[str, Any]
    archive: Archive
    files: Mapping[str, PinnedFile]


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
    llama_cpp_texts: Mapping[str, Mapping[str, str]]  # by use: the documents with their sha256
    demos: Mapping[str, PinnedModel]  # by what model= says
    torch: str
    torch_index: str
    prebuilt: PinnedPrebuilt


@cache
def pins() -> Pins:
    """Read the pins, once."""
    data = tomllib.loads(PINS.read_text(encoding="utf-8"))
    prebuilt = data["prebuilt"]
    lines = (line.split("  ", 1) for line in prebuilt["files"].splitlines())
    prebuilt["files"] = {name: digest for digest, name in lines}
    llama_cpp = {f"llama_cpp_{key}": value for key, value in data["llama_cpp"].items()}
    values = {**data["converter"], **llama_cpp, "demos": data["demos"], "prebuilt": prebuilt}
    return convert(values, Pins)
