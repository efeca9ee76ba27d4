"""Which backend, and why; remembered for as long as the machine stays as it was."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.bins import platform
from pipeline.bins.build_options import AUTO, BACKENDS, SYSTEM, BuildOptions
from pipeline.core.errors import PipelineError, doitw
from pipeline.core.paths import Home
from pipeline.core.store.publish import publish_text

from .fingerprint import fingerprint

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
    # What looks at the machine is rarely needed.
    from .choosing import choose
    from .cuda_driver import driver_library
    from .detect import detect
    from .probe import probe

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
