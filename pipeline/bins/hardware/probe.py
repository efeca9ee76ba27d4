"""Probe this machine: run the tools that know it, all at once, and read its files.

Nothing is interpreted here; `detect` does that, without effects. And its fingerprint, which
changes where a new probe might find something else: some hundred `stat`, no process.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import platform
import shutil
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct, field

from pipeline.bins import platform as host
from pipeline.core.parallel import for_each
from pipeline.core.paths import Home
from pipeline.core.process import outcome

from . import nvidia

TIMEOUT = 5  # seconds that a tool gets
# A tool stuck inside the driver survives SIGKILL; it is not waited for.
PATIENCE = TIMEOUT + 0.5
TEXT_BYTES = 256 * 1024  # of a file; the first processor and a header's version stand near the top

# Where tools lie that their packages do not put on PATH. Of these only names are shown.
BESIDE_PATH = (
    *("/usr/local/cuda/bin", "/opt/cuda/bin", "/usr/lib/wsl/lib", "/opt/rocm/bin"),
    "/opt/intel/oneapi/compiler/latest/bin",
)
VERSION = ("--version",)
EVERYWHERE: Mapping[str, tuple[str, ...]] = {
    # the program and its arguments
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
OF_SYSTEM: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "macos": {
        "xcode-select": ("xcode-select", "-p"),
        "sysctl": ("sysctl", "machdep.cpu", "hw.optional", "sysctl.proc_translated"),
        "system_profiler": ("system_profiler", "SPDisplaysDataType"),
    },
    "windows": {"cl": ("cl",)},
}
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
# Increase it with every change of `detect` or `requirements`: remembered choices are dropped.
FINGERPRINT_RULES = 3
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


Places = tuple[Sequence[str], Sequence[str]]  # folders, and the names that a part has there


class ProbeOutput(Struct, frozen=True, kw_only=True):
    """The output of a tool: its path, exit status (-1: none), stdout and stderr."""

    path: str
    status: int
    out: str = ""
    err: str = ""
    hung: bool = False


class Machine(Struct, frozen=True, kw_only=True):
    """What is known of a machine without parsing anything. Sizes in bytes."""

    system: str  # linux, macos, windows
    machine: str  # x64, arm64
    name: str = ""
    family: str = ""  # of Linux: debian, fedora
    cores: int | None = None
    threads: int | None = None
    memory: int = 0
    memory_free: int = 0
    disk_free: int = 0
    cxx: str = ""  # the environment's own choice of a compiler
    cuda: str = ""  # the folder of nvcc's toolkit
    parts: frozenset[str] = frozenset()  # the parts of toolkits that are there


class Facts(Machine, frozen=True, kw_only=True):
    """All that was captured. `files` holds texts, `pci` vendor and class of each device as
    sysfs spells them."""

    processor: str = ""
    outputs: Mapping[str, ProbeOutput] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    pci: tuple[tuple[str, str], ...] = ()
    kfd: tuple[str, ...] = ()


def probe(home: Home, cuda: str = "") -> Facts:
    """Capture everything, in the time that the slowest tool takes. `cuda`: the folder of a toolkit
    to look at before any other."""
    import psutil

    system, _, machine = host.platform_tag().partition("-")
    cxx = os.environ.get("CXX", "").strip()
    outputs = run_all(tool_commands(system, cxx), cuda)
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
        outputs=outputs,
        files={key: text for key, path in files_to_read() if (text := read(path))},
        pci=tuple(
            (read(f"{folder}/vendor").strip(), read(f"{folder}/class").strip())
            for folder in matching("/sys/bus/pci/devices/*")
        ),
        kfd=tuple(read(p) for p in matching("/sys/class/kfd/kfd/topology/nodes/*/properties")),
        cuda=(toolkit_folder := toolkit(outputs.get("nvcc -v"))),
        parts=cuda_parts(toolkit_folder) | other_parts(),
    )


def tool_commands(system: str, cxx: str) -> dict[str, tuple[str, ...]]:
    """The commands to run on this system, by name."""
    own = {"CXX": (*words, *VERSION)} if (words := host.compiler_words(cxx)) else {}
    return {**EVERYWHERE, **own, **OF_SYSTEM.get(system, {})}


def find_programs(commands: Mapping[str, tuple[str, ...]], cuda: str = "") -> dict[str, str]:
    """The paths of the installed programs: in `cuda`, on PATH, or in the usual folders."""
    env = os.environ
    sdk = env.get("VULKAN_SDK")  # where CMake looks for glslc before PATH
    before = [f"{top}/bin" for top in (cuda, sdk) if top]
    tops = map(env.get, ("CUDA_PATH", "CUDA_HOME", "ROCM_PATH"))
    after = [str(Path(top, "bin")) for top in tops if top]
    search = os.pathsep.join([*before, env.get("PATH", os.defpath), *after, *BESIDE_PATH])
    return {
        n: path for n, words in commands.items() if (path := shutil.which(words[0], path=search))
    }


def run_all(commands: Mapping[str, tuple[str, ...]], cuda: str = "") -> dict[str, ProbeOutput]:
    """Run the installed programs, all at once. A missing one has no entry."""
    paths = find_programs(commands, cuda)
    answers: dict[str, ProbeOutput] = {}

    def run(name: str) -> None:
        status, out, err = outcome([paths[name], *commands[name][1:]], timeout=TIMEOUT)
        hung = status == -1 and "timed out" in err
        answers[name] = ProbeOutput(path=paths[name], status=status, out=out, err=err, hung=hung)

    everything = threading.Thread(target=for_each, args=(run, paths, len(paths)), daemon=True)
    everything.start()
    everything.join(PATIENCE)
    silent = {n: ProbeOutput(path=p, status=-1, hung=True) for n, p in paths.items()}
    return {**silent, **dict(answers)}


def toolkit(output: ProbeOutput | None) -> str:
    """The folder that nvcc names as its toolkit's."""
    for line in (output.out + output.err).splitlines() if output else []:
        if line.startswith("#$ TOP="):
            return os.path.normpath(line.removeprefix("#$ TOP=").strip())
    return ""


