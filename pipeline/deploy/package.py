"""llama.cpp's programs in a container: install a package, and keep a copy of it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.bins.package import install
from pipeline.core import log
from pipeline.core.errors import UsageError
from pipeline.core.paths import Home
from pipeline.core.store import stat_cache
from pipeline.core.store.locks import only_one
from pipeline.core.store.publish import disk_errors, part, publish_file

SOFT = Path("/soft/app")  # where a PeiDocker image keeps applications
# There, these commands are linked beside the programs, as NAME.sh.
COMMANDS = (
    *("get-llama-cpp-pkg", "install-llama-cpp-pkg"),
    *("check-and-run-llama-cpp", "check-and-run-vllm"),
)
ON_PATH = Path("/usr/local/bin")


def get(archive: Path, home: Home, soft: Path = SOFT) -> None:
    """Install the package. Raises PipelineError; then the previous one stays in place."""
    if soft.is_dir():
        place = soft / "llama-cpp"
        with _without_links(place):
            manifest = install.install(_cached(archive, soft / "cache"), place, home=home)
    else:
        place = install.default_target(home)
        manifest = install.install(archive, place, home=home)
    log.info(f"llama.cpp {manifest.version.removeprefix('version: ')} is installed in {place}")


@contextmanager
def _without_links(place: Path) -> Iterator[None]:
    """Keep the commands' links out of the folder while it is replaced as a whole."""
    links = {place / f"{name}.sh": ON_PATH / name for name in COMMANDS}
    for link in links:
        if link.is_symlink():
            link.unlink()
    try:
        yield
    finally:
        for link, command in links.items():
            if command.exists() and not link.exists():
                place.mkdir(exist_ok=True)
                link.symlink_to(command)


def _cached(archive: Path, folder: Path) -> Path:
    """A copy of the archive, for when it is no longer mounted. Raises UsageError without either."""
    copy = folder / archive.name
    if not archive.is_file():
        if copy.is_file():
            log.info(f"{archive} does not exist; using {copy}")
            return copy
        raise UsageError(f"{archive}: there is no such file", "name the archive of a package")
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with only_one(copy):
            if not copy.is_file() or stat_cache.stamp(copy) != stat_cache.stamp(archive):
                made = part(copy)
                shutil.copy2(archive, made)
                publish_file(made, copy)
    return copy
