"""Which backend, and why: asked for, or the best that works on this machine."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.core.errors import PipelineError
from pipeline.core.paths import Home
from pipeline.core.publish import publish_text

from . import cuda, host, readiness
from .cuda_driver import driver_library
from .detect import Host, detect
from .fingerprint import fingerprint
from .probe import probe
from .providers import provider
from .verdict import DEVICE, TOOL, TOOLKIT, Lack, Verdict, dotted, numbers
from .wish import AUTO, SYSTEM, Bins

# The tools whose versions a build depends on.
TOOLCHAINS = {"cuda": ("nvcc",), "hip": ("hipcc",), "sycl": ("icpx",), "vulkan": ("glslc",)}
WHEELS = "wheels"


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
        self._require(self.device_lacks, "doit doctor tells what is here; backend=cpu always works")

    def require_tools(self) -> None:
        """Raise PipelineError where it cannot be compiled here."""
        if self.backend == "cpu":
            host.require_compiler()
        self._require(self.build_lacks, "doit doctor tells what is here")

    def _require(self, lacks: Sequence[str], hint: str) -> None:
        if lacks:
            told = "".join(f"\n  {lack}" for lack in lacks)
            raise PipelineError(
                f"backend={self.backend} is not possible here; missing:{told}", hint
            )


def select(wish: Bins, home: Home) -> Selection:
    """The choice for this machine: remembered for as long as the machine stays as it was."""
    if wish.backend == "cpu":
        return Selection(backend="cpu", why="asked for")
    folder = wish.toolkit if wish.toolkit not in (AUTO, SYSTEM) else ""
    now = fingerprint(folder)
    book = home.run / "backends.json"
    question = json.dumps([now, wish.way, wish.backend, wish.toolkit])
    known = load(book)
    if remembered := of_plain(known.get(question)):
        return remembered
    chosen = choose(detect(probe(home, folder)), wish)
    if chosen.toolkit == WHEELS:
        chosen = replace(chosen, libcuda=str(driver_library() or ""))
    # What other states of the machine led to is of no use any more.
    kept = {q: s for q, s in known.items() if json.loads(q)[0] == now}
    try:
        book.parent.mkdir(parents=True, exist_ok=True)
        publish_text(book, json.dumps({**kept, question: asdict(chosen)}))
    except OSError:
        pass  # only a loss of time
    return chosen


def forget(home: Home) -> None:
    """Look anew the next time."""
    (home.run / "backends.json").unlink(missing_ok=True)


def load(book: Path) -> dict[str, Any]:
    try:
        known = json.loads(book.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def of_plain(told: Any) -> Selection | None:
    """A selection as it was written down; None where that is none, or another version's."""
    try:
        lists = {name: tuple(value) for name, value in told.items() if isinstance(value, list)}
        tools = {name: (path, version) for name, (path, version) in told["tools"].items()}
        return Selection(**{**told, **lists, "tools": tools})
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


def choose(machine: Host, wish: Bins) -> Selection:
    """The choice for the machine that was seen. No effects."""
    verdicts = readiness.verdicts(machine)
    if wish.backend != AUTO:
        return described(machine, wish, next(v for v in verdicts if v.backend == wish.backend))
    passed: list[str] = []
    for verdict in verdicts[:-1]:
        found = described(machine, wish, verdict)
        lacks = (*found.device_lacks, *found.build_lacks)
        if not lacks and not verdict.software:
            return replace(found, warnings=tuple(passed))
        if lacks and verdict.seen:
            passed.append(f"{verdict.backend} is not used: it lacks {'; it lacks '.join(lacks)}")
    cpu = described(machine, wish, verdicts[-1])
    why = "no graphics card that can be used is here" if passed else "no graphics card is here"
    if passed:
        passed.insert(0, "the CPU is used, though a graphics card is here")
    return replace(cpu, why=why, warnings=tuple(passed))


def described(machine: Host, wish: Bins, verdict: Verdict) -> Selection:
    """What choosing this backend means here."""
    name, build, toolkit = verdict.backend, list(verdict.of(TOOL, TOOLKIT)), ""
    tools = {t: machine.tools[t] for t in TOOLCHAINS.get(name, ()) if t in machine.tools}
    versions = {t: (tool.path, tool.version) for t, tool in tools.items()}
    if name == "vulkan":
        versions["vulkan headers"] = ("", machine.vulkan_headers)
    if name == "cuda":
        # where no card is seen, the verdict does not look at the toolkit
        lacks, toolkit = cuda.toolkit(machine, []), SYSTEM
        release = readiness.wheels(machine) if lacks and wish.toolkit == AUTO else None
        if release:
            lacks, toolkit, versions = [], WHEELS, {"nvcc": ("", release.version)}
        build = [*lacks, *readiness.compiler(machine)]
    return Selection(
        backend=name,
        why=", ".join(devices(machine, name)) or "asked for",
        device_lacks=lines(verdict.of(DEVICE), machine),
        build_lacks=lines(build, machine) if wish.way == "build" else (),
        cards=cards(machine, name, versions.get("nvcc", ("", ""))[1]),
        tools=versions,
        toolkit=toolkit,
        toolkit_folder=machine.cuda if toolkit == SYSTEM else "",
        driver=machine.nvidia[0].driver if machine.nvidia else "",
    )


def cards(machine: Host, backend: str, version: str) -> tuple[str, ...]:
    """What to compile for: the gfx names of the cards, or their compute capabilities as far as the
    CUDA of this version compiles for them."""
    if backend == "hip":
        names = (re.search(r"gfx\w+", card) for card in machine.amd)
        return tuple(dict.fromkeys(name[0] for name in names if name))
    if backend != "cuda" or not version:
        return ()
    lowest = cuda.LOWEST_CAPABILITY.get(numbers(version)[0], (0, 0))
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


def lines(lacks: Sequence[Lack], machine: Host) -> tuple[str, ...]:
    """Each lack with the command that provides it here."""
    told = []
    for lack in dict.fromkeys(lacks):
        install = provider(lack.package, machine.system, machine.family)
        told.append(f"{lack.what}: {install}" if install else lack.what)
    return tuple(told)
