"""What CUDA needs of a machine: a card that answers, and a toolkit that fits card and driver."""

from __future__ import annotations

from .cuda_versions import FIRST_TOOLKIT, LOWEST_CAPABILITY, LOWEST_DRIVER
from .detect import NVIDIA, Host
from .lacks import DEVICE, TOOLKIT, Missing, dotted, numbers


def seen(host: Host) -> bool:
    """Whether there is a card of NVIDIA's, working or not."""
    found = host.nvidia or NVIDIA in host.vendors or host.nvidia_driver
    return bool(found or "nvidia-smi" in host.problems)


def nvidia_card(host: Host) -> list[Missing]:
    """A card that answers, and that programs can use."""
    if host.system == "macos":
        return [Missing("a system with NVIDIA's driver: there is none for macOS", "", DEVICE)]
    fault = host.problems.get("nvidia-smi")
    driver = "nvidia driver"
    if host.nvidia:
        if all(card.split for card in host.nvidia) and not host.slices:
            made = "MIG is on and none is made (nvidia-smi mig -cgi … -C)"
            return [Missing(f"a MIG slice: {made}", "", DEVICE)]
        return []
    if fault:
        return [Missing(f"a driver that answers; nvidia-smi: {fault}", driver, DEVICE)]
    if host.nvidia_driver:
        loaded = f"nvidia-smi, though driver {host.nvidia_driver} is loaded"
        return [Missing(loaded, driver, DEVICE)]
    if NVIDIA in host.vendors:
        return [Missing("the NVIDIA driver for the card that is here", driver, DEVICE)]
    if host.wsl:
        windows = "under WSL the driver is installed in Windows, not here"
        return [Missing(f"an NVIDIA card; {windows}", "", DEVICE)]
    return [Missing("an NVIDIA card with its driver", "", DEVICE)]


def toolkit(host: Host, notes: list[str]) -> list[Missing]:
    """nvcc and the parts of its toolkit, which are packages of their own."""
    nvcc = host.tools.get("nvcc")
    if nvcc is None:
        return [Missing("the CUDA toolkit (nvcc)", "cuda", TOOLKIT)]
    lacks = []
    if "cublas" not in host.parts:
        lacks.append(Missing(f"cuBLAS for CUDA {nvcc.version}", "cublas", TOOLKIT))
    if "libcuda" not in host.parts:
        lacks.append(Missing(f"the libcuda stub of CUDA {nvcc.version}", "libcuda", TOOLKIT))
    if host.slices:
        notes.append(f"MIG slices: {', '.join(host.slices)}")
    lacks += fitting(host, (*numbers(nvcc.version), 0)[:2], notes)
    different = {numbers(card.capability) for card in host.nvidia if card.capability}
    if len(different) > 1:
        each = ", ".join(map(dotted, sorted(different)))
        notes.append(f"cards of different compute capability: {each}")
    return lacks


def fitting(host: Host, version: tuple[int, ...], notes: list[str]) -> list[Missing]:
    """That the toolkit of this version compiles for the cards, and the driver runs the result."""
    lacks = []
    lowest = LOWEST_CAPABILITY.get(version[0], (0, 0))
    cards = {
        f"{card.name} ({card.capability})": numbers(card.capability)
        for card in host.nvidia
        if card.capability
    }
    too_old = [name for name, capability in cards.items() if capability < lowest]
    limit = f"CUDA {version[0]} compiles for {dotted(lowest)} and newer"
    for name in too_old:
        if len(too_old) == len(cards):
            lacks.append(Missing(f"an older toolkit for {name}: {limit}", "cuda", TOOLKIT))
        else:
            notes.append(f"{name} is left out: {limit}")
    for name, capability in cards.items():
        first = FIRST_TOOLKIT.get(capability, (0, 0))
        if version < first:
            newer = f"CUDA {dotted(first)} or newer for {name}"
            lacks.append(Missing(newer, "cuda", TOOLKIT))
    lowest_driver = LOWEST_DRIVER.get(version[0], 0)
    for driver in sorted({card.driver for card in host.nvidia}):
        if driver[:1].isdecimal() and numbers(driver)[0] < lowest_driver:  # L4T counts otherwise
            told = f"driver {lowest_driver} or newer for CUDA {version[0]}; {driver} is here"
            lacks.append(Missing(told, "nvidia driver", TOOLKIT))
    return lacks
