"""Which backend, and why. The choice is cached until the machine changes."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct, convert, field, to_builtins
from msgspec.structs import replace

from pipeline.bins.build_options import AUTO, BACKENDS, SYSTEM, BuildOptions
from pipeline.core.errors import PipelineError, doitw
from pipeline.core.paths import Home
from pipeline.core.store import json_file

from . import cuda_versions, detect, nvidia, providers, requirements
from .probe import fingerprint, probe

WHEELS = "wheels"
# The tools whose versions a build depends on.
TOOLCHAINS = {"cuda": ("nvcc",), "hip": ("hipcc",), "sycl": ("icpx",), "vulkan": ("glslc",)}


class Selection(Struct, frozen=True, kw_only=True):
    """The choice, and what is missing for it: a line each, with the command that installs it.

    `cards` are compute capabilities or gfx names, `tools` paths and versions. `toolkit`: system or
    wheels, for CUDA."""

    backend: str
    why: str = ""
    warnings: tuple[str, ...] = ()
    missing_device: tuple[str, ...] = ()
    missing_tools: tuple[str, ...] = ()
    cards: tuple[str, ...] = ()
    tools: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    toolkit: str = ""
    toolkit_folder: str = ""
    driver: str = ""
    libcuda: str = ""  # the driver's library, linked with where there is no stub

    def require_device(self) -> None:
        """Raise PipelineError where its device is missing or does not work."""
        self._require(
            self.missing_device, f"{doitw('doctor')} lists what is here; backend=cpu always works"
        )

    def require_tools(self) -> None:
        """Raise PipelineError where it cannot be compiled here."""
        if self.backend == "cpu":
            providers.require_compiler()
        self._require(self.missing_tools, f"{doitw('doctor')} lists what is here")

    def _require(self, missing: Sequence[str], hint: str) -> None:
        if missing:
            listed = "".join(f"\n  {item}" for item in missing)
            raise PipelineError(
                f"backend={self.backend} is not possible here; missing:{listed}", hint
            )


def select(options: BuildOptions, home: Home) -> Selection:
    """The choice for this machine, cached until the machine changes."""
    if options.backend == "cpu":
        return Selection(backend="cpu", why="requested")
    folder = options.toolkit if options.toolkit not in (AUTO, SYSTEM) else ""
    machine = fingerprint(folder)
    cache = home.run / "backends.json"
    key = json.dumps([options.source, options.backend, options.toolkit, options.is_for_elsewhere])
    choices = load(cache, machine)
    if remembered := parse(choices.get(key)):
        return remembered
    facts = probe(home, folder)
    selection = choose(detect.detect(facts), options)
    if selection.toolkit == WHEELS:
        selection = replace(selection, libcuda=str(nvidia.driver_library() or ""))
    # A missing or hanging tool may be fixed before the next run.
    if not selection.missing_tools and not any(output.hung for output in facts.outputs.values()):
        save(cache, machine, {**choices, key: to_builtins(selection)})
    return selection


def forget(home: Home) -> None:
    """Drop the cache, so that the machine is probed again."""
    (home.run / "backends.json").unlink(missing_ok=True)


def load(cache: Path, machine: str) -> dict[str, Any]:
    """The cached choices, if they were made on the machine as it is now."""
    stored = json_file.read(cache, lambda data: (data["machine"], dict(data["choices"])))
    return stored[1] if stored and stored[0] == machine else {}


def save(cache: Path, machine: str, choices: Mapping[str, Any]) -> None:
    # The steps create the home; looking at them does not.
    with contextlib.suppress(OSError):  # without the cache the machine is probed again
        json_file.write(cache, {"machine": machine, "choices": choices})


def parse(stored: Any) -> Selection | None:
    """The selection in a cache entry; None where it is damaged or of another version."""
    try:
        selection = convert(stored, Selection)
    except ValueError:
        return None
    is_whole = json.loads(json.dumps(to_builtins(selection))) == stored
    return selection if is_whole and selection.backend in BACKENDS else None


def choose(machine: detect.Host, options: BuildOptions) -> Selection:
    """The choice for this machine."""
    reports = requirements.reports(machine)
    if options.backend != AUTO:
        return describe(machine, options, next(v for v in reports if v.backend == options.backend))
    skipped: list[str] = []
    for report in reports[:-1]:
        selection = describe(machine, options, report)
        missing = (*selection.missing_device, *selection.missing_tools)
        if not missing and not report.software:
            return replace(selection, warnings=(*skipped, *selection.warnings))
        if missing and report.has_card:
            skipped.append(f"{report.backend} is not used; missing: {'; '.join(missing)}")
    cpu = describe(machine, options, reports[-1])
    why = "no usable graphics card is here" if skipped else "no graphics card is here"
    if skipped:
        skipped.insert(0, "falling back to CPU: the GPU cannot be used")
    return replace(cpu, why=why, warnings=(*skipped, *cpu.warnings))


def describe(machine: detect.Host, options: BuildOptions, report: requirements.Report) -> Selection:
    """The selection of this backend, with what it is missing here."""
    name, toolkit = report.backend, ""
    notes: Sequence[str] = report.notes
    device = [*report.of(requirements.DEVICE)]
    build = [*report.of(requirements.TOOL, requirements.TOOLKIT)]
    tools = {
        tool: (machine.tools[tool].path, machine.tools[tool].version)
        for tool in TOOLCHAINS.get(name, ())
        if tool in machine.tools
    }
    if name == "vulkan":
        tools["vulkan headers"] = ("", machine.vulkan_headers)
    if name == "cuda":
        toolkit, missing = cuda_toolkit(machine, options)
        build = [*missing, *requirements.compiler(machine)]
        if toolkit == WHEELS:
            tools = {"nvcc": ("", cuda_versions.CUDA_13.version)}
        unsupported, notes = unsupported_cards(machine, options, nvcc(tools))
        device += unsupported
    return Selection(
        backend=name,
        why=", ".join(devices(machine, name)) or "requested",
        warnings=tuple(notes),
        missing_device=with_hints(device, machine),
        missing_tools=with_hints(build, machine) if options.source == "build" else (),
        cards=cards(machine, name, nvcc(tools)),
        tools=tools,
        toolkit=toolkit,
        toolkit_folder=machine.cuda if toolkit == SYSTEM else "",
        driver=requirements.driver(machine),
    )


def cuda_toolkit(
    machine: detect.Host, options: BuildOptions
) -> tuple[str, list[requirements.Missing]]:
    """Which toolkit is taken, and what of it is missing. The report skips it where no card is."""
    if options.is_for_elsewhere:  # the cards here do not matter
        machine = replace(machine, nvidia=())
    missing, _ = requirements.missing_toolkit(machine)
    if not missing or options.toolkit != AUTO:
        return SYSTEM, missing
    if requirements.wheels(machine):
        return WHEELS, []
    return SYSTEM, [*missing, *requirements.no_wheels(machine)]


def unsupported_cards(
    machine: detect.Host, options: BuildOptions, version: str
) -> requirements.Finding:
    """What CUDA of this version lacks for the cards here, as errors and as notes."""
    numbered = cuda_versions.numbers(version) if options.source == "build" else ()
    if not numbered:
        return [], []
    missing, notes = requirements.missing_for_version(machine, numbered)
    return missing if options.is_for_elsewhere else [], notes


def nvcc(tools: Mapping[str, tuple[str, str]]) -> str:
    """The version of nvcc; empty where there is none."""
    return tools.get("nvcc", ("", ""))[1]


def cards(machine: detect.Host, backend: str, version: str) -> tuple[str, ...]:
    """What to compile for: the gfx names of the cards, or their compute capabilities as far as the
    CUDA of this version compiles for them."""
    if backend == "hip":
        names = (re.search(r"gfx\w+", card) for card in machine.amd)
        return tuple(dict.fromkeys(name[0] for name in names if name))
    numbered = cuda_versions.numbers(version)
    if backend != "cuda" or not numbered:
        return ()
    lowest = cuda_versions.LOWEST_CAPABILITY.get(numbered[0], (0, 0))
    capabilities = {
        cuda_versions.numbers(card.capability) for card in machine.nvidia if card.capability
    }
    return tuple(
        cuda_versions.dotted(capability)
        for capability in sorted(capabilities)
        if capability >= lowest
    )


def devices(machine: detect.Host, backend: str) -> list[str]:
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


def with_hints(missing: Sequence[requirements.Missing], machine: detect.Host) -> tuple[str, ...]:
    """What is missing, each with the command that installs it here."""
    texts = []
    for item in dict.fromkeys(missing):
        install = providers.provider(item.package, machine.system, machine.family)
        texts.append(f"{item.what}: {install}" if install else item.what)
    return tuple(texts)
