"""What installs what a backend needs: the command for each family of systems."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from pipeline.bins import platform
from pipeline.core.errors import PipelineError

FAMILIES = {
    "debian": "Debian/Ubuntu",
    "fedora": "Fedora",
    "macos": "macOS",
    "windows": "Windows",
}
VULKAN_SDK = "winget install KhronosGroup.VulkanSDK"
ONEAPI = "winget install Intel.oneAPI.BaseToolkit"
HIP_SDK = "AMD's HIP SDK, from amd.com"
CUDA = "winget install Nvidia.CUDA"
NVIDIA_REPOSITORY = " (of NVIDIA's repository)"
INTEL_REPOSITORY = " (of Intel's repository)"

PACKAGES: Mapping[str, Mapping[str, str]] = {
    "compiler": {
        "debian": "apt install g++",
        "fedora": "dnf install gcc-c++",
        "macos": "xcode-select --install",
        "windows": "winget install Microsoft.VisualStudio.2022.BuildTools, with its C++ workload",
    },
    "nvidia driver": {
        "debian": "apt install nvidia-driver; on Ubuntu: ubuntu-drivers install",
        "fedora": "dnf install akmod-nvidia (of RPM Fusion)",
        "windows": "NVIDIA's driver, from nvidia.com/drivers",
    },
    "cuda": {
        "debian": "apt install cuda-toolkit" + NVIDIA_REPOSITORY,
        "fedora": "dnf install cuda-toolkit" + NVIDIA_REPOSITORY,
        "windows": CUDA,
    },
    "cublas": {
        "debian": "apt install libcublas-dev-13-0 (the number is nvcc's)",
        "fedora": "dnf install libcublas-devel-13-0 (the number is nvcc's)",
        "windows": CUDA,
    },
    "libcuda": {
        "debian": "apt install cuda-driver-dev-13-0 (the number is nvcc's)",
        "fedora": "dnf install cuda-driver-devel-13-0 (the number is nvcc's)",
        "windows": CUDA,
    },
    "xcode": {"macos": "xcode-select --install"},
    "rocm": {
        "debian": "apt install rocm (of AMD's repository)",
        "fedora": "dnf install rocm-hip-devel hipcc",
        "windows": HIP_SDK,
    },
    "hipblas": {
        "debian": "apt install hipblas-dev rocblas-dev",
        "fedora": "dnf install hipblas-devel rocblas-devel",
        "windows": HIP_SDK,
    },
    "icpx": {
        "debian": "apt install intel-oneapi-compiler-dpcpp-cpp" + INTEL_REPOSITORY,
        "fedora": "dnf install intel-oneapi-compiler-dpcpp-cpp" + INTEL_REPOSITORY,
        "windows": ONEAPI,
    },
    "mkl": {
        "debian": "apt install intel-oneapi-mkl-devel" + INTEL_REPOSITORY,
        "fedora": "dnf install intel-oneapi-mkl-devel" + INTEL_REPOSITORY,
        "windows": ONEAPI,
    },
    "level zero": {
        "debian": "apt install libze1 libze-intel-gpu1",
        "fedora": "dnf install oneapi-level-zero intel-compute-runtime",
        "windows": "Intel's driver, from intel.com",
    },
    "vulkan headers": {
        "debian": "apt install libvulkan-dev",
        "fedora": "dnf install vulkan-headers vulkan-loader-devel",
        "macos": "brew install vulkan-headers",
        "windows": VULKAN_SDK,
    },
    "vulkan loader": {
        "debian": "apt install libvulkan-dev",
        "fedora": "dnf install vulkan-loader-devel",
        "macos": "brew install vulkan-loader molten-vk",
        "windows": VULKAN_SDK,
    },
    "new vulkan headers": {
        "debian": "libvulkan-dev of Debian 13 or Ubuntu 24.04, or LunarG's SDK",
        "fedora": "dnf upgrade vulkan-headers",
        "macos": "brew upgrade vulkan-headers",
        "windows": VULKAN_SDK,
    },
    "glslc": {
        "debian": "apt install glslc",
        "fedora": "dnf install glslc",
        "macos": "brew install shaderc",
        "windows": VULKAN_SDK,
    },
    "spirv": {
        "debian": "apt install spirv-headers",
        "fedora": "dnf install spirv-headers-devel",
        "macos": "brew install spirv-headers",
        "windows": VULKAN_SDK,
    },
    "vulkaninfo": {
        "debian": "apt install vulkan-tools mesa-vulkan-drivers",
        "fedora": "dnf install vulkan-tools mesa-vulkan-drivers",
        "macos": "brew install vulkan-tools molten-vk",
        "windows": VULKAN_SDK,
    },
}


def provider(package: str, system: str, family: str) -> str:
    """The commands that provide `package`: this system's, or all where its family is unknown."""
    commands = PACKAGES.get(package, {})
    own = commands.get(family if system == "linux" else system)
    if own:
        return own
    if system != "linux" or family:
        return ""
    return _listed(commands, ("debian", "fedora"))


def _listed(commands: Mapping[str, str], families: Iterable[str]) -> str:
    return "; ".join(f"{FAMILIES[each]}: {commands[each]}" for each in families if each in commands)


def require_compiler() -> None:
    """Raise PipelineError that says what to install where there is no C++ compiler."""
    if platform.find_compiler() is not None:
        return
    install = _listed(PACKAGES["compiler"], FAMILIES)
    if cxx := os.environ.get("CXX", "").strip():
        raise PipelineError(
            f"no C++ compiler was found: CXX={cxx} names none that answers to --version",
            f"unset CXX, name one that is installed, or install one: {install}",
        )
    raise PipelineError("no C++ compiler was found (CXX, c++, g++, clang++)", install)
