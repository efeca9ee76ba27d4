"""Ask this machine about itself: run the tools that tell, all at once, and read the files.

Nothing is understood here; `detect` does that, without effects.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import platform
import shutil
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from pipeline.bins import platform as host
from pipeline.core.parallel import for_each
from pipeline.core.paths import Home
from pipeline.core.process import outcome

from . import nvidia

TIMEOUT = 5  # seconds that a tool gets
# A tool that waits inside the driver does not even die when killed, and is not waited for.
PATIENCE = TIMEOUT + 0.5
TEXT_BYTES = 256 * 1024  # of a file; the first processor and a header's version stand near the top

# Where tools lie that their packages do not put on PATH. Of these only names are shown.
BESIDE_PATH = (
    *("/usr/local/cuda/bin", "/opt/cuda/bin", "/usr/lib/wsl/lib", "/opt/rocm/bin"),
    "/opt/intel/oneapi/compiler/latest/bin",
)
VERSION = ("--version",)
EVERYWHERE: Mapping[str, tuple[str, ...]] = {
    # what is asked: the program and its words
    **{name: (name, *VERSION) for name in ("c++", "gcc", "g++", "clang", "clang++")},
    **{name: (name, *VERSION) for name in ("ccache", "node", "glslc", "nvcc", "hipcc", "icpx")},
    "nvcc -v": ("nvcc", "-v", "__nothing"),  # as CMake asks where the toolkit is
    "nvidia-smi": ("nvidia-smi", *nvidia.CARD_QUERY),
    "nvidia-smi, old": ("nvidia-smi", *nvidia.OLD_CARD_QUERY),
    "nvidia-smi -L": ("nvidia-smi", "-L"),
    "rocminfo": ("rocminfo",),
    "sycl-ls": ("sycl-ls",),
    "vulkaninfo": ("vulkaninfo", "--summary"),
}
MACOS = {
    "xcode-select": ("xcode-select", "-p"),
    "sysctl": ("sysctl", "machdep.cpu", "hw.optional", "sysctl.proc_translated"),
    "system_profiler": ("system_profiler", "SPDisplaysDataType"),
}
WINDOWS = {"cl": ("cl",)}
FILES = {
    "cpuinfo": "/proc/cpuinfo",
    "kernel": "/proc/sys/kernel/osrelease",
    "device-tree": "/proc/device-tree/model",
    "tegra": "/etc/nv_tegra_release",
    "nvidia": "/proc/driver/nvidia/version",
}
LIBRARIES = (
    *("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/lib"),
    *("/usr/local/lib", "/usr/lib/wsl/lib", "/opt/homebrew/lib"),
)
PREFIXES = ("/usr", "/usr/local", "/opt/homebrew")
# Changed by whoever changes what `detect` understands or `readiness` concludes.
FINGERPRINT_RULES = 2
VARIABLES = (
    *("CXX", "CUDA_PATH", "CUDA_HOME", "CUDA_VISIBLE_DEVICES", "ROCM_PATH", "VULKAN_SDK"),
    *("MKLROOT", "CMAKE_PREFIX_PATH", "LD_LIBRARY_PATH"),
    # what hides or adds devices
    *("VK_DRIVER_FILES", "VK_ICD_FILENAMES", "ROCR_VISIBLE_DEVICES", "ONEAPI_DEVICE_SELECTOR"),
)
# Devices appear and vanish here, drivers and packages with their versions.
DEVICE_PATHS = (
    *("/dev/nvidia*", "/dev/kfd", "/dev/dri/*", "/dev/dxg", "/dev/nvhost-gpu"),
    *("/proc/driver/nvidia/version", "/sys/bus/pci/devices/*"),
    *("/etc/vulkan/icd.d", "/usr/share/vulkan/icd.d"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeOutput:
    """What a tool said: its path, exit status (-1: none) and both channels."""

    path: str
    status: int
    out: str = ""
    err: str = ""
    hung: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """All that was captured. `files` holds texts, `pci` vendor and class of each device as
    sysfs spells them, `parts` names the parts of toolkits that are there. Sizes in bytes."""

    system: str  # linux, macos, windows
    machine: str  # x64, arm64
    name: str = ""
    family: str = ""  # of Linux: debian, fedora
    processor: str = ""
    cores: int | None = None
    threads: int | None = None
    memory: int = 0
    memory_free: int = 0
    disk_free: int = 0
    cxx: str = ""  # the environment's own choice of a compiler
    told: Mapping[str, ProbeOutput] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    pci: tuple[tuple[str, str], ...] = ()
    kfd: tuple[str, ...] = ()
    cuda: str = ""  # the folder of nvcc's toolkit
    parts: frozenset[str] = frozenset()


def probe(home: Home, cuda: str = "") -> Facts:
    """Capture everything, in the time that the slowest tool takes. `cuda`: the folder of a toolkit
    to look at before any other."""
    import psutil

    system, _, machine = host.platform_tag().partition("-")
    cxx = os.environ.get("CXX", "").strip()
    told = ask(questions(system, cxx), cuda)
    memory = psutil.virtual_memory()
    name, family = distribution() if system == "linux" else (platform.platform(terse=True), "")
    return Facts(
        system=system,
        machine=machine,
        name=name,
        family=family,
        processor=platform.processor(),
        cores=psutil.cpu_count(logical=False),
        threads=psutil.cpu_count(),
        memory=memory.total,
        memory_free=memory.available,
        disk_free=disk_free(home.root),
        cxx=cxx,
        told=told,
        files={key: text for key, path in found_files() if (text := read(path))},
        pci=tuple(
            (read(f"{folder}/vendor").strip(), read(f"{folder}/class").strip())
            for folder in matching("/sys/bus/pci/devices/*")
        ),
        kfd=tuple(read(p) for p in matching("/sys/class/kfd/kfd/topology/nodes/*/properties")),
        cuda=(toolkit_folder := toolkit(told.get("nvcc -v"))),
        parts=parts(toolkit_folder),
    )


def questions(system: str, cxx: str) -> dict[str, tuple[str, ...]]:
    """What to run on this system, by name."""
    own = {"CXX": (*cxx.split(), *VERSION)} if cxx else {}
    return {
        **EVERYWHERE,
        **own,
        **(MACOS if system == "macos" else {}),
        **(WINDOWS if system == "windows" else {}),
    }


def found(asked: Mapping[str, tuple[str, ...]], cuda: str = "") -> dict[str, str]:
    """Where the programs lie that are here: in `cuda`, on PATH, or where they usually are."""
    places = [f"{cuda}/bin"] if cuda else []
    sdk = os.environ.get("VULKAN_SDK")
    places += [f"{sdk}/bin"] if sdk else []  # where CMake looks for glslc before PATH
    places.append(os.environ.get("PATH", os.defpath))
    places += [
        str(Path(os.environ[name]) / "bin")
        for name in ("CUDA_PATH", "CUDA_HOME", "ROCM_PATH")
        if os.environ.get(name)
    ]
    search = os.pathsep.join([*places, *BESIDE_PATH])
    return {n: path for n, words in asked.items() if (path := shutil.which(words[0], path=search))}


def ask(asked: Mapping[str, tuple[str, ...]], cuda: str = "") -> dict[str, ProbeOutput]:
    """Run what is there, all at once. What is missing has no entry."""
    paths = found(asked, cuda)
    answers: dict[str, ProbeOutput] = {}

    def run(name: str) -> None:
        status, out, err = outcome([paths[name], *asked[name][1:]], timeout=TIMEOUT)
        hung = status == -1 and "timed out" in err
        answers[name] = ProbeOutput(path=paths[name], status=status, out=out, err=err, hung=hung)

    everything = threading.Thread(target=for_each, args=(run, paths, len(paths)), daemon=True)
    everything.start()
    everything.join(PATIENCE)
    silent = {n: ProbeOutput(path=p, status=-1, hung=True) for n, p in paths.items()}
    return {**silent, **dict(answers)}


def toolkit(told: ProbeOutput | None) -> str:
    """The folder that nvcc names as its toolkit's."""
    for line in (told.out + told.err).splitlines() if told else []:
        if line.startswith("#$ TOP="):
            return os.path.normpath(line.removeprefix("#$ TOP=").strip())
    return ""


