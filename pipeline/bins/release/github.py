"""Questions to GitHub's API about upstream, and each way in which it does not answer."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO, TypeVar
from urllib.parse import urlsplit

from msgspec import json

from pipeline.core import bounded, network
from pipeline.core.bounded import Bound
from pipeline.core.errors import PipelineError, UsageError
from pipeline.core.progress import duration

if TYPE_CHECKING:
    import httpx2

UPSTREAM = "ggml-org/llama.cpp"
TIMEOUT = 30.0  # seconds without a byte
ANSWER = Bound(bytes=32 * 1024 * 1024, seconds=120)  # 30 releases take about 1.5 MB
LONGEST_DOWNLOAD = 3600.0  # seconds
RELEASES = "llama.cpp's releases"
TOKENS = ("GITHUB_TOKEN", "GH_TOKEN")
T = TypeVar("T")


class MissingError(PipelineError):
    """There is nothing of that name."""


def api() -> str:
    """The API's address, as GitHub's own machines name it. Raises UsageError."""
    text = os.environ.get("GITHUB_API_URL", "").strip().rstrip("/") or "https://api.github.com"
    if not network.is_url(text) or "@" in text:
        raise UsageError(
            "GITHUB_API_URL: is not the address of an API", "https://HOST, or unset it"
        )
    return text


def token() -> tuple[str, str]:
    """The variable that holds a token, and the token; both empty where there is none.

    Raises UsageError.
    """
    for name in TOKENS:
        value = os.environ.get(name, "").strip()
        if not re.fullmatch(r"[!-~]*", value):
            raise UsageError(f"{name}: contains characters that no token has", "copy it again")
        if value:
            return name, value
    return "", ""


def client() -> httpx2.Client:
    """An HTTP client with the user's proxy and certificates. Raises UsageError."""
    network.check()
    import httpx2

    return bounded.client(httpx2.Client(timeout=TIMEOUT, headers={"User-Agent": "llama-pipeline"}))


def ask(client: httpx2.Client, path: str, form: type[T], what: str = RELEASES) -> T:
    """What the API says about `path` of upstream's repository, as a record of the type `form`;
    `what` names that in errors.

    Raises MissingError, PipelineError.
    """
    url, headers = _request(path)
    with _errors_explained(what):
        answer = bounded.get(client, url, ANSWER, headers=headers, follow_redirects=True)
    _require_success(answer, what)
    try:
        return json.decode(answer.content, type=form)
    except (ValueError, RecursionError) as error:
        raise strange(str(error), what) from None


def download(client: httpx2.Client, path: str, file: BinaryIO, most: int) -> None:
    """Write what `path` of upstream's repository holds into `file`, at most so many bytes.

    Raises MissingError, PipelineError.
    """
    what, (url, headers) = "llama.cpp's source", _request(path)
    deadline, got = time.monotonic() + LONGEST_DOWNLOAD, 0
    with _errors_explained(what), bounded.opened(client, url, headers=headers) as answer:
        _require_success(answer, what)
        for block in answer.iter_bytes():
            got += len(block)
            if got > most or time.monotonic() > deadline:
                raise strange("it does not end", what)
            file.write(block)


def _request(path: str) -> tuple[str, dict[str, str]]:
    """The address and the headers: the token goes to the API's host, and after a redirect to no
    other."""
    headers = {"Accept": "application/vnd.github+json", "X-GitHub-Api-Version": "2022-11-28"}
    if token()[1]:
        headers["Authorization"] = f"Bearer {token()[1]}"
    return f"{api()}/repos/{UPSTREAM}/{path}", headers


def _require_success(answer: httpx2.Response, what: str) -> None:
    if answer.status_code != 200:
        raise refusal(answer.status_code, answer.headers, time.time(), what)


@contextmanager
def _errors_explained(what: str) -> Iterator[None]:
    """Turn the HTTP library's exceptions into a PipelineError."""
    import httpx2

    from pipeline.core.download.answers import trouble

    try:
        yield
    except httpx2.RequestError as error:
        raise PipelineError(
            f"{what} could not be fetched: {trouble(error)}",
            "check the network and the proxy, then run the same command again"
            f"{_instead(what)}{network.settings()}{network.trust(error)}",
        ) from None


def _instead(what: str) -> str:
    """How to do without `what`, for a hint."""
    return "; or build it: bins=build" if what == RELEASES else ""


def strange(why: str, what: str = RELEASES) -> PipelineError:
    """The error for an answer that is not what it should be."""
    expected = "list of releases" if what == RELEASES else "answer about " + what
    return PipelineError(
        f"{urlsplit(api()).hostname} sent no {expected} ({why})",
        "see whether a proxy or a login page answers in GitHub's place, and GITHUB_API_URL"
        f"{network.settings()}",
    )


def refusal(
    status: int, headers: Mapping[str, str], now: float, what: str = RELEASES
) -> PipelineError:
    """The error for any status but 200; `now` in seconds since 1970."""
    name, _ = token()
    limited = headers.get("x-ratelimit-remaining") == "0" or "retry-after" in headers
    if status == 429 or (status == 403 and limited):
        wait = seconds_to_wait(headers, now)
        until = "" if wait is None else f" for {duration(wait)}, until {_clock(now + wait)}"
        raised = "" if name else f", or set {TOKENS[0]}: with a token it allows more"
        return PipelineError(
            f"GitHub's API allows no more requests{until} (status {status})",
            f"wait until then{raised}",
        )
    if status == 401 and name:
        return PipelineError(
            f"GitHub does not know the token in {name} (status 401)",
            "it is mistyped or expired; make a new one, or unset it: none is needed",
        )
    where = f"{urlsplit(api()).hostname} answered {status}"
    if status in (404, 422):  # the latter of what could be a commit
        return MissingError(where)
    if status == 403 and name:
        hint = f"see whether the token in {name} may read public repositories, or unset it"
    elif status < 500:
        hint = "see whether a proxy or a firewall answers in GitHub's place, and GITHUB_API_URL"
        hint += network.settings()
    else:
        hint = f"run the same command again, later{_instead(what)}"
    return PipelineError(f"{what} could not be fetched: {where}", hint)


def seconds_to_wait(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds until the API takes requests again; None where its headers do not say."""
    for name, since in (("retry-after", 0.0), ("x-ratelimit-reset", now)):
        value = headers.get(name, "")
        if re.fullmatch(r"\d{1,10}", value, re.ASCII):
            return max(0.0, float(value) - since)
    return None


def _clock(when: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(when))
