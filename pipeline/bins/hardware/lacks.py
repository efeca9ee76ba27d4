"""What is said of a backend on a machine: what it lacks, and what kind of thing that is."""

from __future__ import annotations

from dataclasses import dataclass

USABLE, MISSING = "usable", "missing"
# What kind of thing is missing: programs need the device to run, a compilation needs the rest.
# Of the toolkit it may be that another one does.
DEVICE, TOOLKIT, TOOL = "device", "toolkit", "tool"


@dataclass(frozen=True, slots=True)
class Missing:
    """Something missing, and the key in PACKAGES of what provides it; empty: nothing does."""

    what: str
    package: str = ""
    kind: str = TOOL


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Whether a backend can be built and run here. `seen`: a card that it is for is here, whether
    or not it works; `software`: the only device is a program."""

    backend: str
    lacks: tuple[Missing, ...] = ()
    notes: tuple[str, ...] = ()
    seen: bool = False
    software: bool = False

    @property
    def state(self) -> str:
        return MISSING if self.lacks else USABLE

    def of(self, *kinds: str) -> tuple[Missing, ...]:
        """What of these kinds is missing."""
        return tuple(lack for lack in self.lacks if lack.kind in kinds)


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(word) for word in version.split(".") if word.isdecimal())


def dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
