"""Pinned archives, through the user's own pip: mirror, proxy and certificates as pip knows them."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from msgspec import Struct

from . import environment, network, paths
from .errors import PipelineError
from .log import info
from .pins import Archive
from .process import last_lines, run
from .store import artifacts, hashing, receipts
from .store.locks import only_one
from .store.publish import (
    disk_errors,
    part,
    publish_file,
    remove,
    require_disk,
    require_space,
)
from .store.receipts import Recipe
from .text import size

LONGEST = 7200.0  # seconds for pip or npm; CUDA's wheels, 800 MB, at 1 Mbit/s


def pip_environment() -> dict[str, str]:
    """pip with the user's own settings, also its index's password, but without its notices."""
    env = environment.without_credentials(os.environ, keep=["PIP_"])
    return env | {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}


def installed(name: str) -> str | None:
    """The version of the Python package that `import name` would find; None where there is none."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        return None
    # An installer writes it into a folder's name. importlib.metadata takes a tenth of a warm start.
    infos = Path(spec.origin).parents[1].glob(f"{name}-*.dist-info")
    return next((info.stem.removeprefix(f"{name}-") for info in infos), None)


def download_argv(archive: Archive, folder: Path) -> list[str]:
    """The pip command that puts the archive's file into `folder`.

    It reads `pinned.txt` in that folder: to get a source archive's metadata pip runs its code, so
    pip itself must check the sha256 first.
    """
    only = "--no-binary" if archive.kind == "sdist" else "--only-binary"
    return [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"),
        *(only, archive.package, "--dest", str(folder)),
        *("--requirement", str(folder / "pinned.txt")),
    ]


def _pip(argv: list[str], folder: Path, log: Path, **variables: str) -> int:
    """The exit status of a pip command that writes into `folder`. Raises PipelineError where the
    disk is full or fails."""
    status = run(argv, log=log, env=pip_environment() | variables, timeout=LONGEST)
    if status:
        require_disk(folder, last_lines(log))
    return status


class PackageFolder(Struct, frozen=True, kw_only=True):
    """Packages in a folder of the cache, which all checkouts share, for programs that run from
    there. The folder is complete, or it is not there.

    It depends on `requirements`, a file with hashes, and `depends`. `stamp` is the name of the file
    that is written last; without `program`, a path in the folder, it is not complete either. Sizes
    in bytes.
    """

    home: paths.Home
    title: str
    name: str
    version: str = ""
    requirements: Path
    depends: Mapping[str, Any]
    stamp: str
    program: str = ""
    download: int
    installed: int

    @property
    def recipe(self) -> Recipe:
        return {**self.depends, "requirements": hashing.sha256(self.requirements)}

    @property
    def path(self) -> Path:
        """Where the folder is, or would be."""
        return cache_folder(self.home, self.recipe, self.name, self.version)

    def is_current(self) -> bool:
        """Whether the folder is complete."""
        entry = receipts.load(self.path).get(self.stamp)
        is_made = entry is not None and entry.recipe == self.recipe
        return is_made and (self.path / self.program).exists()

    def make(
        self,
        log: Path,
        finish: Callable[[Path], None],
        *,
        use: str = "",
        instead: str = "",
        offline: bool = False,
        force: bool = False,
    ) -> None:
        """Install the packages, unless that is done; `finish` adds what the folder lacks, and tries
        it out. `use` and `instead`, in messages, are for what, and what does without. Raises
        PipelineError."""
        paths.require_writable(self.path.parent)
        with artifacts.locked_folder(self.path):
            if self.is_current() and not force:
                return
            label = f"{self.title} {self.version}".rstrip()
            if offline:
                raise PipelineError(
                    f"{label} is not in {self.path}, and offline=1 forbids downloading it",
                    "run once without offline=1",
                )
            with artifacts.new_folder(self.path, need=self.download + self.installed) as made:
                info(f"fetching {label} ({size(self.download)}, once){use}")
                try:
                    self._unpack(made, label, log)
                except PipelineError as error:
                    raise PipelineError(error.message, error.hint + instead) from None
                finish(made)
                stamp = made / self.stamp
                stamp.write_text(f"{self.version or 'complete'}\n", encoding="utf-8")
                entry = receipts.stamp(stamp, self.recipe, seconds=0)
                receipts.save(made, {self.stamp: entry})

    def _unpack(self, folder: Path, label: str, log: Path) -> None:
        """Unpack the packages into an empty folder, and nothing that they depend on."""
        temporary = folder / "tmp"
        temporary.mkdir(parents=True)
        argv = [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"),
            "--no-user",  # a target excludes `user = true` in pip's settings
            *("--only-binary", ":all:", "--require-hashes"),
            *("--target", str(folder), "--requirement", str(self.requirements)),
        ]
        # pip unpacks into the temporary folder before it moves: the system's may be small.
        if status := _pip(argv, folder, log, TMPDIR=str(temporary)):
            raise PipelineError(
                f"{label} could not be installed (pip ended with {status}):\n{last_lines(log, 5)}",
                "check the network, pip's settings (pip config list) and the free space in "
                f"{folder.parent}; the log is {log}{network.settings()}",
            )
        remove(temporary)

    def clean(self) -> None:
        """Remove the folder. Killed halfway, what is left of it does not pass for the whole."""
        artifacts.take_away(self.path)

    def forget(self) -> None:
        """Drop its receipt."""
        receipts.invalidate(self.path / self.stamp)


