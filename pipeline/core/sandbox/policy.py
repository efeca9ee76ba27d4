"""What a program in the sandbox may access."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from msgspec import Struct

# Libraries and their data. /etc and /opt also contain secrets, so only parts of them.
SYSTEM = (
    *("/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin"),
    *("/nix/store", "/gnu/store", "/run/current-system", "/home/linuxbrew/.linuxbrew"),
    *("/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/ld.so.preload"),
    *("/etc/alternatives", "/etc/localtime", "/etc/ssl/openssl.cnf", "/etc/crypto-policies"),
    *("/etc/hosts", "/etc/host.conf", "/etc/gai.conf", "/etc/nsswitch.conf", "/etc/resolv.conf"),
)
LIBRARY_VARIABLES = (
    *("LD_LIBRARY_PATH", "LD_PRELOAD", "CUDA_PATH", "CUDA_HOME", "ROCM_PATH", "HIP_PATH"),
    *("VULKAN_SDK", "VK_ICD_FILENAMES", "VK_DRIVER_FILES", "VK_LAYER_PATH", "ONEAPI_ROOT"),
)
SYSTEM_GLOBS = ("/opt/rocm*", "/opt/intel", "/opt/cuda*", "/opt/nvidia", "/opt/amdgpu*")
KERNEL = (
    *("/proc/cpuinfo", "/proc/meminfo", "/proc/stat", "/proc/version", "/proc/filesystems"),
    *("/proc/sys/vm/overcommit_memory", "/proc/sys/vm/max_map_count"),
    "/proc/sys/kernel/numa_balancing",
    *("/sys/devices/system", "/sys/fs/cgroup", "/sys/kernel/mm/transparent_hugepage"),
    *("/dev/urandom", "/dev/random"),
)
# Graphics drivers; they look up the cards in /proc and /sys.
GPU_KERNEL = ("/proc", "/sys", "/etc/OpenCL", "/etc/vulkan", "/etc/glvnd", "/run/opengl-driver")
GPU_DEVICES = ("/dev/nvidia*", "/dev/nvidia-caps/*", "/dev/dri/*", "/dev/kfd", "/dev/dxg")


class Sandbox(Struct, frozen=True, kw_only=True):
    """`programs` may be run, `read` be read, `write` be written: files, or folders with all that
    is below them. Paths that do not exist are left out, so make the files to be written first.

    `memory` is what it may allocate and `file_bytes` how long a file may become, in bytes.
    `ports` are the TCP ports it may listen on; None leaves the network open. `sockets` are folders
    in which it may listen on Unix sockets instead, and then it connects nowhere. `gpus` lets it
    reach the graphics cards.
    """

    programs: Sequence[Path]
    read: Sequence[Path] = ()
    write: Sequence[Path] = ()
    memory: int | None = None
    file_bytes: int | None = None
    ports: Sequence[int] | None = ()
    sockets: Sequence[Path] = ()
    gpus: bool = False


def executable(policy: Sandbox, env: Mapping[str, str]) -> Iterator[Path]:
    """Programs with the libraries beside them, and the system's."""
    for program in policy.programs:
        yield from with_libraries(program)
    for name in LIBRARY_VARIABLES:
        named = map(Path, env.get(name, "").split(os.pathsep))
        yield from (path for path in named if path.is_absolute())
    yield from map(Path, SYSTEM)
    for pattern in SYSTEM_GLOBS:
        yield from matching(pattern)
    for file in matching("/etc/ld.so.conf.d/*.conf"):
        with contextlib.suppress(OSError, ValueError):
            lines = file.read_text(encoding="utf-8").split()
            yield from (Path(line) for line in lines if line.startswith("/"))


def readable(policy: Sandbox) -> Iterator[Path]:
    """What may be read, but not executed."""
    yield from policy.read
    yield from map(Path, (*KERNEL, *(GPU_KERNEL if policy.gpus else ())))


def devices(policy: Sandbox) -> Iterator[Path]:
    """What may be read, written and controlled."""
    yield Path("/dev/null")
    if policy.gpus:
        for pattern in GPU_DEVICES:
            yield from matching(pattern)


def with_libraries(program: Path) -> Iterator[Path]:
    """The folder of a program, that of its link's target, and its installation's library folders.

    A virtual environment's Python is a link to the Python that it was made with.
    """
    for file in dict.fromkeys((program.absolute(), program.resolve())):
        yield file if file.parent == Path.home() else file.parent
        if file.parent.name in ("bin", "Scripts"):
            top = file.parent.parent
            yield from (top / name for name in ("lib", "lib64", "libexec", "Lib", "DLLs"))
            yield top / "pyvenv.cfg"


def matching(pattern: str) -> Iterable[Path]:
    """The paths that match an absolute pattern."""
    return Path("/").glob(pattern.lstrip("/")) if sys.platform != "win32" else ()
