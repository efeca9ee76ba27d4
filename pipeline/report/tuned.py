"""What `tune` found, as it is kept in `run/tuned/`: a file for each program, model, machine and
context; and beside it the runs of a search that was not finished."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from msgspec import Struct, convert, field, to_builtins

from pipeline.core.store import json_file
from pipeline.core.store.publish import remove

from .figures import Estimate
from .host import Hardware
from .tuning_axes import Setting

SCHEMA = 1
FOLDER = "tuned"


class Conditions(Struct, frozen=True, kw_only=True):
    """What a result is valid for. `program` and `model` are sha256 in hex; `ctx_size` is the
    context that the user named, in tokens, 0: the one that fits; `placed` are the user's options
    that decide on which device the model lies, and what drafts for it."""

    program: str
    model: str
    host: Hardware
    ctx_size: int = 0
    placed: Mapping[str, str] = field(default_factory=dict)

    def place(self, run: Path) -> Path:
        """The file of the result, below a home's `run`."""
        text = json.dumps([SCHEMA, to_builtins(self)], sort_keys=True)
        return run / FOLDER / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"


class TuneResult(Struct, frozen=True, kw_only=True):
    """A result. `options` are llama-server's without dashes, empty where nothing is faster than the
    defaults; `ratio` is the speed with them to that without, over a whole request, by llama-bench,
    `served` by llama-server itself, None where it was not asked."""

    key: Conditions
    options: dict[str, str]
    given: dict[str, str] = field(default_factory=dict)  # options of the user, with which it holds
    ratio: Estimate
    served: float | None = None
    spread: float = 0.0  # of the default, from run to run: a relative standard deviation
    prompt: float = 0.0  # tokens a second with the options
    decode: float = 0.0  # the same of writing, 0 for a model that only embeds
    bandwidth: float = 0.0  # bytes of memory a second that can be read here; 0: not measured
    bandwidth_share: float = 0.0  # of it, that writing reads in weights
    left_out: dict[str, str] = field(default_factory=dict)  # settings that failed, and why
    untried: tuple[str, ...] = ()  # axes for which no time was left
    notes: tuple[str, ...] = ()
    lossy: bool = False  # whether the cache may have been compressed
    seconds: float = 0.0
    at: str = ""  # as receipts write a time


def load(path: Path) -> TuneResult | None:
    """The result at `path`; None where there is none, or none that can be read."""
    return json_file.read(path, _parse)


def _parse(data: Any) -> TuneResult:
    if data["schema"] != SCHEMA:
        raise ValueError("another version's")
    return convert(data["tuned"], TuneResult)


def save(path: Path, tuned: TuneResult) -> None:
    """Keep a result, and drop the runs that led to it. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    json_file.write(path, {"schema": SCHEMA, "tuned": to_builtins(tuned)}, indent=1)
    remove(runs_of(path))


def drop(path: Path) -> None:
    """Forget a result and its runs."""
    remove(path)
    remove(runs_of(path))


def sweep(path: Path) -> None:
    """Remove the runs that a search left which was killed right after it had kept its result. Those
    of a later search, which was stopped, stay."""
    with suppress(OSError):
        if runs_of(path).stat().st_mtime_ns <= path.stat().st_mtime_ns:
            remove(runs_of(path))


def runs_of(path: Path) -> Path:
    """Where the runs of an unfinished search for the result at `path` are kept."""
    return path.with_suffix(".runs")


class Runs:
    """The runs of a search, one after the other for each setting and phase. Those that an earlier
    search, which was stopped, has made with the same options of the user (`given`) are used first,
    in their order."""

    def __init__(self, path: Path, given: Mapping[str, str] | None = None) -> None:
        self._path, self._given = path, dict(given or {})
        self._all: list[list[Any]] = json_file.read(path, self._parse) or []
        self._kept: dict[str, deque[tuple[float, ...]]] = defaultdict(deque)
        for name, samples in self._all:
            self._kept[name].append(tuple(samples))

    @property
    def are_resumed(self) -> bool:
        """Whether an earlier search has left some."""
        return any(self._kept.values())

    def take(self, setting: Setting, phase: str) -> Sequence[float] | None:
        """The samples of the next run that is kept, in tokens a second; None where none is left."""
        kept = self._kept[_name(setting, phase)]
        return kept.popleft() if kept else None

    def add(self, setting: Setting, phase: str, samples: Sequence[float]) -> None:
        """Keep a new run. One that cannot be written is measured again the next time."""
        self._all.append([_name(setting, phase), [*samples]])
        with suppress(OSError):
            json_file.write_private(self._path, {"given": self._given, "runs": self._all})

    def _parse(self, data: Any) -> list[list[Any]]:
        runs = data["runs"] if data["given"] == self._given else []
        return [[str(name), [float(x) for x in samples]] for name, samples in runs if samples]


def _name(setting: Setting, phase: str) -> str:
    return json.dumps([phase, *sorted(setting.items())])
