"""What the dashboard shows of the past: the last requests, and an hour of requests and tokens."""

from __future__ import annotations

import re
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from itertools import count

from msgspec import Struct

KEPT = 100  # requests
KEPT_BYTES = 64 * 1024  # of a request's and an answer's text
INTERVAL = 10.0  # seconds
SAMPLES = 360  # an hour of them
# The end of an answer tells its tokens: OpenAI's, llama-server's own, and Anthropic's names.
PROMPT = re.compile(rb'"(?:prompt_tokens|tokens_evaluated|input_tokens)":\s*(\d+)')
GENERATED = re.compile(rb'"(?:completion_tokens|predicted_n|output_tokens)":\s*(\d+)')
# Of an engine's own counters: what it generated since its start.
TOTAL = re.compile(
    r"^(?:llamacpp:tokens_predicted_total|vllm:generation_tokens_total)(?:\{.*\})?\s+(\S+)", re.M
)


class Recent(Struct, kw_only=True):
    """An answered request. Times in seconds, `at` since 1970; None: not known."""

    id: int = 0  # set by History
    at: float
    model: str | None  # as asked for
    instance: str
    path: str
    status: int
    seconds: float
    prompt_tokens: int | None
    tokens: int | None  # generated
    asked: str | None = None  # the contents, where `inspect` keeps them
    answered: str | None = None


class Tail:
    """The end of an answer, and with `whole` also its beginning."""

    def __init__(self, *, whole: bool = False) -> None:
        self._last: deque[bytes] = deque(maxlen=4)
        self._first: list[bytes] | None = [] if whole else None
        self._size = 0

    def add(self, block: bytes) -> None:
        self._last.append(block)
        if self._first is not None and self._size < KEPT_BYTES:
            self._first.append(block)
            self._size += len(block)

    def number(self, pattern: re.Pattern[bytes]) -> int | None:
        """The last number that the pattern finds."""
        found = pattern.findall(b"".join(self._last)[-KEPT_BYTES:])
        return int(found[-1]) if found else None

    @property
    def text(self) -> str | None:
        """The contents, cut where they are long; None where they were not kept."""
        return None if self._first is None else cut(b"".join(self._first))


def cut(text: bytes) -> str:
    """The first KEPT_BYTES of a text."""
    return text[:KEPT_BYTES].decode("utf-8", "replace")


class History:
    """The last requests, and what each interval of the last hour counted, by instance."""

    def __init__(self) -> None:
        self.requests: deque[Recent] = deque(maxlen=KEPT)
        self.samples: deque[tuple[float, dict[str, int], dict[str, int]]] = deque(maxlen=SAMPLES)
        self._ids = count(1)
        self._requests: Counter[str] = Counter()
        self._tokens: dict[str, float] = {}

    def add(self, request: Recent) -> None:
        """Keep a request that was answered."""
        request.id = next(self._ids)
        self.requests.appendleft(request)

    def sample(self, requests: Mapping[tuple[str, int], int], texts: Mapping[str, str]) -> None:
        """Note what was counted since the last sample: `requests` by instance and status, `texts`
        are the engines' own metrics by instance. A server that began anew counts from 0."""
        answered: Counter[str] = Counter()
        for (instance, _), number in requests.items():
            answered[instance] += number
        new_requests = dict(answered - self._requests)
        new_tokens: dict[str, int] = {}
        for instance, text in texts.items():
            total = _total(TOTAL.findall(text))
            if total is None:
                continue
            before = self._tokens.get(instance, total)
            new_tokens[instance] = int(total - before if total >= before else total)
            self._tokens[instance] = total
        self._requests = answered
        self.samples.append((time.time(), new_requests, new_tokens))


def _total(numbers: Iterable[str]) -> float | None:
    try:
        found = [float(number) for number in numbers]
    except ValueError:
        return None
    return sum(found) if found else None
