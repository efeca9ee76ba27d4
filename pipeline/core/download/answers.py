"""Whether a server's response fits the request, and if not, whether to try again."""

from __future__ import annotations

import re
import threading
import time
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, NoReturn

from pipeline.core import network
from pipeline.core.errors import PipelineError

if TYPE_CHECKING:
    import httpx2

LONGEST_WAIT = 300.0  # seconds


class ChangedError(PipelineError):
    """The file on the server changed between two requests."""


class NoRangesError(Exception):
    """The server sends the whole file, whatever range is requested."""


class TroubleError(Exception):
    """A failure that another request may get over. `wrong`: the response does not fit the request;
    `expired`: the address is no longer valid; `wait`: seconds that the server asks for."""

    def __init__(
        self,
        host: str,
        text: str,
        *,
        wrong: bool = False,
        expired: bool = False,
        wait: float | None = None,
    ) -> None:
        super().__init__(f"{host}: {text}")
        self.host, self.wrong, self.expired, self.wait = host, wrong, expired, wait


class Judge:
    """Checks all responses for one file, of `size` bytes where that is known.

    No message contains what must stay private: addresses and headers, which the library's own
    messages may quote.
    """

    def __init__(self, name: str, size: int | None, *, streamed: bool) -> None:
        self._name, self._size, self._streamed = name, size, streamed
        self._lock = threading.Lock()
        self._etags: dict[str, str] = {}  # by host: two mirrors need not agree

    def accept(self, answer: httpx2.Response, at: int, stop: int) -> tuple[int, int, bool]:
        """How many bytes come before the requested ones, where those stop, and whether the response
        ends there.

        Raises PipelineError, ChangedError, NoRangesError, TroubleError before any byte is used.
        """
        status, host = answer.status_code, answer.url.host
        if status not in (200, 206):
            self._refuse(answer)
        if answer.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise PipelineError(
                f"{self._name}: {host} sends it compressed, which was not requested",
                f"see whether a proxy answers there{network.settings()}",
            )
        length = answer.headers.get("Content-Length", "")
        count = int(length) if re.fullmatch(r"\d{1,18}", length, re.ASCII) else None
        is_page = answer.headers.get("Content-Type", "").startswith("text/html")
        if is_page and not self._name.endswith((".html", ".htm")):
            raise PipelineError(
                f"{self._name}: {host} sends a web page in its place",
                f"see whether a proxy or a login page answers there{network.settings()}",
            )
        if status == 200:
            self._require_size(host, count)
            self._require_same(answer)
            if at and not self._streamed:
                raise NoRangesError
            stop = stop if count is None else min(stop, count)
            return at, stop, count == stop
        content_range = answer.headers.get("Content-Range", "")
        match = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)", content_range, re.ASCII)
        if not match:
            raise TroubleError(host, "the response does not say which range it is", wrong=True)
        total = None if match[3] == "*" else int(match[3])
        self._require_size(host, total)
        self._require_same(answer)
        stop = stop if total is None else min(stop, total)
        if (int(match[1]), int(match[2])) != (at, stop - 1):
            raise TroubleError(
                host, "the response is another range than the requested one", wrong=True
            )
        return 0, stop, count == stop - at

    def _refuse(self, answer: httpx2.Response) -> NoReturn:
        from http import HTTPStatus

        status, host = answer.status_code, answer.url.host
        known = status in set(HTTPStatus)  # the server's own text could be anything
        text = f"answered {status}{f' {HTTPStatus(status).phrase}' if known else ''}"
        if status in (401, 403, 410):
            raise TroubleError(host, text, expired=True)
        if status in (429, 503):
            wait = retry_after(answer.headers.get("Retry-After", ""), time.time())
            raise TroubleError(host, text, wait=wait)
        if status in (408, 416) or status >= 500:
            raise TroubleError(host, text, wrong=status == 416)
        raise PipelineError(
            f"{self._name}: {host}: {text}",
            f"run the same command again, later{network.through(str(answer.url))}",
        )

    def _require_size(self, host: str, size: int | None) -> None:
        if None not in (size, self._size) and size != self._size:
            raise PipelineError(
                f"{self._name}: {host} says {size} bytes, expected {self._size}",
                f"the file changed there, or a proxy answers in its place{network.settings()}",
            )

    def _require_same(self, answer: httpx2.Response) -> None:
        etag, host = answer.headers.get("ETag", ""), answer.url.host
        if etag and not etag.startswith("W/"):
            with self._lock:
                known = self._etags.setdefault(host, etag)
            if known != etag:
                raise ChangedError(f"{self._name}: changed on {host} during the download")


def trouble(error: httpx2.RequestError) -> TroubleError:
    """An error of the library, without its private details."""
    import httpx2

    host = error.request.url.host
    match error:
        case httpx2.ReadTimeout():
            return TroubleError(host, "no data in time")
        case httpx2.TimeoutException():
            return TroubleError(host, "no connection in time")
        case httpx2.ConnectError() | httpx2.ReadError():  # the system's words
            return TroubleError(host, str(error) or "the connection broke")
        case httpx2.ProxyError():
            return TroubleError(host, f"the proxy refuses: {error}")
        case httpx2.RemoteProtocolError():
            return TroubleError(host, "the connection ended early")
    return TroubleError(host, type(error).__name__)


def retry_after(text: str, now: float) -> float | None:
    """The seconds in a Retry-After header, a number or a date; None where it is neither."""
    if re.fullmatch(r"\d+", text, re.ASCII):
        return min(float(text), LONGEST_WAIT)
    try:
        seconds = parsedate_to_datetime(text).timestamp() - now
    except (ValueError, TypeError, OverflowError):
        return None
    return min(max(seconds, 0.0), LONGEST_WAIT)
