"""What a network, a mirror or a damaged disk does to a download, as switches of the fake hub.

A fault is one small function that changes an `Answer` before it is sent. `KINDS` names them all.
Its options are the keyword arguments of that function; every fault also takes
  repo, path   which file; both may hold `*` (path "*" also stands for the model_info request)
  at           "api" (model_info), "hub" (resolve) or "cdn" (the second host); without it: all three
  skip, times  leave the first `skip` chances alone, then act `times` times (without it: always)
A chance is a request the fault could act on: a HEAD never spends the budget of `cut`.
"""

import hashlib
import inspect
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from typing import Any, BinaryIO, NamedTuple


@dataclass(slots=True, kw_only=True)
class Answer:
    """An answer about one file; sizes and positions in bytes, `stop` is exclusive."""

    size: int = 0
    etag: str = ""
    stated_size: int = field(init=False)
    start: int = 0
    stop: int = field(init=False)
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    bytes_per_second: float | None = None
    stall_after: int | None = None
    cut_after: int | None = None
    flip_at: int | None = None

    def __post_init__(self) -> None:
        self.stated_size = self.stop = self.size


def blocks(answer: Answer, stream: BinaryIO) -> Iterator[bytes]:
    """The bytes that really leave, at their pace; fewer than promised before a stall or a cut."""
    rate = answer.bytes_per_second
    # Twenty steps a second: slow, but never silent for long.
    step = int(rate / 20) + 1 if rate else 64 * 1024
    limits = [n for n in (answer.stall_after, answer.cut_after) if n is not None]
    stop = min([answer.stop, *(answer.start + n for n in limits)])
    at = stream.seek(answer.start)
    while at < stop:
        block = bytearray(stream.read(min(stop - at, step)))
        if answer.flip_at is not None and at <= answer.flip_at < at + len(block):
            block[answer.flip_at - at] ^= 0xFF
        if rate:
            time.sleep(len(block) / rate)
        yield bytes(block)
        at += len(block)


def slow(answer: Answer, *, bytes_per_second: float = 1024) -> None:
    answer.bytes_per_second = bytes_per_second


def stall(answer: Answer, *, after: int = 0) -> None:
    answer.stall_after = after


def cut(answer: Answer, *, after: int = 0) -> None:
    answer.cut_after = after


def flip_byte(answer: Answer, *, offset: int | None = None) -> None:
    # The middle by default: a damaged first byte would be found by any look at the magic.
    answer.flip_at = answer.size // 2 if offset is None else offset


def status416(answer: Answer) -> None:
    answer.status = 416


def ignore_range(answer: Answer) -> None:
    answer.status, answer.start, answer.stop = 200, 0, answer.size
    del answer.headers["Content-Range"]


def wrong_content_range(answer: Answer, *, shift: int = 1) -> None:
    # Only the header lies: the bytes are those that were asked for.
    first, last = answer.start + shift, answer.stop - 1 + shift
    answer.headers["Content-Range"] = f"bytes {first}-{last}/{answer.size}"


def etag_changes(answer: Answer) -> None:
    changed = hashlib.sha256(answer.etag.encode()).hexdigest()
    answer.etag = changed[: len(answer.etag)]


def own_etag(answer: Answer) -> None:
    # As mirrors do that know files by another hash.
    answer.etag = hashlib.sha1(answer.etag.encode()).hexdigest()


def wrong_size(answer: Answer, *, by: int = 1) -> None:
    answer.stated_size = answer.size + by


def status429(answer: Answer, *, retry_after: int = 1) -> None:
    answer.status = 429
    answer.headers["Retry-After"] = str(retry_after)


def status500(answer: Answer) -> None:
    answer.status = 500


class Kind(NamedTuple):
    """`stage` is the point of an answer where it acts; the server calls the stages in this order:
    status (first of all), metadata (what is said of a file), range (only when a range was asked
    for and could be served), body (only when bytes follow)."""

    stage: str
    act: Callable[..., None]
    skip: int = 0


KINDS = {
    "status429": Kind("status", status429),
    "status500": Kind("status", status500),
    # A change shows only to who asked before.
    "etag_changes": Kind("metadata", etag_changes, skip=1),
    "own_etag": Kind("metadata", own_etag),
    "wrong_size": Kind("metadata", wrong_size),
    "status416": Kind("range", status416),
    "ignore_range": Kind("range", ignore_range),
    "wrong_content_range": Kind("range", wrong_content_range),
    "slow": Kind("body", slow),
    "stall": Kind("body", stall),
    "cut": Kind("body", cut),
    "flip_byte": Kind("body", flip_byte),
}


@dataclass(slots=True, kw_only=True)
class Fault:
    """One switch that is on, and how many chances it had."""

    kind: str
    repo: str
    path: str
    at: str | None
    skip: int
    times: int | None
    options: dict[str, Any]
    seen: int = 0


def read_fault(entry: dict[str, Any], repo: str = "*") -> Fault:
    """The fault that a JSON object describes; ValueError for a kind or an option there is not."""
    options = {"repo": repo, "path": "*", "at": None, "times": None, **entry}
    kind = options.pop("kind", None)
    if kind not in KINDS:
        raise ValueError(f"no fault {kind!r}, only {', '.join(KINDS)}")
    options.setdefault("skip", KINDS[kind].skip)
    common = {name: options.pop(name) for name in ("repo", "path", "at", "skip", "times")}
    if common["at"] not in (None, "api", "hub", "cdn"):
        raise ValueError(f"no place {common['at']!r}, only api, hub, cdn")
    try:
        inspect.signature(KINDS[kind].act).bind(None, **options)
    except TypeError as error:
        raise ValueError(f"{kind}: {error}") from None
    return Fault(kind=kind, options=options, **common)


class Faults:
    """The faults that are on: those of each `.hub.json`, then those switched on at run time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._from_files: dict[str, tuple[Any, list[Fault]]] = {}
        self._added: list[Fault] = []

    def declare(self, repo: str, entries: list[dict[str, Any]]) -> None:
        """Take over what a repository's file says; the same list again keeps its budgets."""
        with self._lock:
            if repo not in self._from_files or self._from_files[repo][0] != entries:
                self._from_files[repo] = (entries, [read_fault(e, repo) for e in entries])

    def add(self, entries: Iterable[dict[str, Any]]) -> None:
        """Switch faults on, all or none."""
        faults = [read_fault(entry) for entry in entries]
        with self._lock:
            self._added += faults

    def reset(self) -> None:
        """Forget what was added, and start the budgets of the files' faults again."""
        with self._lock:
            self._added.clear()
            self._from_files.clear()

    def apply(self, stage: str, at: str, repo: str, path: str, answer: Answer) -> None:
        """Let every fault due at this point of this answer change it."""
        with self._lock:
            for fault in self._all():
                kind = KINDS[fault.kind]
                if (
                    kind.stage == stage
                    and fault.at in (None, at)
                    and fnmatchcase(repo, fault.repo)
                    and fnmatchcase(path, fault.path)
                ):
                    fault.seen += 1
                    turn = fault.seen - fault.skip
                    if turn > 0 and (fault.times is None or turn <= fault.times):
                        kind.act(answer, **fault.options)

    def describe(self) -> list[dict[str, Any]]:
        """What is on, for a person or a test to look at."""
        with self._lock:
            return [asdict(fault) for fault in self._all()]

    def _all(self) -> list[Fault]:
        return [f for _, faults in self._from_files.values() for f in faults] + self._added