def parts(cuda: str) -> frozenset[str]:
    """Which of the parts that a build links or includes are there."""
    sdk = os.environ.get("VULKAN_SDK", "")
    rocm = os.environ.get("ROCM_PATH") or "/opt/rocm"
    mkl = os.environ.get("MKLROOT") or "/opt/intel/oneapi/mkl/latest"
    cuda_libraries = [
        *(f"{cuda}/{part}" for part in ("lib64", "lib", "lib/x64", "targets/*/lib") if cuda),
        *LIBRARIES,
    ]
    with_stubs = [*(f"{folder}/stubs" for folder in cuda_libraries), *cuda_libraries]
    prefixes = [*([sdk] if sdk else []), *PREFIXES]
    cmake = [
        f"{prefix}/{part}/cmake"
        for prefix in prefixes
        for part in ("share", "lib", "lib64", "lib/*-linux-gnu")
    ]
    wanted = {
        "cublas": (cuda_libraries, ("libcublas.so", "cublas.lib")),
        "libcuda": (with_stubs, ("libcuda.so", "cuda.lib")),
        "loader": (
            [*([f"{sdk}/lib"] if sdk else []), *LIBRARIES],
            ("libvulkan.so", "libvulkan.dylib", "vulkan-1.lib"),
        ),
        "spirv": (cmake, ("SPIRV-Headers/SPIRV-HeadersConfig.cmake",)),
        "hipblas": ([f"{rocm}/include", "/usr/include"], ("hipblas/hipblas.h",)),
        "rocblas": ([f"{rocm}/include", "/usr/include"], ("rocblas/rocblas.h",)),
        "mkl": ([mkl], ("lib/cmake/mkl/MKLConfig.cmake",)),
    }
    return frozenset(part for part, (folders, names) in wanted.items() if there(folders, names))


