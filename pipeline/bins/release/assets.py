"""The files of an upstream release, and which of them a platform and a backend need. No effects.

Names are read by their parts, because they change: `llama-b10605-bin-win-cuda-12.4-x64.zip`,
`llama-b7000-bin-ubuntu-vulkan-x64.tar.gz`, `cudart-llama-bin-win-cuda-12.4-x64.zip`. A name with a
part that is not known here is of no use here: it may mean another processor or library.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from msgspec import Struct

from pipeline.core.errors import PipelineError

SUFFIXES = (".tar.gz", ".tgz", ".tar", ".zip")  # the first is preferred
SYSTEMS = {
    "win": "windows",
    "windows": "windows",
    "ubuntu": "linux",
    "debian": "linux",
    "linux": "linux",
    "macos": "macos",
    "darwin": "macos",
}
MACHINES = {
    "x64": "x64",
    "x86_64": "x64",
    "amd64": "x64",
    "arm64": "arm64",
    "aarch64": "arm64",
    "s390x": "s390x",
}
KNOWN_BACKENDS = ("cpu", "cuda", "metal", "vulkan", "hip", "sycl")
BACKENDS = {name: name for name in KNOWN_BACKENDS} | {"cu": "cuda", "rocm": "hip"}
VARIANTS = ("", "radeon", "fp32", "fp16")  # the first is preferred

Version = tuple[int, ...]


class Asset(Struct, frozen=True, kw_only=True):
    """A file of a release: size in bytes, and the digest that upstream publishes."""

    name: str
    size: int
    digest: str
    url: str

    @property
    def sha256(self) -> str:
        """In hex. Raises PipelineError where nothing could prove the file's bytes."""
        if not self.digest:
            raise PipelineError(
                f"{self.name}: the release gives no digest for it, so it cannot be verified",
                "name a newer release (release=…), or build it: bins=build",
            )
        kind, _, value = self.digest.partition(":")
        if kind != "sha256" or not re.fullmatch(r"[0-9a-f]{64}", value):
            raise PipelineError(
                f"{self.name}: the release gives the digest {self.digest[:80]!r}, and only sha256 "
                "is known here",
                "name another release (release=…), or build it: bins=build",
            )
        return value


class Choice(Struct, frozen=True, kw_only=True):
    """The archive of the programs, and of the CUDA libraries that they need beside them."""

    programs: Asset
    runtime: Asset | None = None

    @property
    def assets(self) -> tuple[Asset, ...]:
        return (self.programs, self.runtime) if self.runtime else (self.programs,)


class AssetKind(Struct, frozen=True, kw_only=True):
    """What an archive's name says of it. `runtime`: CUDA's libraries, not llama.cpp's."""

    asset: Asset
    runtime: bool
    platform: str
    backend: str
    version: Version
    variant: str

    def serves(self, backend: str) -> bool:
        """macOS has one archive for the processor and the graphics card."""
        return backend == self.backend or (backend == "cpu" and self.backend == "metal")


class NoMatchError(PipelineError):
    """The release has nothing for the requested platform and backend."""


def kind(asset: Asset) -> AssetKind | None:
    """What the name says; None for what holds no programs that are known here."""
    suffix = next((end for end in SUFFIXES if asset.name.endswith(end)), None)
    head, separator, tail = asset.name.removesuffix(suffix or "").partition("-bin-")
    owner = head.partition("-")[0]
    if suffix is None or not separator or owner not in ("llama", "cudart"):
        return None
    systems, machines, backends, variants = set(), set(), set(), set()
    version: Version = ()
    before = ""
    for word in tail.split("-"):
        parts = re.fullmatch(r"(cuda|cu|rocm)?(\d{1,5}(?:\.\d{1,5}){0,3})", word, re.ASCII)
        if word in SYSTEMS:
            systems.add(SYSTEMS[word])
        elif word in MACHINES:
            machines.add(MACHINES[word])
        elif word in BACKENDS:
            backends.add(BACKENDS[word])
        elif word in VARIANTS:
            variants.add(word)
        elif parts and (parts[1] or before in BACKENDS):
            backends.add(BACKENDS[parts[1] or before])
            version = tuple(int(number) for number in parts[2].split("."))
        elif not (parts and before in SYSTEMS):  # the system's version makes no difference
            return None
        before = word
    if len(systems) != 1 or len(machines) != 1 or len(backends) > 1 or len(variants) > 1:
        return None
    system = systems.pop()
    return AssetKind(
        asset=asset,
        runtime=owner == "cudart",
        platform=f"{system}-{machines.pop()}",
        backend=backends.pop() if backends else "metal" if system == "macos" else "cpu",
        version=version,
        variant=variants.pop() if variants else "",
    )


def matching(
    assets: Sequence[Asset], platform: str, backend: str, driver_cuda: tuple[int, int] | None
) -> Choice:
    """The archives for a platform (`linux-x64`) and a backend.

    `driver_cuda` is the newest CUDA that the driver runs: the newest archive within it is taken,
    and the oldest where it is not known. Raises NoMatchError.
    """
    kinds = [candidate for asset in assets if (candidate := kind(asset))]
    ours = [candidate for candidate in kinds if candidate.platform == platform]
    fitting = [
        candidate for candidate in ours if not candidate.runtime and candidate.serves(backend)
    ]
    if not fitting:
        raise NoMatchError(_nothing(kinds, platform, backend), _instead(backend))
    if backend != "cuda":
        return Choice(programs=min(fitting, key=_rank).asset)
    best = _for_driver(fitting, driver_cuda)
    runtimes = [
        candidate for candidate in ours if candidate.runtime and candidate.version == best.version
    ]
    if not runtimes:
        raise NoMatchError(
            f"has {best.asset.name}, and no archive of the CUDA libraries that it needs",
            _instead(backend),
        )
    return Choice(programs=best.asset, runtime=min(runtimes, key=_rank).asset)


def _rank(kind: AssetKind) -> tuple[list[int], int, bool, str]:
    """The least is the best: the newest version, then the usual variant."""
    newest = [-number for number in kind.version]
    zipped = kind.asset.name.endswith(".zip")  # of two forms the one that keeps links
    return newest, VARIANTS.index(kind.variant), zipped, kind.asset.name


def _for_driver(kinds: Sequence[AssetKind], driver: tuple[int, int] | None) -> AssetKind:
    if driver is None:
        oldest = min(kind.version for kind in kinds)
        return min((kind for kind in kinds if kind.version == oldest), key=_rank)
    runnable = [kind for kind in kinds if kind.version[:2] <= driver]
    if not runnable:
        versions = sorted({kind.version for kind in kinds})
        raise NoMatchError(
            f"has archives for CUDA {', '.join(map(dotted, versions))}, and the driver here runs "
            f"CUDA {dotted(driver)} at most",
            f"update the NVIDIA driver, or {_instead('cuda')}",
        )
    return min(runnable, key=_rank)


def dotted(version: Version) -> str:
    """`12.4`."""
    return ".".join(map(str, version)) or "of unknown version"


def _nothing(kinds: Sequence[AssetKind], platform: str, backend: str) -> str:
    backends = sorted({kind.backend for kind in kinds if kind.platform == platform})
    if backends:
        return f"has no archive for {platform} with {backend}, only with {', '.join(backends)}"
    platforms = sorted({kind.platform for kind in kinds if not kind.runtime})
    return f"has no archive for {platform}, only for {', '.join(platforms) or 'nothing known here'}"


def _instead(backend: str) -> str:
    other = "another backend" if backend == "cpu" else "backend=cpu"
    return f"build it: bins=build; or take another release (release=…) or {other}"
