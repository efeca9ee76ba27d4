"""The NVIDIA cards of this machine and their memory, as their driver tells it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass

from pipeline.core.process import outcome

QUERY = ("--query-gpu=name,memory.total,memory.free", "--format=csv,noheader,nounits")
MIB = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One card; memory in bytes."""

    name: str
    total: int
    free: int


def parse(text: str) -> list[Gpu]:
    """nvidia-smi's lines, with memory in MiB; what is no such line is left out."""
    found = []
    for line in text.splitlines():
        name, _, rest = line.rpartition(",")
        name, _, total = name.rpartition(",")
        if name and total.strip().isdecimal() and rest.strip().isdecimal():
            found.append(Gpu(name=name.strip(), total=int(total) * MIB, free=int(rest) * MIB))
    return found


def find() -> list[Gpu]:
    """The cards that nvidia-smi lists; none where it is missing, fails or hangs."""
    program = shutil.which("nvidia-smi")
    status, out, _ = outcome([program, *QUERY], timeout=10) if program else (-1, "", "")
    return parse(out) if status == 0 else []
