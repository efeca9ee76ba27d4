"""This machine, as far as its speed depends on it: the key under which what was measured is kept.
It names neither the machine nor its user, and is read without starting a program on Linux."""

from __future__ import annotations

import os
import platform
import re
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path

from msgspec import Struct

from pipeline.core import capacity

GIB = 1024**3
CPUINFO = Path("/proc/cpuinfo")
PCI = Path("/sys/bus/pci/devices")
NVIDIA = Path("/proc/driver/nvidia/version")
DISPLAY = "0x03"  # the class of a PCI device that is a graphics card begins with it
FIRST_BYTES = 8192  # of /proc/cpuinfo: the first processor stands there


class Hardware(Struct, frozen=True, kw_only=True):
    """The machine: `memory` in GiB, each card by its vendor and device number, the driver of
    NVIDIA's cards by its version; empty where there is none, or it is not known."""

    processor: str
    processors: int
    memory: int
    cards: tuple[str, ...] = ()
    driver: str = ""


@cache
def describe() -> Hardware:
    """This machine."""
    cards, driver = _cards()
    return Hardware(
        processor=_processor(),
        processors=capacity.processors(),
        memory=round(_memory() / GIB),
        cards=cards,
        driver=driver,
    )


def _processor() -> str:
    with suppress(OSError):
        text = CPUINFO.read_bytes()[:FIRST_BYTES].decode("utf-8", "replace")
        if name := re.search(r"^(?:model name|Model)\s*:\s*(.+)$", text, re.M):
            return name[1].strip()
    return f"{platform.processor() or platform.machine()} {platform.machine()}"


def _memory() -> int:
    """The machine's memory in bytes."""
    with suppress(AttributeError, ValueError, OSError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return capacity.total()


def _cards() -> tuple[tuple[str, ...], str]:
    """The graphics cards, and the version of NVIDIA's driver."""
    if sys.platform == "win32":
        from pipeline.bins.hardware import nvidia
        from pipeline.core.process import capture

        answer = capture(["nvidia-smi", *nvidia.CARD_QUERY], timeout=10)
        gpus = nvidia.parse_cards(answer or "")
        return tuple(gpu.name for gpu in gpus), gpus[0].driver if gpus else ""
    cards = []
    with suppress(OSError):
        for device in sorted(PCI.iterdir()):
            if _text(device / "class").startswith(DISPLAY):
                cards.append(f"{_text(device / 'vendor')}:{_text(device / 'device')}")
    version = re.search(r"\b\d+\.\d+(?:\.\d+)?\b", _text(NVIDIA))
    return tuple(cards), version[0] if version else ""


def _text(path: Path) -> str:
    with suppress(OSError):
        return path.read_text(encoding="ascii", errors="replace").strip()
    return ""
