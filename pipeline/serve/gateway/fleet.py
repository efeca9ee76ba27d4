"""Which instances there are and how they are, as the configuration's folder tells."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from pipeline.serve.server import GATEWAY, VLLM, Server
from pipeline.serve.supervisor.state import (
    READY,
    SETTLED,
    WAITING,
    DesiredState,
    Folder,
    Seen,
    State,
    read_state,
    read_wanted,
)

from .keys import Stamp, stamp


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """An instance that requests can be sent to, and how the supervisor sees it."""

    instance: Server
    state: str
    reason: str = ""
    ready_at: float | None = None

    @property
    def name(self) -> str:
        return self.instance.name

    @property
    def is_ready(self) -> bool:
        return self.state == READY

    @property
    def is_coming(self) -> bool:
        """Whether it is worth waiting for."""
        return self.state not in SETTLED

    @property
    def why(self) -> str:
        """The first line of the reason: the others come from a log."""
        return self.reason.strip().partition("\n")[0].rstrip(":")

    @property
    def served_name(self) -> str | None:
        """The model name that it insists on; llama-server takes any."""
        if self.instance.engine != VLLM:
            return None
        return next(iter(self.instance.aliases), self.name)


Group = tuple[Target, ...]


@dataclass(frozen=True, slots=True)
class Fleet:
    """All targets, and for each name and alias those that answer to it, in the order of the
    configuration. `folded` is the same without regard to letter case."""

    targets: Group = ()
    groups: dict[str, Group] = field(default_factory=dict)
    folded: dict[str, Group] = field(default_factory=dict)


def assemble(wanted: DesiredState | None, state: State | None) -> Fleet:
    """The fleet of what is wanted, each as it was last seen."""
    seen = {one.name: one for one in state.instances} if state else {}
    instances = [one for one in (wanted.instances if wanted else ()) if one.engine != GATEWAY]
    asked = wanted.asked if wanted else 0
    targets = tuple(_target(one, seen.get(one.name), asked) for one in instances)
    return Fleet(targets, _groups(targets, str), _groups(targets, str.casefold))


def _target(instance: Server, seen: Seen | None, asked: int) -> Target:
    if seen is None:
        return Target(instance=instance, state=WAITING)
    state = seen.state
    if state in SETTLED and state != READY and seen.asked < asked:
        state = WAITING  # it was given up before it was asked for anew
    return Target(instance=instance, state=state, reason=seen.reason, ready_at=seen.ready_at)


def _groups(targets: Group, fold: Callable[[str], str]) -> dict[str, Group]:
    groups: dict[str, Group] = {}
    for target in targets:
        for name in dict.fromkeys(map(fold, (target.name, *target.instance.aliases))):
            groups[name] = (*groups.get(name, ()), target)
    return groups


class View:
    """The configuration's folder, read again when the stamps of its files change."""

    def __init__(self, at: Folder) -> None:
        self._at = at
        self._stamps: tuple[Stamp, Stamp] | None = None
        self._fleet = Fleet()

    def now(self) -> Fleet:
        """The fleet as the files tell it now: two `stat` where nothing changed."""
        stamps = stamp(self._at.wanted), stamp(self._at.state)
        if stamps != self._stamps:
            wanted, state = read_wanted(self._at), read_state(self._at)
            if (wanted is None and stamps[0]) or (state is None and stamps[1]):
                return self._fleet  # there and not readable now: the last one holds till it is
            self._fleet, self._stamps = assemble(wanted, state), stamps
        return self._fleet
