"""For each backend: usable on this machine, or what it lacks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .backends import BACKENDS
from .detect import AMD, INTEL, NVIDIA, Host

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
# VK_EXT_layer_settings came into the headers with 1.3.272 (KhronosGroup/Vulkan-Utility-Libraries
# pull request 167). Measured: 1.3.239 fails, 1.4.309 compiles.
LOWEST_VULKAN = (1, 3, 272)
USABLE, POSSIBLE, MISSING = "usable", "possible", "missing"


@dataclass(frozen=True, slots=True)
class Lack:
    """Something missing, and the key in PACKAGES of what provides it; empty: nothing does."""

    what: str
    package: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """`state` is usable, possible (all is here, this version does not build it) or missing."""

    backend: str
    state: str
    lacks: tuple[Lack, ...] = ()
    notes: tuple[str, ...] = ()


Finding = tuple[list[Lack], list[str]]


def verdicts(host: Host) -> list[Verdict]:
    """One for each backend, in the order in which `auto` would prefer them."""
    return [verdict(name, judge(host)) for name, judge in JUDGES.items()]


def verdict(name: str, finding: Finding) -> Verdict:
    lacks, notes = finding
    state = MISSING if lacks else USABLE if name in BACKENDS else POSSIBLE
    return Verdict(backend=name, state=state, lacks=tuple(lacks), notes=tuple(notes))


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(word) for word in version.split(".") if word.isdecimal())


def compiler(host: Host) -> list[Lack]:
    """CXX, where it is set, else the first of the usual names: CMake takes no other either."""
    if host.cxx:
        unusable = f"the C++ compiler that CXX names ({host.cxx}) does not answer"
        return [] if "CXX" in host.tools else [Lack(unusable, "compiler")]
    if any(name in host.tools for name in ("c++", "g++", "clang++", "cl")):
        return []
    return [Lack("a C++ compiler", "compiler")]


def cpu(host: Host) -> Finding:
    notes = []
    if host.rosetta:
        notes.append("Python runs under Rosetta: use an arm64 Python for an arm64 build")
    return compiler(host), notes


def cuda(host: Host) -> Finding:
    if host.system == "macos":
        return [Lack("a system with NVIDIA's driver: there is none for macOS")], []
    notes: list[str] = []
    seen = host.nvidia or NVIDIA in host.vendors or host.nvidia_driver or "nvcc" in host.tools
    if not seen and "nvidia-smi" not in host.problems:
        return nvidia_card(host), notes  # where there is no card, no toolkit is missed
    return [*nvidia_card(host), *toolkit(host, notes), *compiler(host)], notes


def nvidia_card(host: Host) -> list[Lack]:
    """A card that answers, and that programs can use."""
    fault = host.problems.get("nvidia-smi")
    if host.nvidia:
        if all(card.split for card in host.nvidia) and not host.slices:
            return [Lack("a MIG slice: MIG is on and none is made (nvidia-smi mig -cgi … -C)")]
        return []
    if fault:
        return [Lack(f"a driver that answers; nvidia-smi: {fault}", "nvidia driver")]
    if host.nvidia_driver:
        return [Lack(f"nvidia-smi, though driver {host.nvidia_driver} is loaded", "nvidia driver")]
    if NVIDIA in host.vendors:
        return [Lack("the NVIDIA driver for the card that is here", "nvidia driver")]
    if host.wsl:
        return [Lack("an NVIDIA card; under WSL the driver is installed in Windows, not here")]
    return [Lack("an NVIDIA card with its driver")]


def toolkit(host: Host, notes: list[str]) -> list[Lack]:
    """nvcc and the parts of its toolkit, which are packages of their own."""
    nvcc = host.tools.get("nvcc")
    if nvcc is None:
        return [Lack("the CUDA toolkit (nvcc)", "cuda")]
    lacks = []
    if "cublas" not in host.parts:
        lacks.append(Lack(f"cuBLAS for CUDA {nvcc.version}", "cublas"))
    if "libcuda" not in host.parts:
        lacks.append(Lack(f"the libcuda stub of CUDA {nvcc.version}", "libcuda"))
    if host.slices:
        notes.append(f"MIG slices: {', '.join(host.slices)}")
    return lacks + fitting(host, (*numbers(nvcc.version), 0)[:2], notes)


def fitting(host: Host, version: tuple[int, ...], notes: list[str]) -> list[Lack]:
    """That the toolkit of this version compiles for the cards, and the driver runs the result."""
    lacks = []
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
            lacks.append(Lack(f"an older toolkit for {name}: {limit}", "cuda"))
        else:
            notes.append(f"{name} is left out: {limit}")
    for name, capability in cards.items():
        first = FIRST_TOOLKIT.get(capability, (0, 0))
        if version < first:
            lacks.append(Lack(f"CUDA {dotted(first)} or newer for {name}", "cuda"))
    if len(set(cards.values())) > 1:
        each = ", ".join(dotted(capability) for capability in sorted(set(cards.values())))
        notes.append(f"cards of different compute capability: {each}")
    lowest_driver = LOWEST_DRIVER.get(version[0], 0)
    for driver in sorted({card.driver for card in host.nvidia}):
        if driver[:1].isdecimal() and numbers(driver)[0] < lowest_driver:  # L4T counts otherwise
            told = f"driver {lowest_driver} or newer for CUDA {version[0]}; {driver} is here"
            lacks.append(Lack(told, "nvidia driver"))
    return lacks


def dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def metal(host: Host) -> Finding:
    if host.system != "macos":
        return [Lack("macOS")], []
    lacks = [] if host.xcode else [Lack("the Xcode command line tools", "xcode")]
    if host.apple and not any("Metal" in unit or "Apple" in unit for unit in host.apple):
        lacks.append(Lack("a graphics unit that speaks Metal"))
    notes = ["Python runs under Rosetta: use an arm64 Python"] if host.rosetta else []
    return [*lacks, *compiler(host)], notes


def hip(host: Host) -> Finding:
    if not host.amd and AMD not in host.vendors and "hipcc" not in host.tools:
        return [Lack("an AMD card")], []
    lacks = []
    if not host.amd:
        seen = AMD in host.vendors
        fault = host.problems.get("rocminfo", "")
        what = "AMD's compute driver (amdgpu, /dev/kfd) for the card" if seen else "an AMD card"
        lacks.append(Lack(f"{what}; rocminfo: {fault}" if fault else what, "rocm" if seen else ""))
    if "hipcc" not in host.tools:
        lacks.append(Lack("hipcc of ROCm", "rocm"))
    absent = [name for name in ("hipblas", "rocblas") if name not in host.parts]
    if absent:
        lacks.append(Lack(f"the headers of {' and '.join(absent)}", "hipblas"))
    return [*lacks, *compiler(host)], []


def sycl(host: Host) -> Finding:
    if not host.intel and INTEL not in host.vendors and "icpx" not in host.tools:
        return [Lack("an Intel graphics card")], []
    lacks = []
    if "icpx" not in host.tools:
        lacks.append(Lack("icpx of oneAPI", "icpx"))
    if "mkl" not in host.parts:
        lacks.append(Lack("oneMKL", "mkl"))
    if not host.intel:
        what = "a device in sycl-ls: Level Zero's driver, or `setvars.sh` was not sourced"
        lacks.append(Lack(what, "level zero"))
    return lacks, []


def vulkan(host: Host) -> Finding:
    lacks, notes = [], []
    if not host.vulkan:
        fault = host.problems.get("vulkaninfo", "")
        if not host.has_vulkaninfo:
            fault = "vulkaninfo, which lists them, is not here"
        told = f"a Vulkan device: {fault}" if fault else "a Vulkan device"
        lacks.append(Lack(told, "vulkaninfo"))
    elif all(device.kind == "CPU" for device in host.vulkan):
        notes.append("the only device is software: for tests, slower than the cpu backend")
    if not host.vulkan_headers:
        lacks.append(Lack("the Vulkan headers", "vulkan headers"))
    elif numbers(host.vulkan_headers) < LOWEST_VULKAN:
        needed = f"Vulkan headers {dotted(LOWEST_VULKAN)} or newer (vk::LayerSettingEXT)"
        lacks.append(Lack(f"{needed}; {host.vulkan_headers} are here", "new vulkan headers"))
    if "loader" not in host.parts:
        lacks.append(Lack("the Vulkan loader to link with", "vulkan loader"))
    if "glslc" not in host.tools:
        lacks.append(Lack("glslc", "glslc"))
    if "spirv" not in host.parts:
        lacks.append(Lack("the SPIR-V headers", "spirv"))
    return [*lacks, *compiler(host)], notes


JUDGES: dict[str, Callable[[Host], Finding]] = {
    "cuda": cuda,
    "metal": metal,
    "hip": hip,
    "sycl": sycl,
    "vulkan": vulkan,
    "cpu": cpu,
}
