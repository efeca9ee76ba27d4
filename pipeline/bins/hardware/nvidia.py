"""The NVIDIA cards of this machine and their memory, as their driver tells it."""

from __future__ import annotations

import platform
import re
import shutil
from pathlib import Path

from msgspec import Struct

from pipeline.core.process import capture, outcome

FORM = "--format=csv,noheader,nounits"
QUERY = ("--query-gpu=name,memory.total,memory.free", FORM)
CARD_QUERY = ("--query-gpu=name,compute_cap,driver_version,mig.mode.current,memory.total", FORM)
OLD_CARD_QUERY = ("--query-gpu=name,driver_version,memory.total", FORM)  # before driver 510
MIB = 1024 * 1024
DRIVER_LIBRARY = "libcuda.so.1"
# As ldconfig marks them; those of other programs on the same machine (32 bits) are left out.
LDCONFIG_MARKS = {"x86_64": "x86-64", "aarch64": "AArch64"}
# Where it may lie although ldconfig does not list it: WSL, NixOS.
DRIVER_FOLDERS = ("/usr/lib/wsl/lib", "/run/opengl-driver/lib")


class Gpu(Struct, frozen=True, kw_only=True):
    """One card; memory in bytes."""

    name: str
    total: int
    free: int


class Card(Struct, frozen=True, kw_only=True):
    """What a build has to know of a card. What the driver does not tell is empty or None."""

    name: str
    capability: str = ""  # such as 8.9
    driver: str = ""
    total: int | None = None  # bytes
    split: bool = False  # MIG is on: programs see its slices, not the card


def count() -> int | None:
    """How many cards there are; None where no driver of NVIDIA's tells."""
    return len(find()) if shutil.which("nvidia-smi") else None


def parse(text: str) -> list[Gpu]:
    """nvidia-smi's lines, with memory in MiB; what is no such line is left out."""
    gpus = []
    for line in text.splitlines():
        name, _, rest = line.rpartition(",")
        name, _, total = name.rpartition(",")
        if name and total.strip().isdecimal() and rest.strip().isdecimal():
            gpus.append(Gpu(name=name.strip(), total=int(total) * MIB, free=int(rest) * MIB))
    return gpus


def parse_cards(text: str) -> list[Card]:
    """The lines of CARD_QUERY or OLD_CARD_QUERY. A line without a driver's version is no card:
    errors are printed in their place, with status 0 too."""
    cards = []
    for line in text.splitlines():
        words = [word.strip() for word in line.rsplit(",", 4)]
        if len(words) == 5 and re.fullmatch(r"\d+(\.\d+)+", words[2]):
            name, capability, driver, split, total = words
        else:
            words = [word.strip() for word in line.rsplit(",", 2)]
            if len(words) < 3 or not re.fullmatch(r"\d+(\.\d+)+", words[1]):
                continue
            (name, driver, total), capability, split = words, "", ""
        cards.append(
            Card(
                name=name,
                capability=capability if re.fullmatch(r"\d+\.\d+", capability) else "",
                driver=driver,
                total=int(total) * MIB if total.isdecimal() else None,
                split=split == "Enabled",
            )
        )
    return cards


def parse_slices(text: str) -> list[str]:
    """The MIG slices that `nvidia-smi -L` lists: their profiles, such as `1g.10gb`."""
    return re.findall(r"^\s+MIG (\S+)\s+Device", text, re.M)


def find() -> list[Gpu]:
    """The cards that nvidia-smi lists; none where it is missing, fails or hangs."""
    program = shutil.which("nvidia-smi")
    status, out, _ = outcome([program, *QUERY], timeout=10) if program else (-1, "", "")
    return parse(out) if status == 0 else []


def driver_library() -> Path | None:
    """The driver's library on this machine."""
    listed = listed_libraries(capture(["/sbin/ldconfig", "-p"]) or "", platform.machine())
    others = [Path(folder, DRIVER_LIBRARY) for folder in DRIVER_FOLDERS]
    return next((path for path in (*listed, *others) if path.is_file()), None)


def listed_libraries(text: str, machine: str) -> list[Path]:
    """The places of it that `ldconfig -p` lists for programs of this machine."""
    paths = []
    for line in text.splitlines():
        name, _, rest = line.strip().partition(" ")
        mark, _, path = rest.partition(" => ")
        if name == DRIVER_LIBRARY and LDCONFIG_MARKS.get(machine, machine) in mark:
            paths.append(Path(path))
    return paths
