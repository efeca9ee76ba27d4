"""Whether this machine may have changed since it was looked at: some hundred `stat`, no process."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from pipeline.bins import platform

from . import probe

# Changed by whoever changes what `detect` understands or `readiness` concludes.
RULES = 2
VARIABLES = (
    *("CXX", "CUDA_PATH", "CUDA_HOME", "CUDA_VISIBLE_DEVICES", "ROCM_PATH", "VULKAN_SDK"),
    *("MKLROOT", "CMAKE_PREFIX_PATH", "LD_LIBRARY_PATH"),
    # what hides or adds devices
    *("VK_DRIVER_FILES", "VK_ICD_FILENAMES", "ROCR_VISIBLE_DEVICES", "ONEAPI_DEVICE_SELECTOR"),
)
# Devices appear and vanish here, drivers and packages with their versions.
PLACES = (
    *("/dev/nvidia*", "/dev/kfd", "/dev/dri/*", "/dev/dxg", "/dev/nvhost-gpu"),
    *("/proc/driver/nvidia/version", "/sys/bus/pci/devices/*"),
    *("/etc/vulkan/icd.d", "/usr/share/vulkan/icd.d"),
)


def fingerprint(cuda: str = "") -> str:
    """A hash over everything that a choice of backend depends on; `cuda`: a toolkit's folder."""
    seen: list[Any] = [RULES, platform.platform_tag(), platform.cpu_identity(), cuda]
    seen.append([os.environ.get(name) for name in VARIABLES])
    asked = probe.questions(platform.platform_tag().partition("-")[0], os.environ.get("CXX", ""))
    seen.append({name: [path, changed(path)] for name, path in probe.found(asked, cuda).items()})
    seen.append([path for pattern in PLACES for path in probe.matching(pattern)])
    seen.append(probe.read("/proc/driver/nvidia/version"))
    folders = (*probe.LIBRARIES, *(f"{prefix}/include/vulkan" for prefix in probe.PREFIXES))
    seen.append([changed(folder) for folder in folders])
    # of toolkits, which lie in folders of their own
    toolkits = (cuda, *probe.matching("/usr/local/cuda*"), "/opt/cuda")
    seen.append([sorted(probe.parts(toolkit)) for toolkit in toolkits])
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:16]


def changed(path: str) -> int:
    """When a file, or the names in a folder, changed: ns; 0 where there is none."""
    try:
        return Path(path).stat().st_mtime_ns
    except OSError:
        return 0
