"""A CUDA toolkit out of NVIDIA's wheels, for machines that have the driver only."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from msgspec import Struct

from pipeline.bins import platform
from pipeline.bins.hardware.cuda_versions import DOWNLOAD_BYTES, ON_ARM, CudaRelease
from pipeline.core import packages, paths
from pipeline.core.errors import PipelineError
from pipeline.core.log import info
from pipeline.core.paths import Home
from pipeline.core.process import capture
from pipeline.core.store import artifacts, receipts
from pipeline.core.store.receipts import Recipe
from pipeline.core.text import size

INSTALLED_BYTES = 1_170_000_000 if ON_ARM else 1_100_000_000
STAMP = "toolkit"  # written last: a folder that has it is complete
NVCC_TIME = 1_000_000_000  # any, but always the same


class Toolkit(Struct, frozen=True, kw_only=True):
    """A toolkit that was made: `root` is what CMake calls CUDAToolkit_ROOT."""

    root: Path
    version: str
    major: int

    @property
    def nvcc(self) -> Path:
        return self.root / "bin" / "nvcc"


def recipe(release: CudaRelease) -> Recipe:
    """What the toolkit depends on."""
    return {
        "step": "cuda toolkit",
        "version": release.version,
        "requirements": hashlib.sha256(release.requirements.read_bytes()).hexdigest(),
        "platform": platform.platform_tag(),
    }


def place(home: Home, release: CudaRelease) -> Path:
    """Where it is, or would be, kept for all checkouts."""
    digest = hashlib.sha256(repr(sorted(recipe(release).items())).encode()).hexdigest()[:12]
    return paths.cache(home) / f"cuda-{release.version}-{digest}"


def toolkit(home: Home, release: CudaRelease) -> Toolkit:
    """The toolkit as it is, or would be."""
    root = place(home, release) / "nvidia" / f"cu{release.major}"
    return Toolkit(root=root, version=release.version, major=release.major)


def is_current(home: Home, release: CudaRelease) -> bool:
    """Whether it is complete."""
    entry = receipts.load(place(home, release)).get(STAMP)
    made = entry is not None and entry.recipe == recipe(release)
    return made and toolkit(home, release).nvcc.exists()


def make(
    release: CudaRelease, home: Home, *, offline: bool = False, force: bool = False
) -> Toolkit:
    """Install the toolkit, unless it is there already. Raises PipelineError."""
    target = place(home, release)
    paths.require_writable(target.parent)
    with artifacts.locked_folder(target):
        if force or not is_current(home, release):
            if offline:
                raise PipelineError(
                    f"CUDA {release.version} is not in {target}, and offline=1 forbids "
                    "downloading it",
                    "run once without offline=1",
                )
            need = DOWNLOAD_BYTES + INSTALLED_BYTES
            with artifacts.new_folder(target, need=need) as made:
                info(f"fetching CUDA {release.version} ({size(DOWNLOAD_BYTES)}, once)")
                _fill(made, release, home.logs / f"cuda-{release.version}.log")
    return toolkit(home, release)


def _fill(made: Path, release: CudaRelease, log: Path) -> None:
    packages.install(release.requirements, made, f"CUDA {release.version}", log)
    root = made / "nvidia" / f"cu{release.major}"
    add_names(root)
    answer = capture([root / "bin" / "nvcc", "--version"]) or "no answer"
    if f"release {release.version}," not in answer:
        raise PipelineError(
            f"the nvcc of NVIDIA's wheels does not run here: {answer}",
            "install the CUDA toolkit of your distribution or NVIDIA's",
        )
    # ccache knows a compiler by its size and time: what it holds is good for the next one as well.
    os.utime(root / "bin" / "nvcc", (NVCC_TIME, NVCC_TIME))
    stamp = made / STAMP
    stamp.write_text(f"{release.version}\n", encoding="utf-8")
    receipts.save(made, {STAMP: receipts.stamp(stamp, recipe(release), seconds=0)})


def add_names(root: Path) -> None:
    """The names without version that linkers look for, and `lib64`, which nvcc looks for.

    The links are relative: the folder is renamed once it is whole.
    """
    for library in sorted((root / "lib").glob("*.so.*")):
        (root / "lib" / f"{library.name.partition('.so.')[0]}.so").symlink_to(library.name)
    (root / "lib64").symlink_to("lib")


def clean(home: Home, release: CudaRelease) -> None:
    """Remove the toolkit."""
    artifacts.take_away(place(home, release))  # killed halfway, what is left passes for nothing


def forget(home: Home, release: CudaRelease) -> None:
    """Drop the toolkit's receipt."""
    receipts.invalidate(place(home, release) / STAMP)


def cmake_options(kit: Toolkit, driver: Path | None) -> tuple[str, ...]:
    """What makes CMake take this toolkit, and link with the driver's library where one is here:
    the wheels have no stub of it."""
    linked = (f"-DCUDA_cuda_driver_LIBRARY={driver}",) if driver else ()
    return (f"-DCUDAToolkit_ROOT={kit.root}", f"-DCMAKE_CUDA_COMPILER={kit.nvcc}", *linked)


def runtime_libraries(kit: Toolkit) -> tuple[Path, ...]:
    """What the built programs load: beside them, or by their run path. cuBLAS loads NVRTC."""
    names = [f"lib{name}.so.{kit.major}" for name in ("cudart", "cublas", "cublasLt", "nvrtc")]
    names.append(f"libnvrtc-builtins.so.{kit.version}")
    return tuple(kit.root / "lib" / name for name in names)
