"""What each backend needs, and what of it this machine is missing."""

from __future__ import annotations

from collections.abc import Callable

from msgspec import Struct

from pipeline.core.text import size

from . import cuda_versions
from .cuda_versions import (
    FIRST_TOOLKIT,
    LOWEST_CAPABILITY,
    LOWEST_DRIVER,
    CudaRelease,
    dotted,
    numbers,
)
from .detect import AMD, INTEL, NVIDIA, Host

# VK_EXT_layer_settings came into the headers with 1.3.272 (KhronosGroup/Vulkan-Utility-Libraries
# pull request 167). Measured: 1.3.239 fails, 1.4.309 compiles.
LOWEST_VULKAN = (1, 3, 272)

USABLE, MISSING = "usable", "missing"
# Kinds: running needs the device, compiling the rest. Another toolkit may do instead.
DEVICE, TOOLKIT, TOOL = "device", "toolkit", "tool"


class Missing(Struct, frozen=True):
    """A missing item, and the key in PACKAGES of what provides it; empty: nothing does."""

    what: str
    package: str = ""
    kind: str = TOOL


class Report(Struct, frozen=True, kw_only=True):
    """Whether a backend can be built and run here. `has_card`: a card for it is present, working
    or not; `software`: the only device is a software renderer."""

    backend: str
    missing: tuple[Missing, ...] = ()
    notes: tuple[str, ...] = ()
    has_card: bool = False
    software: bool = False

    @property
    def state(self) -> str:
        return MISSING if self.missing else USABLE

    def of(self, *kinds: str) -> tuple[Missing, ...]:
        """The missing items of these kinds."""
        return tuple(item for item in self.missing if item.kind in kinds)


# What is missing, and notes.
Finding = tuple[list[Missing], list[str]]


def reports(host: Host) -> list[Report]:
    """One for each backend, in the order in which `auto` prefers them."""
    found = {name: check(host) for name, check in CHECKS.items()}
    return [
        Report(
            backend=name,
            missing=tuple(missing),
            notes=tuple(notes),
            has_card=has_card(name, host),
            software=name == "vulkan" and is_software(host),
        )
        for name, (missing, notes) in found.items()
    ]


def has_card(name: str, host: Host) -> bool:
    """Whether there is a card for the backend, working or not."""
    hardware = [device for device in host.vulkan if device.kind != "CPU"]
    return {
        "cuda": has_nvidia_card(host),
        "metal": host.system == "macos",
        "hip": bool(host.amd or AMD in host.vendors),
        "sycl": bool(host.intel or INTEL in host.vendors),
        "vulkan": bool(hardware or host.vendors & {NVIDIA, AMD, INTEL}),
        "cpu": True,
    }[name]


def is_software(host: Host) -> bool:
    """Whether Vulkan has devices, and all of them are programs."""
    return bool(host.vulkan) and all(device.kind == "CPU" for device in host.vulkan)


def compiler(host: Host) -> list[Missing]:
    """CXX, where it is set, else the first of the usual names: CMake takes no other either."""
    if host.cxx:
        unusable = f"the C++ compiler that CXX names ({host.cxx}) does not answer"
        return [] if "CXX" in host.tools else [Missing(unusable, "compiler")]
    if any(name in host.tools for name in ("c++", "g++", "clang++", "cl")):
        return []
    return [Missing("a C++ compiler", "compiler")]


def cpu(host: Host) -> Finding:
    notes = []
    if host.rosetta:
        notes.append("Python runs under Rosetta: use an arm64 Python for an arm64 build")
    return compiler(host), notes


def cuda(host: Host) -> Finding:
    if not has_nvidia_card(host) and "nvcc" not in host.tools:
        return missing_nvidia_card(host), []  # where there is no card, no toolkit is missed
    missing, notes = missing_toolkit(host)
    if missing and (release := wheels(host)):
        parts = " and ".join(item.what for item in missing)
        fetched = f"{size(cuda_versions.DOWNLOAD_BYTES)}, once"
        notes.append(
            f"without {parts} NVIDIA's wheels of CUDA {release.version} are taken ({fetched})"
        )
        missing = []
    return [*missing_nvidia_card(host), *missing, *compiler(host)], notes


def wheels(host: Host) -> CudaRelease | None:
    """The release of NVIDIA's wheels for this system, its driver and its cards."""
    release = cuda_versions.CUDA_13
    unavailable = cuda_versions.unavailable_reason(driver(host), f"{host.system}-{host.machine}")
    if host.jetson or unavailable or missing_for_version(host, numbers(release.version))[0]:
        return None
    return release


