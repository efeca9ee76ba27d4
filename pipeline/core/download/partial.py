"""A file under way: its bytes in pieces, and beside it a journal of the pieces that are there."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.core.store.publish import remove

LONGEST_RUN = 8  # pieces in one request


class Partial:
    """Opened on what an earlier run left, if that is the same file; else started over.

    The journal's first line is the file's identity, each other one a piece: number, CRC-32.
    Nothing is flushed, so after a power cut it may tell of pieces that are not there: whoever
    uses an earlier run's piece compares the CRC first.
    """

    def __init__(self, path: Path, identity: dict[str, Any], size: int, piece: int) -> None:
        self.path, self.size, self.piece = path, size, piece
        self.count = -(-size // piece)
        self._journal = journal(path)
        self._first = json.dumps({**identity, "size": size, "piece": piece}).encode() + b"\n"
        self._lock = threading.Lock()
        self.done: dict[int, int] = {}
        self.open()

    def open(self) -> None:
        """Have both files, and know which pieces are there."""
        # A name that stands for somebody else's bytes is never written to.
        if _ours(self.path) and _ours(self._journal):
            text = self._journal.read_bytes()
            text = text[: text.rfind(b"\n") + 1]
            if text.startswith(self._first):
                os.truncate(self._journal, len(text))
                os.truncate(self.path, self.size)
                for line in text.splitlines()[1:]:
                    found = re.fullmatch(rb"(\d{1,9}) ([0-9a-f]{8})", line)
                    if found and int(found[1]) < self.count:
                        self.done[int(found[1])] = int(found[2], 16)
                return
        self.discard()
        with self.path.open("xb") as file:
            file.truncate(self.size)
        with self._journal.open("xb") as file:
            file.write(self._first)

    def bounds(self, number: int) -> tuple[int, int]:
        """Where a piece starts and stops, in bytes."""
        return number * self.piece, min((number + 1) * self.piece, self.size)

    def length(self, number: int) -> int:
        start, stop = self.bounds(number)
        return stop - start

    @property
    def bytes_done(self) -> int:
        return sum(map(self.length, self.done))

    def write(self, at: int, data: bytes) -> None:
        # Opened each time, so that a thread stuck in the network holds no file.
        with self.path.open("r+b", buffering=0) as file:
            file.seek(at)
            view = memoryview(data)
            while view:
                view = view[file.write(view) :]

    def record(self, number: int, crc: int) -> None:
        """Note that all bytes of a piece are written."""
        with self._lock:
            with self._journal.open("ab", buffering=0) as file:
                file.write(b"%d %08x\n" % (number, crc))
            self.done[number] = crc

    def forget(self, number: int) -> None:
        """A piece proved to be damaged."""
        with self._lock:
            self.done.pop(number, None)

    def discard(self) -> None:
        """Remove both files."""
        discard(self.path)
        self.done.clear()


def runs(missing: Sequence[int], connections: int) -> list[range]:
    """Consecutive pieces to ask for at once: many at first, so that few requests are made, single
    ones at the end, so that all connections end together."""
    found: list[range] = []
    at = 0
    while at < len(missing):
        longest = max(1, min(LONGEST_RUN, (len(missing) - at) // (2 * connections)))
        first = at
        while at < len(missing) and at - first < longest:
            if missing[at] - missing[first] != at - first:
                break
            at += 1
        found.append(range(missing[first], missing[at - 1] + 1))
    return found


def _ours(path: Path) -> bool:
    """Whether there is a plain file that has no other name."""
    return path.is_file() and not path.is_symlink() and path.stat().st_nlink == 1


def journal(path: Path) -> Path:
    """Where the journal of a partial file stands."""
    return path.with_name(f"{path.name}.pieces")


def discard(path: Path) -> None:
    """Remove a partial file and its journal."""
    remove(journal(path))
    remove(path)


def bytes_kept(path: Path) -> int:
    """How much of a partial file its journal tells to be there."""
    try:
        first, *lines = journal(path).read_bytes().splitlines()
        told = json.loads(first)
        kept = len(set(lines)) * int(told["piece"])
        return min(kept, int(told["size"])) if path.is_file() else 0
    except (OSError, ValueError, KeyError, TypeError):
        return 0
