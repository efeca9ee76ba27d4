"""Which models make room for another, and which waiting model is loaded next.

Pure decisions on the numbers passed in: nothing here measures, waits or stops anything.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from msgspec import Struct

from pipeline.core.errors import UsageError
from pipeline.core.text import byte_count, size

Bytes = Mapping[str, int]  # by device, such as `ram` and `gpu0`
TOTAL = "all devices"  # in a budget: what all of them may hold together
PATIENCE = 20.0  # seconds that a request waits before others are held back for it
RECENT = 10.0  # seconds after which a use counts a third of one that is new
OFTEN = 10  # such uses of a model, begun and ended requests: room for another one waits its time


class Resident(Struct, frozen=True):
    """A model that is loaded, or being loaded. Busy: a request is under way, or waits for it."""

    name: str
    need: Bytes
    last_use: float  # seconds of any clock; later if used often: see `used_again`
    load_seconds: float = 0
    priority: int = 0
    is_pinned: bool = False
    is_busy: bool = False


class Placement(Struct, frozen=True):
    """How a model gets its memory: at once, where nothing has to be unloaded.

    `hold` are busy models: the one that waits gets its memory once they are idle. `problem` says
    why it can never be loaded.
    """

    unload: tuple[str, ...] = ()
    hold: tuple[str, ...] = ()
    problem: str = ""

    @property
    def is_at_once(self) -> bool:
        """Whether it gets it with nothing unloaded."""
        return not (self.unload or self.hold or self.problem)


class Waiting(Struct, frozen=True):
    """The requests for one model that is not loaded."""

    name: str
    since: float  # of the oldest, in seconds of the clock that `order` is given
    requests: int = 1
    priority: int = 0


class Claim(Struct):
    """A server's claim to memory. Times are those of time.monotonic()."""

    is_granted: bool = False  # it has been given its memory
    wanted_since: float | None = None  # by a user, or by `up`
    short_since: float | None = None  # of memory that others hold
    unloading_since: float = 0.0
    ends: bool = False  # the process ends once it is unloaded, even where it could sleep
    cannot_sleep: bool = False  # it failed to fall asleep, or to wake


def amount(held: Bytes, device: str) -> int:
    """Bytes on one device, or on all."""
    return sum(held.values()) if device == TOTAL else held.get(device, 0)


def budget(setting: str | Mapping[str, str], machine: Bytes) -> dict[str, int]:
    """What models may take together, by device. `machine` is what its devices have.

    `auto` is all of it, a share such as `80%` that of each device, an amount such as `20GiB` what
    all devices hold together; a table has one of them for each device it names, and the others are
    free. Raises UsageError.
    """
    if isinstance(setting, Mapping):
        unknown = [name for name in setting if name not in machine]
        if unknown:
            raise UsageError(
                f"memory.{unknown[0]}: this machine has no such device", ", ".join(machine)
            )
        return {name: part(value, machine[name]) for name, value in setting.items()}
    if setting == "auto":
        return dict(machine)
    if setting.endswith("%"):
        return {name: part(setting, has) for name, has in machine.items()}
    return {TOTAL: part(setting, sum(machine.values()))}


def part(setting: str, whole: int) -> int:
    """The bytes of a size such as `20GiB`, or of a share of the whole such as `80%`. Raises
    ValueError."""
    if share := re.fullmatch(r"(\d+(?:\.\d+)?) ?%", setting, re.A):
        if not 0 < float(share[1]) <= 100:
            raise ValueError(setting)
        return int(whole * float(share[1]) / 100)
    if count := byte_count(setting):
        return count
    raise ValueError(setting)