def no_wheels(host: Host) -> list[Missing]:
    """The hint that NVIDIA's wheels would do instead of a toolkit, were the driver newer."""
    platform = f"{host.system}-{host.machine}"
    lowest = LOWEST_DRIVER[cuda_versions.CUDA_13.major]
    if (
        host.jetson
        or cuda_versions.unavailable_reason("", platform)
        or not cuda_versions.unavailable_reason(driver(host), platform)
    ):
        return []
    what = f"or driver {lowest} or newer for NVIDIA's wheels instead; {driver(host)} is here"
    return [Missing(what, "nvidia driver", TOOLKIT)]


def driver(host: Host) -> str:
    """The version of NVIDIA's driver; empty where no card is."""
    return host.nvidia[0].driver if host.nvidia else ""


def metal(host: Host) -> Finding:
    if host.system != "macos":
        return [Missing("macOS", "", DEVICE)], []
    missing = [] if host.xcode else [Missing("the Xcode command line tools", "xcode")]
    if host.apple and not any("Metal" in unit or "Apple" in unit for unit in host.apple):
        missing.append(Missing("a GPU that supports Metal", "", DEVICE))
    notes = ["Python runs under Rosetta: use an arm64 Python"] if host.rosetta else []
    return [*missing, *compiler(host)], notes


def hip(host: Host) -> Finding:
    if not host.amd and AMD not in host.vendors and "hipcc" not in host.tools:
        return [Missing("an AMD card", "", DEVICE)], []
    missing = []
    if not host.amd:
        driverless = AMD in host.vendors
        fault = host.problems.get("rocminfo", "")
        driver = "AMD's compute driver (amdgpu, /dev/kfd) for the card"
        what = driver if driverless else "an AMD card"
        what = f"{what}; rocminfo: {fault}" if fault else what
        missing.append(Missing(what, "rocm" if driverless else "", DEVICE))
    if "hipcc" not in host.tools:
        missing.append(Missing("hipcc of ROCm", "rocm"))
    absent = [name for name in ("hipblas", "rocblas") if name not in host.parts]
    if absent:
        missing.append(Missing(f"the headers of {' and '.join(absent)}", "hipblas"))
    return [*missing, *compiler(host)], []


def sycl(host: Host) -> Finding:
    if not host.intel and INTEL not in host.vendors and "icpx" not in host.tools:
        return [Missing("an Intel graphics card", "", DEVICE)], []
    missing = []
    if "icpx" not in host.tools:
        missing.append(Missing("icpx of oneAPI", "icpx"))
    if "mkl" not in host.parts:
        missing.append(Missing("oneMKL", "mkl"))
    if not host.intel:
        what = "a device in sycl-ls: Level Zero's driver, or `setvars.sh` was not sourced"
        missing.append(Missing(what, "level zero", DEVICE))
    return missing, []


def vulkan(host: Host) -> Finding:
    missing, notes = [], []
    if not host.vulkan:
        fault = host.problems.get("vulkaninfo", "")
        if not host.has_vulkaninfo:
            fault = "vulkaninfo, which lists them, is not installed"
        what = f"a Vulkan device: {fault}" if fault else "a Vulkan device"
        missing.append(Missing(what, "vulkaninfo", DEVICE))
    elif is_software(host):
        notes.append(
            "the only device is software, slower than the cpu backend; llama.cpp ignores it "
            "unless GGML_VK_VISIBLE_DEVICES names it by its number"
        )
    if not host.vulkan_headers:
        missing.append(Missing("the Vulkan headers", "vulkan headers"))
    elif numbers(host.vulkan_headers) < LOWEST_VULKAN:
        needed = f"Vulkan headers {dotted(LOWEST_VULKAN)} or newer (vk::LayerSettingEXT)"
        missing.append(Missing(f"{needed}; {host.vulkan_headers} are here", "new vulkan headers"))
    if "loader" not in host.parts:
        missing.append(Missing("the Vulkan loader to link with", "vulkan loader"))
    if "glslc" not in host.tools:
        # One that does not start passes CMake's questions, and the shaders fail minutes later.
        fault = host.problems.get("glslc", "")
        missing.append(Missing(f"a glslc that runs: {fault}" if fault else "glslc", "glslc"))
    if "spirv" not in host.parts:
        missing.append(Missing("the SPIR-V headers", "spirv"))
    return [*missing, *compiler(host)], notes


