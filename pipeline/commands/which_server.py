"""Which llama-server a configuration runs, where that is not simply the one in `bins/`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.bins.binaries import program_file
from pipeline.bins.package import install
from pipeline.core.paths import Home
from pipeline.core.store import stat_cache
from pipeline.serve import flags
from pipeline.serve.flags import Flag

from .programs import Programs

if TYPE_CHECKING:
    from pipeline.serve.config.configuration import Configuration

# Where an image keeps llama.cpp's programs.
IN_IMAGES = (
    Path("/soft/app/llama-cpp/bin"),
    Path("/hard/volume/workspace/llama-cpp/build/bin"),
)


def elsewhere(configuration: Configuration, programs: Programs) -> Path | None:
    """The one that the file names, that of LLAMA_SERVER_BINS_DIR, that of an installed package, or,
    where none is in `bins/`, that on PATH. Raises UsageError."""
    from pipeline.serve.config.instances import program

    name = program_file("llama-server")
    if named := program(configuration, None):
        return named
    if programs.are_external:
        return programs.binaries.program("llama-server")
    for folder in (*IN_IMAGES, install.default_target(programs.home) / "bin"):
        if (folder / name).is_file():
            return folder / name
    on_path = None if programs.binaries.has("llama-server") else shutil.which(name)
    return Path(on_path) if on_path else None


def options(server: Path, home: Home) -> Mapping[str, Flag] | None:
    """What its --help lists; None where it is no program. Raises PipelineError."""
    if not (server.is_file() and os.access(server, os.X_OK)):
        return None
    sha256 = stat_cache.identity(home.run / "programs.json", server)
    return flags.read(server, sha256, home.run / "flags")
