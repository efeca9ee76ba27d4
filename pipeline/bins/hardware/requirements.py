"""For each backend: usable on this machine, or what it lacks."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.bins.compile import cuda_toolkit
from pipeline.bins.compile.cuda_toolkit import CudaRelease
from pipeline.core.text import size

from . import cuda
from .cuda_versions import LOWEST_DRIVER
from .detect import AMD, INTEL, NVIDIA, Host
from .lacks import DEVICE, TOOLKIT, Missing, Report, dotted, numbers

# VK_EXT_layer_settings came into the headers with 1.3.272 (KhronosGroup/Vulkan-Utility-Libraries
# pull request 167). Measured: 1.3.239 fails, 1.4.309 compiles.
LOWEST_VULKAN = (1, 3, 272)

Finding = tuple[list[Missing], list[str]]


def verdicts(host: Host) -> list[Report]:
    """One for each backend, in the order in which `auto` prefers them."""
    return [verdict(name, host) for name in JUDGES]


def verdict(name: str, host: Host) -> Report:
    lacks, notes = JUDGES[name](host)
    return Report(
        backend=name,
        lacks=tuple(lacks),
        notes=tuple(notes),
        seen=seen(name, host),
        software=name == "vulkan" and is_software(host),
    )


def seen(name: str, host: Host) -> bool:
    """Whether there is a card that the backend is for, working or not."""
    hardware = [device for device in host.vulkan if device.kind != "CPU"]
    return {
        "cuda": cuda.seen(host),
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


def nvidia(host: Host) -> Finding:
    if not cuda.seen(host) and "nvcc" not in host.tools:
        return cuda.nvidia_card(host), []  # where there is no card, no toolkit is missed
    notes: list[str] = []
    lacks, release = cuda.toolkit(host, notes), wheels(host)
    if lacks and release:
        missing = " and ".join(lack.what for lack in lacks)
        fetched = f"{size(cuda_toolkit.DOWNLOAD_BYTES)}, once"
        notes.append(
            f"without {missing} NVIDIA's wheels of CUDA {release.version} are taken ({fetched})"
        )
        lacks = []
    return [*cuda.nvidia_card(host), *lacks, *compiler(host)], notes


def wheels(host: Host) -> CudaRelease | None:
    """The release of NVIDIA's wheels for this system, its driver and its cards."""
    platform = f"{host.system}-{host.machine}"
    release = None if host.jetson else cuda_toolkit.for_driver(driver(host), platform)
    if release and cuda.fitting(host, numbers(release.version), []):
        return None
    return release


def no_wheels(host: Host) -> list[Missing]:
    """That NVIDIA's wheels would be taken instead of a toolkit, were the driver newer."""
    platform = f"{host.system}-{host.machine}"
    lowest = LOWEST_DRIVER[cuda_toolkit.CUDA_13.major]
    if (
        host.jetson
        or cuda_toolkit.lack("", platform)
        or not cuda_toolkit.lack(driver(host), platform)
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
    lacks = [] if host.xcode else [Missing("the Xcode command line tools", "xcode")]
    if host.apple and not any("Metal" in unit or "Apple" in unit for unit in host.apple):
        lacks.append(Missing("a graphics unit that speaks Metal", "", DEVICE))
    notes = ["Python runs under Rosetta: use an arm64 Python"] if host.rosetta else []
    return [*lacks, *compiler(host)], notes


def hip(host: Host) -> Finding:
    if not host.amd and AMD not in host.vendors and "hipcc" not in host.tools:
        return [Missing("an AMD card", "", DEVICE)], []
    lacks = []
    if not host.amd:
        driverless = AMD in host.vendors
        fault = host.problems.get("rocminfo", "")
        driver = "AMD's compute driver (amdgpu, /dev/kfd) for the card"
        what = driver if driverless else "an AMD card"
        told = f"{what}; rocminfo: {fault}" if fault else what
        lacks.append(Missing(told, "rocm" if driverless else "", DEVICE))
    if "hipcc" not in host.tools:
        lacks.append(Missing("hipcc of ROCm", "rocm"))
    absent = [name for name in ("hipblas", "rocblas") if name not in host.parts]
    if absent:
        lacks.append(Missing(f"the headers of {' and '.join(absent)}", "hipblas"))
    return [*lacks, *compiler(host)], []


def sycl(host: Host) -> Finding:
    if not host.intel and INTEL not in host.vendors and "icpx" not in host.tools:
        return [Missing("an Intel graphics card", "", DEVICE)], []
    lacks = []
    if "icpx" not in host.tools:
        lacks.append(Missing("icpx of oneAPI", "icpx"))
    if "mkl" not in host.parts:
        lacks.append(Missing("oneMKL", "mkl"))
    if not host.intel:
        what = "a device in sycl-ls: Level Zero's driver, or `setvars.sh` was not sourced"
        lacks.append(Missing(what, "level zero", DEVICE))
    return lacks, []


def vulkan(host: Host) -> Finding:
    lacks, notes = [], []
    if not host.vulkan:
        fault = host.problems.get("vulkaninfo", "")
        if not host.has_vulkaninfo:
            fault = "vulkaninfo, which lists them, is not here"
        told = f"a Vulkan device: {fault}" if fault else "a Vulkan device"
        lacks.append(Missing(told, "vulkaninfo", DEVICE))
    elif is_software(host):
        notes.append(
            "the only device is software, slower than the cpu backend; llama.cpp passes over it "
            "unless GGML_VK_VISIBLE_DEVICES names it by its number"
        )
    if not host.vulkan_headers:
        lacks.append(Missing("the Vulkan headers", "vulkan headers"))
    elif numbers(host.vulkan_headers) < LOWEST_VULKAN:
        needed = f"Vulkan headers {dotted(LOWEST_VULKAN)} or newer (vk::LayerSettingEXT)"
        lacks.append(Missing(f"{needed}; {host.vulkan_headers} are here", "new vulkan headers"))
    if "loader" not in host.parts:
        lacks.append(Missing("the Vulkan loader to link with", "vulkan loader"))
    if "glslc" not in host.tools:
        # One that does not start passes CMake's questions, and the shaders fail minutes later.
        fault = host.problems.get("glslc", "")
        lacks.append(Missing(f"a glslc that runs: {fault}" if fault else "glslc", "glslc"))
    if "spirv" not in host.parts:
        lacks.append(Missing("the SPIR-V headers", "spirv"))
    return [*lacks, *compiler(host)], notes


JUDGES: dict[str, Callable[[Host], Finding]] = {
    "cuda": nvidia,
    "metal": metal,
    "hip": hip,
    "sycl": sycl,
    "vulkan": vulkan,
    "cpu": cpu,
}