CHECKS: dict[str, Callable[[Host], Finding]] = {
    "cuda": cuda,
    "metal": metal,
    "hip": hip,
    "sycl": sycl,
    "vulkan": vulkan,
    "cpu": cpu,
}


def has_nvidia_card(host: Host) -> bool:
    """Whether there is a card of NVIDIA's, working or not."""
    has_traces = host.nvidia or NVIDIA in host.vendors or host.nvidia_driver
    return bool(has_traces or "nvidia-smi" in host.problems)


def missing_nvidia_card(host: Host) -> list[Missing]:
    """What keeps programs from using an NVIDIA card."""
    if host.system == "macos":
        return [Missing("a system with NVIDIA's driver: there is none for macOS", "", DEVICE)]
    fault = host.problems.get("nvidia-smi")
    driver = "nvidia driver"
    if host.nvidia:
        if all(card.split for card in host.nvidia) and not host.slices:
            made = "MIG is on, but has no slice (nvidia-smi mig -cgi … -C makes one)"
            return [Missing(f"a MIG slice: {made}", "", DEVICE)]
        return []
    if fault:
        return [Missing(f"a driver that answers; nvidia-smi: {fault}", driver, DEVICE)]
    if host.nvidia_driver:
        loaded = f"nvidia-smi, though driver {host.nvidia_driver} is loaded"
        return [Missing(loaded, driver, DEVICE)]
    if NVIDIA in host.vendors:
        return [Missing("the NVIDIA driver for the card that is here", driver, DEVICE)]
    if host.wsl:
        windows = "under WSL the driver is installed in Windows, not here"
        return [Missing(f"an NVIDIA card; {windows}", "", DEVICE)]
    return [Missing("an NVIDIA card with its driver", "", DEVICE)]


def missing_toolkit(host: Host) -> Finding:
    """nvcc and the parts of its toolkit, which are packages of their own."""
    nvcc = host.tools.get("nvcc")
    if nvcc is None:
        return [Missing("the CUDA toolkit (nvcc)", "cuda", TOOLKIT)], []
    missing = []
    if "cublas" not in host.parts:
        missing.append(Missing(f"cuBLAS for CUDA {nvcc.version}", "cublas", TOOLKIT))
    if "libcuda" not in host.parts:
        missing.append(Missing(f"the libcuda stub of CUDA {nvcc.version}", "libcuda", TOOLKIT))
    notes = [f"MIG slices: {', '.join(host.slices)}"] if host.slices else []
    unsupported, left_out = missing_for_version(host, (*numbers(nvcc.version), 0)[:2])
    notes += left_out
    different = {numbers(card.capability) for card in host.nvidia if card.capability}
    if len(different) > 1:
        each = ", ".join(map(dotted, sorted(different)))
        notes.append(f"cards of different compute capability: {each}")
    return [*missing, *unsupported], notes


def missing_for_version(host: Host, version: tuple[int, ...]) -> Finding:
    """What keeps a toolkit of this version from compiling for the cards, or the driver from running
    the result."""
    missing, notes = [], []
    lowest = LOWEST_CAPABILITY.get(version[0], (0, 0))
    cards = {
        f"{card.name} ({card.capability})": numbers(card.capability)
        for card in host.nvidia
        if card.capability
    }
    too_old = [name for name, capability in cards.items() if capability < lowest]
    limit = f"CUDA {version[0]} compiles for {dotted(lowest)} and newer"
    for name in too_old:
        if len(too_old) == len(cards):
            missing.append(Missing(f"an older toolkit for {name}: {limit}", "cuda", TOOLKIT))
        else:
            notes.append(f"{name} is left out: {limit}")
    for name, capability in cards.items():
        first = FIRST_TOOLKIT.get(capability, (0, 0))
        if version < first:
            newer = f"CUDA {dotted(first)} or newer for {name}"
            missing.append(Missing(newer, "cuda", TOOLKIT))
    lowest_driver = LOWEST_DRIVER.get(version[0], 0)
    for driver in sorted({card.driver for card in host.nvidia}):
        if driver[:1].isdecimal() and numbers(driver)[0] < lowest_driver:  # L4T counts otherwise
            newer = f"driver {lowest_driver} or newer for CUDA {version[0]}; {driver} is here"
            missing.append(Missing(newer, "nvidia driver", TOOLKIT))
    return missing, notes
