"""Which backend: asked for, or the best that works on the machine that was seen. No effects."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from pipeline.bins.build_options import AUTO, SYSTEM, BuildOptions
from pipeline.bins.compile import cuda_toolkit as toolkits

from . import cuda, requirements
from .cuda_versions import LOWEST_CAPABILITY
from .detect import Host
from .lacks import DEVICE, TOOL, TOOLKIT, Missing, Report, dotted, numbers
from .providers import provider
from .select import WHEELS, Selection

# The tools whose versions a build depends on.
TOOLCHAINS = {"cuda": ("nvcc",), "hip": ("hipcc",), "sycl": ("icpx",), "vulkan": ("glslc",)}


def choose(machine: Host, wish: BuildOptions) -> Selection:
    """The choice for this machine."""
    verdicts = requirements.verdicts(machine)
    if wish.backend != AUTO:
        return described(machine, wish, next(v for v in verdicts if v.backend == wish.backend))
    passed: list[str] = []
    for verdict in verdicts[:-1]:
        found = described(machine, wish, verdict)
        lacks = (*found.device_lacks, *found.build_lacks)
        if not lacks and not verdict.software:
            return replace(found, warnings=(*passed, *found.warnings))
        if lacks and verdict.seen:
            passed.append(f"{verdict.backend} is not used: it lacks {'; it lacks '.join(lacks)}")
    cpu = described(machine, wish, verdicts[-1])
    why = "no graphics card that can be used is here" if passed else "no graphics card is here"
    if passed:
        passed.insert(0, "the CPU is used, though a graphics card is here")
    return replace(cpu, why=why, warnings=(*passed, *cpu.warnings))


def described(machine: Host, wish: BuildOptions, verdict: Report) -> Selection:
    """What choosing this backend means here."""
    name, toolkit, notes = verdict.backend, "", list(verdict.notes)
    device, build = list(verdict.of(DEVICE)), list(verdict.of(TOOL, TOOLKIT))
    tools = {t: machine.tools[t] for t in TOOLCHAINS.get(name, ()) if t in machine.tools}
    versions = {t: (tool.path, tool.version) for t, tool in tools.items()}
    if name == "vulkan":
        versions["vulkan headers"] = ("", machine.vulkan_headers)
    if name == "cuda":
        # What is for other machines may be made although the cards here are of no use to it.
        judged = replace(machine, nvidia=()) if wish.is_for_elsewhere else machine
        toolkit, lacks = cuda_toolkit(judged, wish)
        if toolkit == WHEELS:
            versions = {"nvcc": ("", toolkits.CUDA_13.version)}
        build, notes = [*lacks, *requirements.compiler(machine)], []
        if wish.way == "build" and (made := numbers(nvcc(versions))):
            unfit = cuda.fitting(machine, made, notes)
            device += unfit if wish.is_for_elsewhere else []
    return Selection(
        backend=name,
        why=", ".join(devices(machine, name)) or "asked for",
        warnings=tuple(notes),
        device_lacks=lines(device, machine),
        build_lacks=lines(build, machine) if wish.way == "build" else (),
        cards=cards(machine, name, nvcc(versions)),
        tools=versions,
        toolkit=toolkit,
        toolkit_folder=machine.cuda if toolkit == SYSTEM else "",
        driver=machine.nvidia[0].driver if machine.nvidia else "",
    )


def cuda_toolkit(machine: Host, wish: BuildOptions) -> tuple[str, list[Missing]]:
    """Which toolkit is taken, and what it lacks: where no card is seen, the verdict does not look
    at it."""
    lacks = cuda.toolkit(machine, [])
    if not lacks or wish.toolkit != AUTO:
        return SYSTEM, lacks
    if requirements.wheels(machine):
        return WHEELS, []
    return SYSTEM, [*lacks, *requirements.no_wheels(machine)]


def nvcc(tools: Mapping[str, tuple[str, str]]) -> str:
    """Its version; empty where there is none."""
    return tools.get("nvcc", ("", ""))[1]


def cards(machine: Host, backend: str, version: str) -> tuple[str, ...]:
    """What to compile for: the gfx names of the cards, or their compute capabilities as far as the
    CUDA of this version compiles for them."""
    if backend == "hip":
        names = (re.search(r"gfx\w+", card) for card in machine.amd)
        return tuple(dict.fromkeys(name[0] for name in names if name))
    made = numbers(version)
    if backend != "cuda" or not made:
        return ()
    lowest = LOWEST_CAPABILITY.get(made[0], (0, 0))
    found = {numbers(card.capability) for card in machine.nvidia if card.capability}
    return tuple(dotted(capability) for capability in sorted(found) if capability >= lowest)


def devices(machine: Host, backend: str) -> list[str]:
    """The devices that a backend uses, by name."""
    if backend == "cuda":
        return [
            f"{card.name} ({card.capability or 'capability unknown'}), driver {card.driver}"
            for card in machine.nvidia
        ]
    if backend == "vulkan":
        return [device.name for device in machine.vulkan]
    names = {"hip": machine.amd, "sycl": machine.intel, "metal": machine.apple}
    return list(names.get(backend, ()))


def lines(lacks: Sequence[Missing], machine: Host) -> tuple[str, ...]:
    """Each lack with the command that provides it here."""
    told = []
    for lack in dict.fromkeys(lacks):
        install = provider(lack.package, machine.system, machine.family)
        told.append(f"{lack.what}: {install}" if install else lack.what)
    return tuple(told)