def place(
    name: str,
    need: Bytes,
    residents: Sequence[Resident],
    budget: Bytes,
    free: Bytes | None = None,
) -> Placement:
    """How the model `name` gets what it needs. `free` is what the machine itself says is left now,
    for the devices of which that is known.

    Idle models make room: those of lower priority first, then those whose last use is longest ago;
    of these, each stays that turns out not to be needed, those that load slowest first.
    """
    others = [resident for resident in residents if resident.name != name]
    pinned = [resident for resident in others if resident.is_pinned]
    if problem := _never(need, pinned, budget):
        return Placement(problem=problem)
    short = _short(need, others, budget, free or {})
    if not short:
        return Placement()
    movable = [resident for resident in others if not resident.is_pinned]
    if chosen := _cover(short, [resident for resident in movable if not resident.is_busy]):
        return Placement(unload=chosen)
    if chosen := _cover(short, movable):
        busy = {resident.name for resident in movable if resident.is_busy}
        return Placement(hold=tuple(name for name in chosen if name in busy))
    missing = {device: count - _sum(movable, device) for device, count in short.items()}
    figures = ", ".join(f"{size(x)} of {device}" for device, x in missing.items() if x > 0)
    return Placement(problem=f"other programs hold memory that it needs: {figures} are missing")


def used_again(before: float, now: float) -> float:
    """A model's last use, where one comes after `before`: now, and later by the uses shortly before
    it, so that of two models the one that is used more often stays."""
    return now + RECENT * math.log1p(math.exp((before - now) / RECENT))


def pause(waiting: Waiting, leaving: Sequence[Resident], now: float, longest: float) -> float:
    """Seconds from now until the models `leaving` make room: none where they are hardly used, up to
    `longest` from the first request on where they are used often, less where several requests
    wait. Meanwhile more requests for the same model come, which one load answers."""
    uses = sum(math.exp((model.last_use - now) / RECENT) for model in leaving)
    return waiting.since + longest * min(1, uses / OFTEN) / waiting.requests - now


def order(waiting: Sequence[Waiting], now: float, patience: float = PATIENCE) -> list[Waiting]:
    """The order of loading: first what has waited longer than `patience` seconds, the oldest first;
    then by priority, by the number of requests that one load answers, and by age."""

    def key(each: Waiting) -> tuple[bool, float, float, float]:
        if now - each.since > patience:
            return (False, each.since, 0, 0)
        return (True, -each.priority, -each.requests, each.since)

    return sorted(waiting, key=key)


def _never(need: Bytes, pinned: Sequence[Resident], budget: Bytes) -> str:
    """Why a model can never be loaded, whatever is unloaded."""
    for device, allowed in budget.items():
        wanted, kept = amount(need, device), _sum(pinned, device)
        if wanted + kept > allowed:
            beside = f", and pinned models hold {size(kept)} of it" if kept else ""
            return f"it needs {size(wanted)} of {device}; models may take {size(allowed)}{beside}"
    return ""


def _short(
    need: Bytes, residents: Sequence[Resident], budget: Bytes, free: Bytes
) -> dict[str, int]:
    """The bytes that are missing, by device."""
    missing: dict[str, int] = {}
    for device in dict.fromkeys((*budget, *free)):
        wanted = amount(need, device)
        rooms = []
        if device in budget:
            rooms.append(budget[device] - _sum(residents, device))
        if device in free:
            rooms.append(free[device])
        if wanted > min(rooms):
            missing[device] = wanted - min(rooms)
    return missing


def _sum(residents: Sequence[Resident], device: str) -> int:
    return sum(amount(resident.need, device) for resident in residents)


def _cover(short: Bytes, candidates: Sequence[Resident]) -> tuple[str, ...]:
    """The candidates to unload so that nothing is short; none where all of them are not enough."""

    def covers(chosen: Sequence[Resident]) -> bool:
        return all(_sum(chosen, device) >= count for device, count in short.items())

    chosen: list[Resident] = []
    for each in sorted(candidates, key=lambda x: (x.is_busy, x.priority, x.last_use)):
        if covers(chosen):
            break
        if any(amount(each.need, device) for device in short):
            chosen.append(each)
    if not covers(chosen):
        return ()
    for each in sorted(chosen, key=lambda x: (-x.priority, -x.load_seconds, -x.last_use)):
        rest = [other for other in chosen if other is not each]
        if covers(rest):
            chosen = rest
    return tuple(each.name for each in chosen)
