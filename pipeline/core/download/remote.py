"""A range of a file on a server, despite cut connections, errors, redirects and expired URLs."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from typing import TYPE_CHECKING

from msgspec import Struct, field

from pipeline.core import bounded, log, network
from pipeline.core.errors import PipelineError

from .answers import Judge, TroubleError, trouble

if TYPE_CHECKING:
    import httpx2

RETRIES = 5  # in a row, which together brought less than LEAST_BYTES
LEAST_BYTES = 4096
# A connection that brings less than LEAST_BYTES in this time counts as silent. On a link of GPRS
# each of 8 connections brings three times as much.
SLOWEST_SECONDS = 30.0
PAUSE = 0.5  # seconds before the first of them; each pause is twice the one before
WAITS = 10  # in a row, if the server says how long to wait
AGAIN = "run it again: it continues where it stopped"


class Location(Struct, frozen=True, kw_only=True):
    """Where a file's bytes are now: a URL, perhaps signed and short-lived, and the headers that it
    needs."""

    url: str
    headers: Mapping[str, str] = field(default_factory=dict)


# Finds the file's location; called again when the URL has expired. Raises PipelineError.
Locate = Callable[[], Location]


class HaltedError(Exception):
    """`Remote.halt` was called."""


class Pace:
    """Tells a connection that is slow from one that is kept open with a byte now and then."""

    def __init__(self, host: str) -> None:
        self._host = host
        self._since, self._got = time.monotonic(), 0

    def check(self, count: int) -> None:
        """Count bytes that came. Raises TroubleError where too few came for too long."""
        self._got += count
        passed = time.monotonic() - self._since
        if passed > SLOWEST_SECONDS:
            if self._got < LEAST_BYTES:
                raise TroubleError(self._host, f"only {self._got} bytes in {passed:.0f} s")
            self._since, self._got = time.monotonic(), 0


class Retries(Struct):
    """What was tried in vain since the bytes before `reached` came: how many `failures` and
    `waits` there were, and whether the address was `renewed`. `arrived`: what had come of the whole
    file by the last failure."""

    reached: int
    failures: int = 0
    waits: int = 0
    renewed: bool = False
    arrived: int = -LEAST_BYTES


class Remote:
    """One file, read by several threads at once. `streamed` also accepts the whole file as the
    response to a range, and drops what comes before the range."""

    def __init__(
        self,
        client: httpx2.Client,
        name: str,
        locate: Locate,
        *,
        size: int | None,
        timeout: float,
        pause: float = PAUSE,
        streamed: bool = False,
    ) -> None:
        self.name = name
        self._client, self._locate = client, locate
        self._timeout, self._pause = timeout, pause
        self._judge = Judge(name, size, streamed=streamed)
        self._lock = threading.Lock()
        self._locating = threading.Lock()  # held while the location is looked up
        self.halted = threading.Event()
        self._location: Location | None = None
        self._answers: set[httpx2.Response] = set()
        self._arrived = 0
        self._reported_wait = False

    def halt(self) -> None:
        """End all `read` of this file with HaltedError, also those that wait for bytes."""
        self.halted.set()
        with self._lock:
            answers = list(self._answers)
        for answer in answers:
            stream = answer.extensions.get("network_stream")
            connection = stream.get_extra_info("socket") if stream else None
            if connection:
                with suppress(OSError):
                    # The plain socket's method: the one of TLS drops state that a reader uses.
                    socket.socket.shutdown(connection, socket.SHUT_RDWR)

    def read(self, start: int, stop: int) -> Generator[bytes, None, None]:
        """The bytes from `start` to before `stop`, or to the end of a file of unknown size.

        Raises PipelineError, ChangedError, NoRangesError, HaltedError.
        """
        import httpx2

        at, retries = start, Retries(reached=start)
        while at < stop:
            location = self._where()
            try:
                with self._ask(location, at, stop) as answer:
                    skip, stop, exact = self._judge.accept(answer, at, stop)
                    for data in self._received(answer, skip):
                        data = data[: stop - at]
                        at += len(data)
                        self._arrived += len(data)
                        if data:
                            yield data
                        if at == stop and not exact:
                            break  # disconnect: more would come
                if at < stop:
                    raise TroubleError(answer.url.host, "the response ended early")
                return
            except TroubleError as error:
                problem = error
            except httpx2.RequestError as error:
                problem = trouble(error)
            except httpx2.InvalidURL:  # too long, or with control characters
                raise self._no_address() from None
            if self.halted.is_set():
                raise HaltedError
            if at - retries.reached >= LEAST_BYTES:
                retries = Retries(reached=at, arrived=retries.arrived)
            self._prepare_retry(retries, problem, location)

    def _received(self, answer: httpx2.Response, skip: int) -> Iterator[bytes]:
        """What comes after the first `skip` bytes. Raises TroubleError where that is too slow."""
        pace = Pace(answer.url.host)
        for data in answer.iter_raw():
            pace.check(len(data))
            if self.halted.is_set():
                raise HaltedError
            yield data[skip:]
            skip = max(0, skip - len(data))

    def _prepare_retry(self, retries: Retries, problem: TroubleError, location: Location) -> None:
        """Wait, or have the file located anew, before it is requested again. Raises PipelineError
        where that is of no use."""
        if problem.expired and not retries.renewed:
            retries.renewed = True
            self._forget(location)
            return
        if problem.wait is not None and retries.waits < WAITS:
            retries.waits += 1
            self._report_wait(problem.host, problem.wait)
            self.halted.wait(max(problem.wait, self._pause))
            return
        retries.failures += 1
        # A server that refuses some of many connections is not down while others receive bytes.
        is_stuck = problem.wrong or self._arrived - retries.arrived < LEAST_BYTES
        retries.arrived = self._arrived
        if problem.expired:
            raise PipelineError(f"{self.name}: {problem}", "check whether you still have access")
        if problem.wait is not None or (retries.failures > RETRIES and is_stuck):
            hint = f"{AGAIN}{network.through(location.url)}{network.trust(problem)}"
            raise PipelineError(f"{self.name}: {problem}", hint)
        self.halted.wait(self._pause * 2 ** min(retries.failures - 1, RETRIES - 1))

    def _no_address(self) -> PipelineError:
        return PipelineError(
            f"{self.name}: the server leads to what is not an address",
            "see whether a proxy or a login page answers in its place",
        )

    def _where(self) -> Location:
        with self._locating:
            if self.halted.is_set():
                raise HaltedError
            if self._location is None:
                self._location = self._locate()
            if not network.is_url(self._location.url):
                raise self._no_address()
            return self._location

    def _forget(self, location: Location) -> None:
        """Drop an expired location, unless another thread has found a new one already."""
        with self._locating:
            if self._location is location:
                self._location = None

    @contextmanager
    def _ask(self, location: Location, at: int, stop: int) -> Iterator[httpx2.Response]:
        headers = {
            **location.headers,
            "Accept-Encoding": "identity",
            "Range": f"bytes={at}-{stop - 1}",
        }
        with bounded.opened(
            self._client, location.url, headers=headers, timeout=self._timeout
        ) as answer:
            with self._lock:
                self._answers.add(answer)
            try:
                if self.halted.is_set():
                    raise HaltedError
                yield answer
            finally:
                with self._lock:
                    self._answers.discard(answer)

    def _report_wait(self, host: str, seconds: float) -> None:
        with self._lock:
            was_reported, self._reported_wait = self._reported_wait, True
        if not was_reported:
            log.info(f"{self.name}: {host} asks to wait {seconds:.0f} s")


def read_range(
    client: httpx2.Client, name: str, locate: Locate, start: int, stop: int, *, timeout: float
) -> bytes:
    """The bytes from `start` to before `stop`, fewer where the file ends. Raises PipelineError."""
    remote = Remote(client, name, locate, size=None, timeout=timeout, streamed=True)
    with closing(remote.read(start, stop)) as blocks:
        return b"".join(blocks)
