"""What a Vulkan build needs on Debian and its kin: headers that are new enough, Mesa's device.

Where the system's own headers are too old for llama.cpp (Debian 12), those of Debian 13 are
unpacked beside them, out of the mirror that this machine's apt already uses.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import debian
import pytest
from conftest import REPOSITORY

from pipeline.bins.hardware import detect
from pipeline.bins.hardware.requirements import LOWEST_VULKAN
from pipeline.core.paths import Home, cache
from pipeline.core.store.locks import only_one
from pipeline.core.store.publish import part, publish_folder, recover_folder, remove

SYSTEM = Path("/usr")
RUNTIME = ("libvulkan1", "mesa-vulkan-drivers", "vulkan-tools", "glslc")
DEVELOPMENT = ("libvulkan-dev", "spirv-headers")
HEADER = "include/vulkan/vulkan_core.h"
SPIRV = "share/cmake/SPIRV-Headers/SPIRV-HeadersConfig.cmake"


@dataclass(frozen=True)
class Software:
    """Mesa's device: its name, and the environment that makes llama.cpp take it.

    llama.cpp passes over devices that are processors, unless one is named by its number.
    """

    name: str
    env: dict[str, str]


@pytest.fixture(scope="session")
def vulkan_sdk() -> Path:
    """A folder for VULKAN_SDK. What is missing is installed or fetched; else tests are skipped."""
    own = Path(os.environ.get("VULKAN_SDK") or SYSTEM)
    for folder in (own, SYSTEM, sdk_folder()):
        if is_enough(folder) and not debian.missing(RUNTIME):
            return folder
    return provide()


@pytest.fixture(scope="session")
def software(vulkan_sdk: Path) -> Software:
    """The first Vulkan device that is a program."""
    found = detect.vulkan_devices(debian.asked("vulkaninfo", "--summary"))
    for number, device in enumerate(found):
        if device.kind == "CPU":
            return Software(device.name, {"GGML_VK_VISIBLE_DEVICES": str(number)})
    pytest.skip(f"no Vulkan device in software, only {[device.name for device in found]}")


def sdk_folder() -> Path:
    return cache(Home(REPOSITORY)) / "tests" / f"vulkan-sdk-{debian.SUITE}" / "usr"


def is_enough(folder: Path) -> bool:
    """Whether the headers are there and new enough, and a loader to link with."""
    header = folder / HEADER
    if not header.is_file() or not (folder / SPIRV).is_file():
        return False
    version = detect.vulkan_headers(header.read_text(encoding="utf-8"))
    loaders = [*folder.glob("lib/libvulkan.so"), *folder.glob("lib/*-linux-gnu/libvulkan.so")]
    return numbers(version) >= LOWEST_VULKAN and any(path.exists() for path in loaders)


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(word) for word in version.split(".") if word.isdecimal())


def provide() -> Path:
    """Everything from apt, where this machine has it and lets us."""
    debian.require(*RUNTIME)
    if os.geteuid() == 0 and numbers(candidate("libvulkan-dev")) >= LOWEST_VULKAN:
        debian.require(*DEVELOPMENT)
        if is_enough(SYSTEM):
            return SYSTEM
    target = sdk_folder().parent
    with only_one(target):
        recover_folder(target)
        if not is_enough(sdk_folder()):
            try:
                fetch(target)
            finally:
                remove(part(target))
    return sdk_folder()


def candidate(package: str) -> str:
    """The version that apt would install, or nothing."""
    lines = debian.asked("apt-cache", "policy", package).splitlines()
    return next((line.split()[1] for line in lines if "Candidate:" in line), "")


def fetch(target: Path) -> None:
    """Debian 13's headers, unpacked whole or not at all."""
    made = part(target)
    made.mkdir(parents=True)
    debian.fetch(DEVELOPMENT, made)
    # The loader of Debian 13 wants its C library; the one of this machine is what will be run.
    loader = made / "usr/lib/libvulkan.so"
    loader.unlink(missing_ok=True)
    told = debian.asked("dpkg-query", "-L", "libvulkan1").splitlines()
    loader.symlink_to(next(path for path in told if path.endswith("libvulkan.so.1")))
    publish_folder(made, target)
