"""Which CUDA compiles for which card, runs with which driver, and comes as wheels."""

from __future__ import annotations

from pathlib import Path

from msgspec import Struct

from pipeline.bins import platform

# Toolkit's major version: the lowest compute capability it compiles for, and the lowest driver
# that runs what it made (NVIDIA's release notes of CUDA, "minor version compatibility").
LOWEST_CAPABILITY = {11: (3, 5), 12: (5, 0), 13: (7, 5)}
LOWEST_DRIVER = {11: 450, 12: 525, 13: 580}
# The first toolkit that knows a capability.
FIRST_TOOLKIT: dict[tuple[int, ...], tuple[int, int]] = {
    (8, 0): (11, 0),
    (8, 6): (11, 1),
    (8, 7): (11, 4),
    (8, 9): (11, 8),
    (9, 0): (11, 8),
    (10, 0): (12, 8),
    (12, 0): (12, 8),
    (10, 3): (12, 9),
    (12, 1): (12, 9),
    (11, 0): (13, 0),
}
# NVIDIA's wheels: where they run, and what fetching them takes.
PLATFORMS = ("linux-x64", "linux-arm64")
ON_ARM = platform.platform_tag() == "linux-arm64"
DOWNLOAD_BYTES = 721_000_000 if ON_ARM else 620_000_000


class CudaRelease(Struct, frozen=True, kw_only=True):
    """A release of CUDA whose wheels are pinned."""

    version: str
    requirements: Path

    @property
    def major(self) -> int:
        return numbers(self.version)[0]


# There is none of CUDA 12: its nvidia-cuda-nvcc-cu12 has ptxas and libnvvm, but no nvcc, cicc,
# cudafe++ and fatbinary.
CUDA_13 = CudaRelease(
    version="13.4", requirements=Path(__file__).with_name("cuda13-requirements.txt")
)


def newest(driver: str) -> tuple[int, int] | None:
    """The newest CUDA whose programs a driver runs: every minor version of a major one; None where
    the driver is not known."""
    number = (numbers(driver) or (0,))[0]
    majors = [major for major, lowest in LOWEST_DRIVER.items() if number >= lowest]
    return (max(majors), 99) if majors else None


def unavailable_reason(driver: str, platform_tag: str) -> str:
    """Why the wheels are of no use there; empty where they are.

    No `driver` means a build for another machine.
    """
    if platform_tag not in PLATFORMS:
        return f"NVIDIA's wheels are for {' and '.join(PLATFORMS)}; this is {platform_tag}"
    lowest = LOWEST_DRIVER[CUDA_13.major]
    if driver and numbers(driver) < (lowest,):
        return (
            f"NVIDIA's wheels with a compiler are of CUDA {CUDA_13.version}, which needs driver "
            f"{lowest} or newer; {driver} is here"
        )
    return ""


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(word) for word in version.split(".") if word.isdecimal())


def dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
