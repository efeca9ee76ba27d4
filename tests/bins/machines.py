"""Machines out of written samples of what their tools print."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec.structs import replace

from pipeline.bins.hardware import requirements
from pipeline.bins.hardware.detect import Host, detect
from pipeline.bins.hardware.probe import Facts, ProbeOutput
from pipeline.bins.hardware.requirements import MISSING, Report

GPP = "g++ (Debian 12.2.0-14+deb12u1) 12.2.0\nCopyright (C) 2022"
NVCC = """nvcc: NVIDIA (R) Cuda compiler driver
Copyright (c) 2005-2025 NVIDIA Corporation
Cuda compilation tools, release {0}, V{0}.88
Build cuda_{0}.r{0}/compiler.36424714_0
"""
RTX = "NVIDIA GeForce RTX 4090, 8.9, 580.65.06, [N/A], 24564\n"
GTX = "NVIDIA GeForce GTX 1080, 6.1, 580.65.06, [N/A], 8192\n"
A100 = "NVIDIA A100-SXM4-40GB, 8.0, 580.65.06, Enabled, 40960\n"
SLICES = """GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-4a4e)
  MIG 3g.20gb     Device  0: (UUID: MIG-c6d4)
  MIG 1g.5gb      Device  1: (UUID: MIG-cba6)
"""
MISMATCH = "Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 580\n"
NO_DRIVER = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n"
VULKANINFO = """==========
VULKANINFO
==========

Vulkan Instance Version: 1.3.239

Devices:
========
GPU0:
\tapiVersion         = 1.3.242
\tdeviceType         = PHYSICAL_DEVICE_TYPE_INTEGRATED_GPU
\tdeviceName         = Intel(R) Graphics (RPL-P)
GPU1:
\tapiVersion         = 1.3.242
\tdeviceType         = PHYSICAL_DEVICE_TYPE_CPU
\tdeviceName         = llvmpipe (LLVM 15.0.6, 256 bits)
"""
LLVMPIPE = VULKANINFO[: VULKANINFO.index("GPU0")] + VULKANINFO[VULKANINFO.index("GPU1") :]
HEADERS = """// Version of this file
#define VK_HEADER_VERSION {1}

// Complete version of this file
#define VK_HEADER_VERSION_COMPLETE VK_MAKE_API_VERSION(0, 1, {0}, VK_HEADER_VERSION)
"""
GLSLC = "shaderc v2023.2 v2025.2\nspirv-tools v2025.1\nglslang 11.1.0\n"
ROCMINFO = """ROCk module is loaded
==========
HSA Agents
==========
*******
Agent 1
*******
  Name:                    AMD Ryzen 9 7950X 16-Core Processor
  Marketing Name:          AMD Ryzen 9 7950X 16-Core Processor
*******
Agent 2
*******
  Name:                    gfx1100
  Uuid:                    GPU-4242
  Marketing Name:          Radeon RX 7900 XTX
  Vendor Name:             AMD
"""
HIPCC = "HIP version: 6.2.41133-dd7f95766\nAMD clang version 18.0.0git\n"
SYCL = """[opencl:cpu:0] Intel(R) OpenCL, AMD Ryzen 9 OpenCL 3.0 [2024.17]
[opencl:gpu:1] Intel(R) OpenCL Graphics, Intel(R) Arc(TM) A770 Graphics OpenCL 3.0 NEO [23.43]
[{}] Intel(R) Level-Zero, Intel(R) Arc(TM) A770 Graphics 1.3 [1.3.27642]
"""
ICPX = "Intel(R) oneAPI DPC++/C++ Compiler 2024.1.0 (2024.1.0.20240308)\nTarget: x86_64\n"
PROFILER = """Graphics/Displays:

    Apple M2:

      Chipset Model: Apple M2
      Type: GPU
      Bus: Built-In
      Total Number of Cores: 10
      Vendor: Apple (0x106b)
      Metal Support: Metal 3
"""
INTEL_MAC = """Graphics/Displays:
    Intel Iris Plus Graphics 655:
      Chipset Model: Intel Iris Plus Graphics 655
      VRAM (Dynamic, Max): 1536 MB
      Metal Family: Supported, Metal GPUFamily macOS 2
"""
M2 = """machdep.cpu.brand_string: Apple M2
hw.optional.neon: 1
hw.optional.AdvSIMD: 1
hw.optional.arm.FEAT_BF16: 1
hw.optional.arm.FEAT_DotProd: 1
hw.optional.arm.FEAT_I8MM: 1
hw.optional.arm.FEAT_SME: 0
"""
CUDA_PARTS = frozenset({"cublas", "libcuda"})
VULKAN_PARTS = frozenset({"loader", "spirv"})


def ok(out: str = "", err: str = "") -> ProbeOutput:
    return ProbeOutput(path="/usr/bin/it", status=0, out=out, err=err)


def linux(outputs: Mapping[str, ProbeOutput] | None = None, **more: Any) -> Host:
    """A Debian machine with g++ and these outputs besides."""
    facts = Facts(system="linux", machine="x64", name="Debian", family="debian")
    return detect(replace(facts, outputs={"g++": ok(GPP), **(outputs or {})}, **more))


def mac(outputs: Mapping[str, ProbeOutput] | None = None) -> Host:
    facts = Facts(system="macos", machine="arm64", name="macOS-14.5")
    return detect(
        replace(facts, outputs={"clang++": ok("Apple clang version 15.0.0"), **(outputs or {})})
    )


def of(host: Host, backend: str) -> Report:
    return next(v for v in requirements.reports(host) if v.backend == backend)


def lacks(host: Host, backend: str) -> str:
    report = of(host, backend)
    assert (report.state == MISSING) == bool(report.missing)
    return "\n".join(lack.what for lack in report.missing)


def smi(cards: str, nvcc: str = "", slices: str = "") -> dict[str, ProbeOutput]:
    found = {"nvidia-smi": ok(cards), "nvidia-smi -L": ok(slices)}
    return {**found, "nvcc": ok(NVCC.format(nvcc))} if nvcc else found


def vulkan(headers: tuple[int, int], info: str = VULKANINFO) -> Host:
    told = {"vulkaninfo": ok(info), "glslc": ok(GLSLC)}
    return linux(told, files={"vulkan_core.h": HEADERS.format(*headers)}, parts=VULKAN_PARTS)
