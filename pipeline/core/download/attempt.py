"""One attempt at a file: threads fetch its pieces, the caller hashes them in order."""

from __future__ import annotations

import functools
import hashlib
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from io import FileIO
from itertools import groupby

from pipeline.core.parallel import TICK
from pipeline.core.progress import Count

from .partial import Partial
from .remote import HaltedError, Remote

# The library returns at most 64 KiB. With writes of that size the threads would wait for each other
# twice as often, which costs a third of the speed.
BLOCK = 1024 * 1024


class Attempt:
    """Ends with the first failure, for all its threads."""

    def __init__(
        self,
        remote: Remote,
        partial: Partial,
        submit: Callable[[Callable[[], None]], None],
        count: Count,
    ) -> None:
        self._remote, self._partial, self._submit, self._count = remote, partial, submit, count
        self._earlier = set(partial.done)  # of an earlier run: to be checked
        self._change = threading.Condition()
        self._failure: BaseException | None = None
        self._writing = 0

    def ask(self, runs: Sequence[Sequence[int]]) -> None:
        for numbers in runs:
            self._submit(functools.partial(self._fetch, numbers))

    def fail(self, error: BaseException) -> None:
        """End the attempt; the first error is kept."""
        with self._change:
            self._failure = self._failure or error
            self._change.notify_all()
        self._remote.halt()

    def settle(self) -> None:
        """Wait for the writes in progress; after `fail` no other starts."""
        with self._change:
            while self._writing:
                self._change.wait(TICK)

    def digest(self, *others: hashlib._Hash) -> str:
        """The file's sha256 in hex, hashed while it arrives; `others` see the same bytes."""
        partial = self._partial
        sha256 = hashlib.sha256()
        buffer = memoryview(bytearray(min(partial.piece, partial.size)))
        with partial.path.open("rb", buffering=0) as file:
            for number in range(partial.count):
                data = buffer[: partial.length(number)]
                while True:
                    self._wait_for(number)
                    file.seek(partial.bounds(number)[0])
                    whole = _fill(file, data)
                    if number not in self._earlier:
                        break
                    self._earlier.discard(number)
                    if whole and zlib.crc32(data) == partial.done[number]:
                        break
                    partial.forget(number)
                    self._count(-len(data), arrived=False)
                    self.ask([[number]])
                for digest in (sha256, *others):
                    digest.update(data)
        return sha256.hexdigest()

    def _wait_for(self, number: int) -> None:
        with self._change:
            while True:
                if self._failure:
                    raise self._failure
                if number in self._partial.done:
                    return
                self._change.wait(TICK)

    def _fetch(self, numbers: Sequence[int]) -> None:
        """Get these pieces in one request; what is between them is dropped."""
        if self._remote.halted.is_set():
            return
        partial, requested = self._partial, frozenset(numbers)
        start, stop = partial.bounds(numbers[0])[0], partial.bounds(numbers[-1])[1]
        try:
            with closing(self._remote.read(start, stop)) as blocks:
                parts = _cut(blocks, start, partial.piece)
                for number, own in groupby(parts, key=lambda part: part[0] // partial.piece):
                    if number in requested:
                        self._store(number, (data for _, data in own))
        except HaltedError:
            pass
        except BaseException as error:
            self.fail(error)

    def _store(self, number: int, blocks: Iterable[bytes]) -> None:
        """Write a piece while it arrives, and record it once it is whole; after an error what has
        come of it does not count."""
        start, stop = self._partial.bounds(number)
        at = written = start
        waiting: list[bytes] = []
        counted = crc = 0
        next_count = 0.0
        try:
            for data in blocks:
                waiting.append(data)
                at += len(data)
                now = time.monotonic()
                if at == stop or now > next_count:  # not each time: all threads share one lock
                    self._count(at - start - counted)
                    counted, next_count = at - start, now + TICK
                if at == stop or at - written >= BLOCK:
                    block = b"".join(waiting)
                    waiting.clear()
                    crc = zlib.crc32(block, crc)
                    with self._writes():
                        self._partial.write(written, block)
                        if at == stop:
                            self._partial.record(number, crc)
                            counted = 0
                    written = at
        finally:
            if counted:
                self._count(-counted, arrived=False)

    @contextmanager
    def _writes(self) -> Iterator[None]:
        with self._change:
            if self._failure:
                raise HaltedError
            self._writing += 1
        try:
            yield
        finally:
            with self._change:
                self._writing -= 1
                self._change.notify_all()


def _cut(blocks: Iterable[bytes], at: int, piece: int) -> Iterator[tuple[int, bytes]]:
    """The blocks with their positions, split at the ends of pieces."""
    for data in blocks:
        while data:
            head, data = data[: piece - at % piece], data[piece - at % piece :]
            yield at, head
            at += len(head)


def _fill(file: FileIO, data: memoryview) -> bool:
    """Read until `data` is full. False where the file ends before."""
    while data:
        count = file.readinto(data)
        if not count:
            return False
        data = data[count:]
    return True