def cache_folder(home: paths.Home, recipe: Recipe, *names: str) -> Path:
    """The folder in the cache of what `recipe` makes; it begins with these names."""
    digest = hashlib.sha256(repr(sorted(recipe.items())).encode()).hexdigest()[:12]
    return paths.cache(home) / "-".join(filter(None, (*names, digest)))


def cached(archive: Archive, home: paths.Home) -> Path:
    """The archive's path in the cache, which all checkouts share."""
    return paths.cache(home) / "archives" / archive.sha256[:16] / archive.file


def keep(target: Path, sha256: str, make: Callable[[Path], None], *, offline: bool = False) -> Path:
    """`target` in the cache, made by `make(path)` unless it is there with this sha256.

    The cached file is hashed each time: this runs only when its content is about to be used.
    Raises PipelineError.
    """
    paths.require_writable(target.parent)
    with disk_errors(target.parent), only_one(target):
        if target.exists() and hashing.sha256(target) == sha256:
            return target
        if offline:
            raise PipelineError(
                f"{target.name}: is not in {target.parent}, and offline=1 forbids downloading it",
                "run once without offline=1, or put it there by hand",
            )
        made = part(target)
        make(made)
        publish_file(made, target)
    return target


def fetch(archive: Archive, home: paths.Home, *, offline: bool = False) -> Path:
    """The archive's file, downloaded unless the cache has it. Raises PipelineError."""

    def download(made: Path) -> None:
        require_space(made.parent, archive.size)
        info(f"fetching {archive.package} {archive.version}, {size(archive.size)}")
        log = home.logs / f"download-{archive.package}.log"
        folder = made.with_name(f"{made.name}.pip")
        remove(folder)  # left by a run that was killed
        folder.mkdir()
        pin = f"{archive.requirement} --hash=sha256:{archive.sha256}\n"
        (folder / "pinned.txt").write_text(pin, encoding="utf-8")
        try:
            status = _pip(download_argv(archive, folder), folder, log)
            got = folder / archive.file
            if status or not got.exists():
                raise PipelineError(
                    f"{archive.package} {archive.version} could not be downloaded "
                    f"(pip ended with {status}):\n{last_lines(log, 5)}",
                    f"check the network and pip's settings (pip config list); the log is {log}. Or "
                    f"put {archive.file} into {made.parent} by hand{network.settings()}",
                )
            digest = hashing.sha256(got)
            if digest != archive.sha256:
                raise PipelineError(
                    f"{archive.file}: sha256 is {digest}, the pinned one is {archive.sha256}",
                    "the package index sent another file than the pinned one; it was not used",
                )
            got.replace(made)
        finally:
            remove(folder)

    return keep(cached(archive, home), archive.sha256, download, offline=offline)
