"""Memory by device: what processes use, and what the machine has. Main memory is `ram`, that of
NVIDIA's cards `gpu0` and so on."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from contextlib import suppress

import psutil
from msgspec import Struct

from pipeline.bins.hardware import nvidia
from pipeline.core import capacity
from pipeline.serve.placing import Bytes

FREE_SECONDS = 1.0  # as long the machine is not asked again


class DeviceMemory(Struct, frozen=True, kw_only=True):
    """The memory of one device, in bytes."""

    name: str
    total: int
    free: int  # for a new program


def devices(*, with_files: bool = False) -> list[DeviceMemory]:
    """The memory of the machine. `with_files`: memory that caches files in use counts as free."""
    total, free = capacity.total(), capacity.memory(with_files=with_files)
    return [
        DeviceMemory(name="ram", total=total, free=free),
        *(
            DeviceMemory(name=f"gpu{index}", total=gpu.total, free=gpu.free)
            for index, gpu in enumerate(nvidia.listed())
            if gpu.total
        ),
    ]


def used(processes: Iterable[psutil.Process], on_gpus: Mapping[int, Bytes]) -> dict[str, int]:
    """Bytes that the processes use, shared pages counted for each; empty where all have ended.
    `on_gpus` is the result of `nvidia.used`."""
    by_device: dict[str, int] = {}
    for process in processes:
        with suppress(psutil.Error):
            by_device["ram"] = by_device.get("ram", 0) + process.memory_info().rss
            for device, count in on_gpus.get(process.pid, {}).items():
                by_device[device] = by_device.get(device, 0) + count
    return by_device


def in_use(pid: int) -> dict[str, int]:
    """Bytes that a process and its children use; empty where it has ended."""
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        return used([process, *process.children(recursive=True)], nvidia.used())
    return {}


class FreeMemory:
    """The free memory, queried at most once a second: drivers are slow to answer."""

    def __init__(self) -> None:
        self._free: Bytes = {}
        self._asked = 0.0

    def free(self) -> Bytes:
        """Bytes that are free now."""
        now = time.monotonic()
        if now - self._asked > FREE_SECONDS:
            # The books count the files that loaded models hold; those of others can be dropped.
            self._free = {device.name: device.free for device in devices(with_files=True)}
            self._asked = now
        return self._free
