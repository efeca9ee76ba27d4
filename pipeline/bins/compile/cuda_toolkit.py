"""A CUDA toolkit out of NVIDIA's wheels, for machines that have the driver only."""

from __future__ import annotations

import os
from pathlib import Path

from msgspec import Struct

from pipeline.bins import platform
from pipeline.bins.hardware.cuda_versions import DOWNLOAD_BYTES, ON_ARM, CudaRelease
from pipeline.core.errors import PipelineError
from pipeline.core.packages import PackageFolder
from pipeline.core.paths import Home
from pipeline.core.process import capture

INSTALLED_BYTES = 1_170_000_000 if ON_ARM else 1_100_000_000
NVCC_TIME = 1_000_000_000  # any, but always the same


class Toolkit(Struct, frozen=True, kw_only=True):
    """A toolkit that was made: `root` is what CMake calls CUDAToolkit_ROOT."""

    root: Path
    version: str
    major: int

    @property
    def nvcc(self) -> Path:
        return self.root / "bin" / "nvcc"


def folder(home: Home, release: CudaRelease) -> PackageFolder:
    """The folder with the toolkit."""
    return PackageFolder(
        home=home,
        title="CUDA",
        name="cuda",
        version=release.version,
        requirements=release.requirements,
        depends={
            "step": "cuda toolkit",
            "version": release.version,
            "platform": platform.platform_tag(),
        },
        stamp="toolkit",
        program=f"nvidia/cu{release.major}/bin/nvcc",
        download=DOWNLOAD_BYTES,
        installed=INSTALLED_BYTES,
    )


def toolkit(home: Home, release: CudaRelease) -> Toolkit:
    """The toolkit as it is, or would be."""
    root = folder(home, release).path / "nvidia" / f"cu{release.major}"
    return Toolkit(root=root, version=release.version, major=release.major)


def make(
    release: CudaRelease, home: Home, *, offline: bool = False, force: bool = False
) -> Toolkit:
    """Install the toolkit, unless it is there already. Raises PipelineError."""

    def finish(made: Path) -> None:
        root = made / "nvidia" / f"cu{release.major}"
        add_names(root)
        nvcc = root / "bin" / "nvcc"
        answer = capture([nvcc, "--version"]) or "no answer"
        if f"release {release.version}," not in answer:
            raise PipelineError(
                f"the nvcc of NVIDIA's wheels does not run here: {answer}",
                "install the CUDA toolkit of your distribution or NVIDIA's",
            )
        # ccache knows a compiler by its size and time: what it holds stays good for the next one.
        os.utime(nvcc, (NVCC_TIME, NVCC_TIME))

    log = home.logs / f"cuda-{release.version}.log"
    folder(home, release).make(log, finish, offline=offline, force=force)
    return toolkit(home, release)


def add_names(root: Path) -> None:
    """The names without version that linkers look for, and `lib64`, which nvcc looks for.

    The links are relative: the folder is renamed once it is whole.
    """
    for library in sorted((root / "lib").glob("*.so.*")):
        (root / "lib" / f"{library.name.partition('.so.')[0]}.so").symlink_to(library.name)
    (root / "lib64").symlink_to("lib")


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
