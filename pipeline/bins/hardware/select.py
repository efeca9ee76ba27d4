"""Which backend, and why; remembered for as long as the machine stays as it was."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.bins import platform
from pipeline.bins.build_options import AUTO, BACKENDS, SYSTEM, BuildOptions
from pipeline.core.errors import PipelineError, doitw
from pipeline.core.paths import Home
from pipeline.core.store.publish import publish_text

from . import cuda_versions, requirements
from .cuda_versions import LOWEST_CAPABILITY, dotted, numbers
from .detect import Host, detect
from .nvidia import driver_library
from .probe import fingerprint, probe
from .providers import provider
from .requirements import DEVICE, TOOL, TOOLKIT, Missing, Report

WHEELS = "wheels"
# The tools whose versions a build depends on.
TOOLCHAINS = {"cuda": ("nvcc",), "hip": ("hipcc",), "sycl": ("icpx",), "vulkan": ("glslc",)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The choice, and what it needs and lacks: each lack in a line that says what to install.

    `cards` are compute capabilities or gfx names, `tools` paths and versions. `toolkit`: system or
    wheels, for CUDA."""

    backend: str
    why: str = ""
    warnings: tuple[str, ...] = ()
    device_lacks: tuple[str, ...] = ()
    build_lacks: tuple[str, ...] = ()
    cards: tuple[str, ...] = ()
    tools: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    toolkit: str = ""
    toolkit_folder: str = ""
    driver: str = ""
    libcuda: str = ""  # the driver's own library, where no stub is there to link with

    def require_device(self) -> None:
        """Raise PipelineError where what it is for is not here, or does not work."""
        self._require(
            self.device_lacks, f"{doitw('doctor')} lists what is here; backend=cpu always works"
        )

    def require_tools(self) -> None:
        """Raise PipelineError where it cannot be compiled here."""
        if self.backend == "cpu":
            platform.require_compiler()
        self._require(self.build_lacks, f"{doitw('doctor')} lists what is here")

    def _require(self, lacks: Sequence[str], hint: str) -> None:
        if lacks:
            told = "".join(f"\n  {lack}" for lack in lacks)
            raise PipelineError(
                f"backend={self.backend} is not possible here; missing:{told}", hint
            )


def select(wish: BuildOptions, home: Home) -> Selection:
    """The choice for this machine: remembered for as long as the machine stays as it was."""
    if wish.backend == "cpu":
        return Selection(backend="cpu", why="asked for")
    folder = wish.toolkit if wish.toolkit not in (AUTO, SYSTEM) else ""
    now = fingerprint(folder)
    book = home.run / "backends.json"
    question = json.dumps([wish.way, wish.backend, wish.toolkit, wish.is_for_elsewhere])
    known = load(book, now)
    if remembered := of_plain(known.get(question)):
        return remembered
    facts = probe(home, folder)
    chosen = choose(detect(facts), wish)
    if chosen.toolkit == WHEELS:
        chosen = replace(chosen, libcuda=str(driver_library() or ""))
    # What hangs or is missing may be mended before the next run.
    if not chosen.build_lacks and not any(told.hung for told in facts.told.values()):
        save(book, now, {**known, question: asdict(chosen)})
    return chosen


def forget(home: Home) -> None:
    """Look anew the next time."""
    (home.run / "backends.json").unlink(missing_ok=True)


def load(book: Path, machine: str) -> dict[str, Any]:
    """What was chosen before on the machine as it is now."""
    try:
        told = json.loads(book.read_text(encoding="utf-8"))
        choices = told["choices"] if told["machine"] == machine else {}
        return dict(choices)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def save(book: Path, machine: str, choices: Mapping[str, Any]) -> None:
    # A home that is not there yet is made by the steps, not by who looks at them.
    with contextlib.suppress(OSError):  # only a loss of time
        publish_text(book, json.dumps({"machine": machine, "choices": choices}))


def of_plain(told: Any) -> Selection | None:
    """A selection as it was written down; None where that is none, or another version's."""
    form = json.loads(json.dumps(asdict(Selection(backend=AUTO))))
    try:
        if {name: type(value) for name, value in told.items()} != {n: type(form[n]) for n in form}:
            return None
        if told["backend"] not in BACKENDS:
            return None
        lists = {n: tuple(map(str, told[n])) for n in form if isinstance(form[n], list)}
        tools = {n: (str(path), str(version)) for n, (path, version) in told["tools"].items()}
        return Selection(**{**told, **lists, "tools": tools})
    except (AttributeError, TypeError, ValueError):
        return None


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
            versions = {"nvcc": ("", cuda_versions.CUDA_13.version)}
        build, notes = [*lacks, *requirements.compiler(machine)], []
        if wish.way == "build" and (made := numbers(nvcc(versions))):
            unfit = requirements.missing_for_version(machine, made, notes)
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
    lacks = requirements.missing_toolkit(machine, [])
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