def cuda_parts(cuda: str) -> frozenset[str]:
    """Which of the parts of CUDA that a build links are there: in the toolkit `cuda`, or where the
    system's libraries are."""
    libraries = [
        *(f"{cuda}/{part}" for part in ("lib64", "lib", "lib/x64", "targets/*/lib") if cuda),
        *LIBRARIES,
    ]
    with_stubs = [*(f"{folder}/stubs" for folder in libraries), *libraries]
    return present(
        {
            "cublas": (libraries, ("libcublas.so", "cublas.lib")),
            "libcuda": (with_stubs, ("libcuda.so", "cuda.lib")),
        }
    )


def other_parts() -> frozenset[str]:
    """Which of the parts that a build for another backend links or includes are there."""
    rocm = os.environ.get("ROCM_PATH") or "/opt/rocm"
    mkl = os.environ.get("MKLROOT") or "/opt/intel/oneapi/mkl/latest"
    cmake = [
        f"{prefix}/{part}/cmake"
        for prefix in vulkan_prefixes()
        for part in ("share", "lib", "lib64", "lib/*-linux-gnu")
    ]
    places: Mapping[str, Places] = {
        "loader": (
            [*(f"{prefix}/lib" for prefix in vulkan_prefixes()), *LIBRARIES],
            ("libvulkan.so", "libvulkan.dylib", "vulkan-1.lib"),
        ),
        "spirv": (cmake, ("SPIRV-Headers/SPIRV-HeadersConfig.cmake",)),
        "hipblas": ([f"{rocm}/include", "/usr/include"], ("hipblas/hipblas.h",)),
        "rocblas": ([f"{rocm}/include", "/usr/include"], ("rocblas/rocblas.h",)),
        "mkl": ([mkl], ("lib/cmake/mkl/MKLConfig.cmake",)),
    }
    return present(places)


def present(places: Mapping[str, Places]) -> frozenset[str]:
    """The parts of which a file is there."""
    return frozenset(
        part
        for part, (folders, names) in places.items()
        if any(matching(f"{folder}/{name}") for folder in folders for name in names)
    )


def vulkan_prefixes() -> list[str]:
    """Where Vulkan's headers and libraries may be installed, in CMake's order."""
    sdk = os.environ.get("VULKAN_SDK")
    return [*([sdk] if sdk else []), *PREFIXES]


def matching(pattern: str) -> list[str]:
    """The existing paths that an absolute pattern matches."""
    if not glob.has_magic(pattern):
        return [pattern] if os.path.lexists(pattern) else []
    return sorted(glob.glob(pattern))  # noqa: PTH207 - Path.glob takes relative ones


def files_to_read() -> list[tuple[str, str]]:
    """Files to read, by key; the headers are the first that CMake would find."""
    patterns = (f"{prefix}/[iI]nclude/vulkan/vulkan_core.h" for prefix in vulkan_prefixes())
    headers = [path for pattern in patterns for path in matching(pattern)]
    return [*FILES.items(), *(("vulkan_core.h", path) for path in headers[:1])]


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
        release = platform.freedesktop_os_release()
    except OSError:
        return f"Linux {platform.release()}", ""
    kin = [release.get("ID", ""), *release.get("ID_LIKE", "").split()]
    family = next((f for f in ("debian", "fedora") if f in kin), "")
    if not family and any(word in ("ubuntu", "rhel", "centos") for word in kin):
        family = "debian" if "ubuntu" in kin else "fedora"
    return release.get("PRETTY_NAME", release.get("NAME", "Linux")), family


def disk_free(folder: Path) -> int:
    """Bytes free where `folder` is or would be made."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(existing).free


def fingerprint(cuda: str = "") -> str:
    """A hash over everything that a choice of backend depends on; `cuda`: a toolkit's folder."""
    facts: list[Any] = [FINGERPRINT_RULES, host.platform_tag(), host.cpu_identity(), cuda]
    facts.append([os.environ.get(name) for name in VARIABLES])
    commands = tool_commands(host.platform_tag().partition("-")[0], os.environ.get("CXX", ""))
    facts.append(
        {name: [path, mtime_ns(path)] for name, path in find_programs(commands, cuda).items()}
    )
    facts.append([path for pattern in DEVICE_PATHS for path in matching(pattern)])
    facts.append(read("/proc/driver/nvidia/version"))
    folders = (*LIBRARIES, *(f"{prefix}/include/vulkan" for prefix in PREFIXES))
    facts.append([mtime_ns(folder) for folder in folders])
    # of toolkits, which lie in folders of their own
    toolkits = (cuda, *matching("/usr/local/cuda*"), "/opt/cuda")
    facts.append([sorted(cuda_parts(toolkit)) for toolkit in toolkits])
    facts.append(sorted(other_parts()))
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def mtime_ns(path: str) -> int:
    """The modification time of a file or folder in ns; 0 where there is none."""
    try:
        return Path(path).stat().st_mtime_ns
    except OSError:
        return 0
