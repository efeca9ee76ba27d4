"""An unfinished download: its bytes in pieces, and beside it a journal of the finished ones."""

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
    """Continues what an earlier run left, if that is the same file; else starts over.

    The journal's first line is the file's identity, each other one a piece: number, CRC-32.
    Nothing is flushed, so after a power cut it may list pieces that are not on the disk: compare
    the CRC before an earlier run's piece is used.
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
        """Create both files, or read which pieces are there."""
        # Never write to a link, or to a file that has another name.
        if _ours(self.path) and _ours(self._journal):
            text = self._journal.read_bytes()
            text = text[: text.rfind(b"\n") + 1]
            if text.startswith(self._first):
                os.truncate(self._journal, len(text))
                os.truncate(self.path, self.size)
                for line in text.splitlines()[1:]:
                    match = re.fullmatch(rb"(\d{1,9}) ([0-9a-f]{8})", line)
                    if match and int(match[1]) < self.count:
                        self.done[int(match[1])] = int(match[2], 16)
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
        """Record that all bytes of a piece are written."""
        with self._lock:
            with self._journal.open("ab", buffering=0) as file:
                file.write(b"%d %08x\n" % (number, crc))
            self.done[number] = crc

    def forget(self, number: int) -> None:
        """Drop a piece that proved to be damaged."""
        with self._lock:
            self.done.pop(number, None)

    def discard(self) -> None:
        """Remove both files."""
        discard(self.path)
        self.done.clear()


def runs(missing: Sequence[int], connections: int) -> list[range]:
    """Runs of consecutive pieces, each for one request: long ones first, so that there are few
    requests, single pieces last, so that all connections end together."""
    ranges: list[range] = []
    at = 0
    while at < len(missing):
        longest = max(1, min(LONGEST_RUN, (len(missing) - at) // (2 * connections)))
        first = at
        while at < len(missing) and at - first < longest:
            if missing[at] - missing[first] != at - first:
                break
            at += 1
        ranges.append(range(missing[first], missing[at - 1] + 1))
    return ranges


def _ours(path: Path) -> bool:
    """Whether it is a plain file without another name."""
    return path.is_file() and not path.is_symlink() and path.stat().st_nlink == 1


def journal(path: Path) -> Path:
    """The path of a partial file's journal."""
    return path.with_name(f"{path.name}.pieces")


def discard(path: Path) -> None:
    """Remove a partial file and its journal."""
    remove(journal(path))
    remove(path)


def bytes_kept(path: Path) -> int:
    """How many bytes of a partial file are there, by its journal."""
    try:
        first, *lines = journal(path).read_bytes().splitlines()
        header = json.loads(first)
        kept = len(set(lines)) * int(header["piece"])
        return min(kept, int(header["size"])) if path.is_file() else 0
    except (OSError, ValueError, KeyError, TypeError):
        return 0