def matching(pattern: str) -> list[str]:
    """The paths that a pattern with a whole path in it means."""
    if not glob.has_magic(pattern):
        return [pattern] if os.path.lexists(pattern) else []
    return sorted(glob.glob(pattern))  # noqa: PTH207 - Path.glob takes relative ones


def there(folders: Iterable[str], names: Iterable[str]) -> bool:
    return any(matching(f"{folder}/{name}") for folder in folders for name in names)


def found_files() -> list[tuple[str, str]]:
    """Files to read, by key; the headers are the first that CMake would find."""
    sdk = os.environ.get("VULKAN_SDK", "")
    prefixes = [*([sdk] if sdk else []), *PREFIXES]
    headers = chain.from_iterable(
        matching(f"{prefix}/[iI]nclude/vulkan/vulkan_core.h") for prefix in prefixes
    )
    first = next(headers, None)
    return [*FILES.items(), *([("vulkan_core.h", first)] if first else [])]


def read(path: str) -> str:
    """The beginning of a file; empty where there is none."""
    try:
        with Path(path).open(encoding="utf-8", errors="replace") as file:
            return file.read(TEXT_BYTES)
    except OSError:
        return ""


def distribution() -> tuple[str, str]:
    """The distribution's own name, and the family whose packages it takes."""
    try:
        told = platform.freedesktop_os_release()
    except OSError:
        return f"Linux {platform.release()}", ""
    kin = [told.get("ID", ""), *told.get("ID_LIKE", "").split()]
    family = next((f for f in ("debian", "fedora") if f in kin), "")
    if not family and any(word in ("ubuntu", "rhel", "centos") for word in kin):
        family = "debian" if "ubuntu" in kin else "fedora"
    return told.get("PRETTY_NAME", told.get("NAME", "Linux")), family


def disk_free(folder: Path) -> int:
    """Bytes free where `folder` is or would be made."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(there).free


def fingerprint(cuda: str = "") -> str:
    """A hash over everything that a choice of backend depends on; `cuda`: a toolkit's folder."""
    seen: list[Any] = [FINGERPRINT_RULES, host.platform_tag(), host.cpu_identity(), cuda]
    seen.append([os.environ.get(name) for name in VARIABLES])
    asked = questions(host.platform_tag().partition("-")[0], os.environ.get("CXX", ""))
    seen.append({name: [path, mtime_ns(path)] for name, path in found(asked, cuda).items()})
    seen.append([path for pattern in DEVICE_PATHS for path in matching(pattern)])
    seen.append(read("/proc/driver/nvidia/version"))
    folders = (*LIBRARIES, *(f"{prefix}/include/vulkan" for prefix in PREFIXES))
    seen.append([mtime_ns(folder) for folder in folders])
    # of toolkits, which lie in folders of their own
    toolkits = (cuda, *matching("/usr/local/cuda*"), "/opt/cuda")
    seen.append([sorted(parts(toolkit)) for toolkit in toolkits])
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:16]


def mtime_ns(path: str) -> int:
    """When a file, or the names in a folder, changed: ns; 0 where there is none."""
    try:
        return Path(path).stat().st_mtime_ns
    except OSError:
        return 0
