"""How much memory a model takes, as llama.cpp itself would allocate it, and which context fits."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from msgspec import Struct
from msgspec.structs import astuple, replace

from pipeline.core.errors import PipelineError, UsageError
from pipeline.core.process import outcome
from pipeline.core.store import stat_cache

from . import tools
from .gguf_format import padded

MIB = 1024 * 1024
SMALLEST_CONTEXT = 4096  # tokens; never reduced below this
STEP = 256  # tokens; llama.cpp pads its cache to this
MARGIN = 256 * MIB  # for the server itself and other processes
UNKNOWN = ""  # the device of what a formula estimates


class Device(Struct, frozen=True):
    """What one device holds, in bytes. `name` is llama.cpp's: `Host` is main memory."""

    name: str
    weights: int
    context: int
    compute: int


class Memory(Struct, frozen=True):
    """Bytes for weights, cache and compute buffers, as they lie on the devices.

    An `estimate` comes from a formula: all of it lies on the device UNKNOWN. All else comes from
    llama.cpp itself.
    """

    devices: tuple[Device, ...]
    estimate: bool = False

    @property
    def weights(self) -> int:
        return sum(device.weights for device in self.devices)

    @property
    def context(self) -> int:
        return sum(device.context for device in self.devices)

    @property
    def compute(self) -> int:
        return sum(device.compute for device in self.devices)

    @property
    def total(self) -> int:
        return self.weights + self.context + self.compute


class Fit(Struct, frozen=True):
    """A context in tokens, what it takes (None: not known) and what there is, in bytes.

    `trained` is the model's own context, 0 where that is not known."""

    ctx_size: int
    memory: Memory | None
    available: int
    trained: int

    @property
    def fits(self) -> bool:
        return self.memory is None or self.memory.total + MARGIN <= self.available


def parse(text: str) -> Memory | None:
    """llama-fit-params' table, which is in MiB: one row for each device. None without rows."""
    rows = re.findall(r"^(\S+) (\d+) (\d+) (\d+)\s*$", text, re.M)
    devices = [Device(name, *(int(number) * MIB for number in sizes)) for name, *sizes in rows]
    return Memory(tuple(devices)) if devices else None


def added(memory: Memory, other: Memory) -> Memory:
    """What two models take together."""
    devices: dict[str, Device] = {}
    for device in (*memory.devices, *other.devices):
        same = devices.get(device.name, Device(device.name, 0, 0, 0))
        devices[device.name] = Device(
            device.name,
            same.weights + device.weights,
            same.context + device.context,
            same.compute + device.compute,
        )
    return Memory(tuple(devices.values()), estimate=memory.estimate or other.estimate)


def grown(memory: Memory, weights: int) -> Memory:
    """The same with more bytes of weights, on the device that has most of them."""
    largest = max(memory.devices, key=lambda device: device.weights)
    larger = replace(largest, weights=largest.weights + weights)
    devices = [larger if device is largest else device for device in memory.devices]
    return replace(memory, devices=tuple(devices))


def resized(memory: Memory, before: int, after: int) -> Memory:
    """What another quant of the model takes: its tensors have `after` bytes, those that `memory`
    counts have `before`. Cache and compute buffers stay the same.

    The devices' shares are exact as far as all tensors shrink alike.
    """
    devices = [
        replace(device, weights=device.weights * after // max(1, before))
        for device in memory.devices
    ]
    return replace(memory, devices=tuple(devices))


def measure(
    program: Path, build: str, model: Path, options: list[str], ctx_size: int, cache: Path
) -> Memory | None:
    """What `model` takes at this context; llama-fit-params is run once, its answer cached. None
    where it gives none. Raises UsageError where this llama.cpp cannot load the model, as its server
    could not either."""
    question = json.dumps([build, ctx_size, *options])
    stamp = stat_cache.stamp(model)
    known = stat_cache.recall(cache, model) or {}
    if question in known:
        return Memory(tuple(Device(*row) for row in known[question]))
    output, problem = _load(program, model, ["-c", str(ctx_size), *options])
    if problem:
        stat_cache.stamp(model)  # raises FileNotFoundError where another run has removed it
        raise UsageError(
            f"{model.name}: this llama.cpp cannot load it{problem}",
            "it may be too new (pipeline/pins.toml says which llama.cpp is used), or damaged",
        )
    memory = parse(output)
    if memory:
        known[question] = [astuple(device) for device in memory.devices]
        stat_cache.remember(cache, model, known, stamp)
    return memory


def require_loads(program: Path, made: Path, name: str) -> None:
    """Raise PipelineError where llama.cpp cannot load what was `made` of the model `name`: the
    converter writes what it is given, and says nothing of weights that are missing."""
    if problem := refusal(program, made):
        raise PipelineError(
            f"{name}: llama.cpp cannot load what was converted{problem}; it is not kept",
            "weights are missing from the source: get all of its files, of one revision",
        )


def refusal(program: Path, model: Path) -> str:
    """Why llama.cpp cannot load a model, such as `: unknown architecture`; empty where it can."""
    return _load(program, model, ["-c", "512"])[1]


def _load(program: Path, model: Path, options: list[str]) -> tuple[str, str]:
    """What llama-fit-params prints of a model (nothing where it fails in another way), and why it
    cannot be loaded: empty where it can be."""
    words = [str(program), "-m", str(model), *options, "-fitp", "on", "--no-repack"]
    sandbox = tools.sandbox(program, model=model)
    status, out, err = outcome(words, timeout=120, env=tools.env(), sandbox=sandbox)
    if status and "failed to load model" in out + err:
        # It aborts, and its log may or may not have been written by then.
        reason = re.search(r"error loading model: (.*)", out + err)
        return "", f": {reason[1]}" if reason else " (it names no reason)"
    return out + err if status == 0 else "", ""


def fit(
    trained: int,
    requested: int | None,
    available: int,
    measured: Callable[[int], Memory | None],
) -> Fit:
    """The `requested` context, or the longest up to the `trained` one (0: not known) that fits into
    `available` bytes."""

    def at(ctx_size: int) -> Fit:
        return Fit(ctx_size, measured(ctx_size), available, trained)

    if requested:
        return at(requested)
    best = at(trained or SMALLEST_CONTEXT)
    if best.fits or trained <= SMALLEST_CONTEXT:
        return best
    low, high = SMALLEST_CONTEXT, padded(trained, STEP)
    best = at(low)
    while best.fits and high - low > STEP:
        middle = (low + high) // 2 // STEP * STEP
        middle_fit = at(middle)
        low, high, best = (middle, high, middle_fit) if middle_fit.fits else (low, middle, best)
    return best
