"""What the gateway counts: for /metrics, with the servers' own metrics, in Prometheus' text format;
and for the dashboard the last requests, and an hour of requests and tokens."""

from __future__ import annotations

import math
import re
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count

from msgspec import Struct

from pipeline.serve.supervisor.memory import DeviceMemory
from pipeline.serve.supervisor.status import Row

BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)  # seconds
PREFIX = "llama_gateway"
Samples = Iterable[tuple[Mapping[str, str], float]]  # labels and values
SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})?(\s+\S.*)$")

KEPT = 100  # requests
KEPT_BYTES = 64 * 1024  # of a request's and an answer's text
INTERVAL = 10.0  # seconds
SAMPLES = 360  # an hour of them
# The end of an answer tells its tokens: OpenAI's, llama-server's own, and Anthropic's names.
PROMPT = re.compile(rb'"(?:prompt_tokens|tokens_evaluated|input_tokens)":\s*(\d{1,15})\b')
GENERATED = re.compile(rb'"(?:completion_tokens|predicted_n|output_tokens)":\s*(\d{1,15})\b')
# Of an engine's own counters: what it generated since its start.
TOTAL = re.compile(
    r"^(?:llamacpp:tokens_predicted_total|vllm:generation_tokens_total)(?:\{.*\})?\s+(\S+)", re.M
)


class Counters:
    """Counts by the name of the server; by "" for requests that reached none."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()  # by status too; 499: the client left
        self.in_flight: Counter[str] = Counter()
        self.received: Counter[str] = Counter()  # bytes from clients
        self.sent: Counter[str] = Counter()  # bytes to clients
        self.failures: Counter[str] = Counter()  # no answer, or an incomplete one
        self.held = 0
        self._buckets: Counter[tuple[str, float]] = Counter()  # of the time to the first byte
        self._seconds: defaultdict[str, float] = defaultdict(float)

    def first_byte(self, instance: str, seconds: float) -> None:
        """Count the time from a complete request to its answer's first byte, waiting included."""
        self._seconds[instance] += seconds
        bucket = next((edge for edge in BUCKETS if seconds <= edge), float("inf"))
        self._buckets[instance, bucket] += 1

    def lines(self) -> Iterator[str]:
        yield from _metric(
            "requests_total",
            "counter",
            "Requests answered, by instance and status",
            [
                ({"instance": instance, "status": str(status)}, count)
                for (instance, status), count in sorted(self.requests.items())
            ],
        )
        for name, kind, text, counts in (
            ("in_flight", "gauge", "Requests that an instance is answering", self.in_flight),
            ("received_bytes_total", "counter", "Bytes of requests", self.received),
            ("sent_bytes_total", "counter", "Bytes of answers", self.sent),
            ("failures_total", "counter", "Answers that failed or were incomplete", self.failures),
        ):
            yield from _metric(name, kind, text, _by("instance", counts))
        held = "Requests waiting for an instance to load"
        yield from _metric("held", "gauge", held, [({}, self.held)])
        name = "first_byte_seconds"
        yield from _head(name, "histogram", "Time to the first byte of an answer")
        for instance, total in sorted(self._seconds.items()):
            count = 0
            for edge in (*BUCKETS, float("inf")):
                count += self._buckets[instance, edge]
                bound = "+Inf" if edge == float("inf") else f"{edge:g}"
                yield _line(f"{name}_bucket", count, instance=instance, le=bound)
            yield _line(f"{name}_sum", total, instance=instance)
            yield _line(f"{name}_count", count, instance=instance)


def ready_lines(ready: Mapping[str, bool]) -> Iterator[str]:
    """Whether each server is ready, as Prometheus text."""
    numbers = {name: int(is_ready) for name, is_ready in ready.items()}
    text = "Whether an instance is ready"
    return _metric("instance_ready", "gauge", text, _by("instance", numbers))


def memory_lines(rows: Sequence[Row], devices: Sequence[DeviceMemory]) -> Iterator[str]:
    """What the dashboard shows of memory, as Prometheus text."""
    total = {device.name: device.total for device in devices}
    free = {device.name: device.free for device in devices}
    counted = [
        ({"instance": row.name, "device": device}, count)
        for row in rows
        for device, count in row.need.items()
    ]
    used = [
        ({"instance": row.name, "device": device}, count)
        for row in rows
        for device, count in (("ram", row.memory), ("gpus", row.gpu_memory))
        if count is not None
    ]
    for name, text, samples in (
        ("device_memory_bytes", "Memory of a device", _by("device", total)),
        ("device_memory_free_bytes", "Memory that a new program can have", _by("device", free)),
        ("instance_counted_bytes", "Memory that an instance is counted with", counted),
        ("instance_memory_bytes", "Memory that its processes use, on all GPUs together", used),
    ):
        yield from _metric(name, "gauge", text, samples)


def merge_metrics(texts: Mapping[str, str]) -> Iterator[str]:
    """The servers' metrics as one text: each line labelled with its instance, each metric once."""
    heads: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for instance, text in texts.items():
        family = ""
        known = set(heads)
        for line in text.splitlines():
            words = line.split(None, 3)
            if words[:2] in (["#", "HELP"], ["#", "TYPE"]) and len(words) > 2:
                family = words[2]
                if family not in known:
                    heads.setdefault(family, []).append(line)
                continue
            sample = SAMPLE.match(line)
            if sample:
                name = family if family and sample[1].startswith(family) else sample[1]
                heads.setdefault(name, [])
                samples.setdefault(name, []).append(_labelled(sample, instance))
    for family, head in heads.items():
        yield from head
        yield from samples.get(family, ())


def _labelled(sample: re.Match[str], instance: str) -> str:
    own = re.sub(r"(^|,)\s*instance=", r"\1exported_instance=", sample[2] or "").strip(", ")
    labels = ",".join(filter(None, (f'instance="{_escaped(instance)}"', own)))
    return f"{sample[1]}{{{labels}}}{sample[3]}"


def _metric(name: str, kind: str, text: str, samples: Samples) -> Iterator[str]:
    yield from _head(name, kind, text)
    for labels, value in samples:
        yield _line(name, value, **labels)


def _by(label: str, numbers: Mapping[str, float]) -> Samples:
    return [({label: name}, number) for name, number in sorted(numbers.items())]


def _head(name: str, kind: str, text: str) -> Iterable[str]:
    return f"# HELP {PREFIX}_{name} {text}", f"# TYPE {PREFIX}_{name} {kind}"


def _line(name: str, value: float, **labels: str) -> str:
    pairs = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels.items())
    return f"{PREFIX}_{name}{pairs and f'{{{pairs}}}'} {value}"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


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
        """The last number that the pattern matches."""
        numbers = pattern.findall(b"".join(self._last)[-KEPT_BYTES:])
        return int(numbers[-1]) if numbers else None

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

    def sample(
        self,
        requests: Mapping[tuple[str, int], int],
        texts: Mapping[str, str],
        unloaded: Iterable[str] = (),
    ) -> None:
        """Note what was counted since the last sample: `requests` by instance and status, `texts`
        are the engines' own metrics by instance. A server that began anew counts from 0, and so
        will the `unloaded` ones."""
        answered: Counter[str] = Counter()
        for (instance, _), number in requests.items():
            answered[instance] += number
        new_requests = dict(answered - self._requests)
        new_tokens: dict[str, int] = {}
        self._tokens |= dict.fromkeys(unloaded, 0.0)
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
        values = [float(number) for number in numbers]
    except ValueError:
        return None
    total = sum(values)
    return total if values and math.isfinite(total) else None
