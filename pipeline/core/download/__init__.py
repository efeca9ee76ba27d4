"""Downloads of files over HTTP: in parallel pieces, hashed while they arrive, resumed after a kill.

`attempt` is one try at a file, `partial` its bytes on the disk, `remote` its ranges on the server;
`answers` checks the server's responses.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Self

from msgspec import Struct

from pipeline.core import log, progress
from pipeline.core.errors import PipelineError
from pipeline.core.store.publish import remove
from pipeline.core.text import size as shown_size

from .answers import ChangedError, NoRangesError
from .attempt import Attempt
from .partial import Partial, runs
from .partial import bytes_kept as bytes_kept
from .partial import discard as discard
from .partial import journal as journal
from .remote import AGAIN, PAUSE, Locate, Remote
from .remote import Location as Location
from .remote import read_range as read_range

if TYPE_CHECKING:
    import httpx2

CONNECTIONS = 8
PIECE = 4 * 1024 * 1024  # bytes; a kill loses one piece for each connection
GRACE = 0.5  # seconds for the threads to end


class Content(Struct, frozen=True, kw_only=True):
    """The expected content: `size` in bytes, and its sha256 or (of small files) git blob id."""

    size: int
    sha256: str = ""
    blob: str = ""


class Downloads:
    """All files of one download: they share connections and a progress bar of `total` bytes.

    `timeout` is how many seconds may pass without a byte. The first file that fails ends all, and
    so does the end of the `with` block: it must be inside the pool whose threads call `get`.
    """

    def __init__(
        self,
        client: httpx2.Client,
        *,
        title: str,
        total: int,
        timeout: float,
        connections: int = CONNECTIONS,
        piece: int = PIECE,
        pause: float = PAUSE,
        digest: str = "",
    ) -> None:
        self._client, self._timeout, self._piece, self._pause = client, timeout, piece, pause
        self._bar = progress.transfer(title, total, digest=digest)
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        # Daemons: one that waits for a silent server must not keep the program from ending.
        self._threads = [
            threading.Thread(target=self._work, daemon=True) for _ in range(connections)
        ]
        self._lock = threading.Lock()
        self._attempts: set[Attempt] = set()
        self._failure: BaseException | None = None

    def __enter__(self) -> Self:
        self._count = self._bar.__enter__()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self._stop(error or PipelineError("the downloads have ended"))
        for _ in self._threads:
            self._jobs.put(None)
        end = time.monotonic() + GRACE
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        self._bar.__exit__(None, None, None)

    def get(self, name: str, content: Content, locate: Locate, made: Path) -> str:
        """Download `content` to `made`; returns its sha256 in hex. Any thread may call it.

        `made` and its journal are kept for the next run unless they proved wrong: publish the one
        and `discard` the other. Raises PipelineError, or the OSError of a full disk; if another
        file failed before, the error of that one.
        """
        try:
            return self._get(name, content, locate, made)
        except BaseException as error:
            self._stop(error)
            raise

    def _get(self, name: str, content: Content, locate: Locate, made: Path) -> str:
        identity = {"sha256": content.sha256, "blob": content.blob}
        if not any(identity.values()):
            remove(made)  # nothing shows that an earlier run's bytes belong to it
        partial = Partial(made, identity, content.size, self._piece)
        if partial.done:
            log.info(f"{name}: {shown_size(partial.bytes_done)} were downloaded by an earlier run")
        self._count(partial.bytes_done, arrived=False)
        by_blob = bool(content.blob and not content.sha256)
        streamed = again = False
        while True:
            blob = hashlib.sha1(b"blob %d\0" % content.size, usedforsecurity=False)
            remote = Remote(
                self._client,
                name,
                locate,
                size=content.size,
                timeout=self._timeout,
                pause=self._pause,
                streamed=streamed,
            )
            try:
                with self._try(remote, partial, streamed) as attempt:
                    sha256 = attempt.digest(*([blob] if by_blob else []))
            except NoRangesError:
                log.info(f"{name}: the server supports no ranges; downloading it in one stream")
                streamed = True
                continue
            except ChangedError as error:
                wrong: PipelineError = error
            else:
                if content.sha256 not in ("", sha256):
                    wrong = _mismatch(name, "sha256", content.sha256, sha256)
                elif by_blob and content.blob != blob.hexdigest():
                    wrong = _mismatch(name, "git blob id", content.blob, blob.hexdigest())
                else:
                    return sha256
            self._count(-partial.bytes_done, arrived=False)
            partial.discard()
            if again:
                raise wrong
            log.info(f"{wrong.message}; downloading it again")
            partial.open()
            again = True

    @contextmanager
    def _try(self, remote: Remote, partial: Partial, streamed: bool) -> Iterator[Attempt]:
        """Request all missing pieces; when it ends nothing writes to the file any more."""
        attempt = Attempt(remote, partial, self._jobs.put, self._count)
        with self._lock:
            if self._failure:
                raise self._failure
            self._attempts.add(attempt)
        try:
            missing = [n for n in range(partial.count) if n not in partial.done]
            if missing:
                attempt.ask([missing] if streamed else runs(missing, len(self._threads)))
            yield attempt
        except BaseException as error:
            attempt.fail(error)
            raise
        finally:
            attempt.settle()
            with self._lock:
                self._attempts.discard(attempt)

    def _stop(self, error: BaseException) -> None:
        if not isinstance(error, Exception):
            error = PipelineError("the downloads were interrupted", AGAIN)
        with self._lock:
            self._failure = self._failure or error
            attempts = list(self._attempts)
        for attempt in attempts:
            attempt.fail(error)

    def _work(self) -> None:
        while job := self._jobs.get():
            job()


def _mismatch(name: str, what: str, expected: str, got: str) -> PipelineError:
    return PipelineError(
        f"{name}: wrong {what}: expected {expected}, got {got}",
        "the server, or a proxy, sends other bytes than were published",
    )
