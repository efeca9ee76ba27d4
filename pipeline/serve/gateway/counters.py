"""/metrics: the gateway's counters and the servers' own metrics, in Prometheus' text format."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from pipeline.serve.supervisor.status import DeviceMemory, Row

BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)  # seconds
PREFIX = "llama_gateway"
Samples = Iterable[tuple[Mapping[str, str], float]]  # labels and values
SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})?(\s+\S.*)$")


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
