"""The NVIDIA driver's own library, which a build links with where no toolkit has a stub of it."""

from __future__ import annotations

import platform
from pathlib import Path

from pipeline.core.process import capture

NAME = "libcuda.so.1"
# As ldconfig marks them; those of other programs on the same machine (32 bits) are left out.
MARKS = {"x86_64": "x86-64", "aarch64": "AArch64"}
# Where it may lie although ldconfig does not list it: WSL, NixOS.
PLACES = ("/usr/lib/wsl/lib", "/run/opengl-driver/lib")


def driver_library() -> Path | None:
    """The driver's library on this machine."""
    listed = in_cache(capture(["/sbin/ldconfig", "-p"]) or "", platform.machine())
    others = [Path(folder, NAME) for folder in PLACES]
    return next((path for path in (*listed, *others) if path.is_file()), None)


def in_cache(text: str, machine: str) -> list[Path]:
    """The places of it that `ldconfig -p` lists for programs of this machine."""
    found = []
    for line in text.splitlines():
        name, _, rest = line.strip().partition(" ")
        mark, _, path = rest.partition(" => ")
        if name == NAME and MARKS.get(machine, machine) in mark:
            found.append(Path(path))
    return found
