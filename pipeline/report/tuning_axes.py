"""What `tune` may change: the values of each axis, as options of llama-server and llama-bench."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

from msgspec import Struct

from pipeline.serve.config.options import ResolvedOptions

PROMPT, DECODE = "prompt", "decode"  # the phases of a request

Setting = Mapping[str, str]  # the value of each axis that differs from its default


class Axis(Struct, frozen=True):
    """Options that are changed together. The first of `values` is the default; `phases` are those
    whose speed they change. `is_named`: while its values are compared, a setting names the default
    too, since what measures them has to know. `effect`: by how much a value usually changes the
    speed, as a relative standard deviation."""

    name: str
    values: tuple[str, ...]
    phases: tuple[str, ...] = (PROMPT, DECODE)
    is_named: bool = False
    effect: float = 0.1


THREADS, THREADS_BATCH = "threads", "threads-batch"
UBATCH, BATCH = "ubatch-size", "batch-size"
PLACEMENT, CACHE = "placement", "cache-type"  # axes of several options
FIT, ALL, EXPERTS = "fit", "all", "experts"  # values of PLACEMENT; the last with a number of layers
SHARES = (0.25, 0.5, 0.75, 0.875, 1.0)  # of the processors, as numbers of threads
FEW = 4  # processors on which one thread may be the best
USUAL_UBATCH = 512  # llama-server's own default
ALL_LAYERS = "999"  # more than any model has
FIT_MARGIN = "1024"  # MiB a card keeps free, as llama-server's --fit leaves it
LARGE, SMALL = 0.4, 0.04  # effects of values on the speed, as relative standard deviations

# Options of llama-server, and what llama-bench calls them.
PLACING = {
    "gpu-layers": "-ngl",
    "n-cpu-moe": "-ncmoe",
    "device": "-dev",
    "split-mode": "-sm",
    "main-gpu": "-mg",
    "tensor-split": "-ts",
    "override-tensor": "-ot",
}
BENCH = {
    THREADS: "-t",
    UBATCH: "-ub",
    BATCH: "-b",
    "flash-attn": "-fa",
    "load-mode": "-lm",
    "cache-type-k": "-ctk",
    "cache-type-v": "-ctv",
    **PLACING,
}
# Where llama-server takes several with commas: for llama-bench a comma begins another run.
BETWEEN = {"device": "/", "tensor-split": "/", "override-tensor": ";"}
AUTO_LAYERS = ("auto", "-1")


class Scope(Struct, frozen=True, kw_only=True):
    """What is tuned, and where. `threads` is llama-server's own default, `experts` the number of
    layers with experts, `cards` that of graphics cards which its programs can use."""

    processors: int
    threads: int
    cards: int = 0
    experts: int = 0
    pools: bool = False  # it is served for embeddings or reranking, a whole text in one batch
    lossy: bool = False  # whether the answers may change a little


def axes(scope: Scope, given: ResolvedOptions) -> list[Axis]:
    """The axes, the most promising first: without those whose options the user has `given`, or this
    llama-server does not have."""
    return [
        axis
        for axis in _all(scope, given)
        if len(axis.values) > 1
        and all(name in given.flags and not given.has(name) for name in _options(axis))
    ]


def _all(scope: Scope, given: ResolvedOptions) -> Iterator[Axis]:
    if scope.cards:
        layers = scope.experts
        experts = [f"{EXPERTS} {count}" for count in sorted({layers, layers // 2} - {0})]
        yield Axis(PLACEMENT, (FIT, ALL, *experts), effect=LARGE)
    counts = _threads(scope)
    yield Axis(THREADS, counts, (DECODE,), effect=LARGE)
    if not given.has(THREADS):  # which are those of both phases
        yield Axis(THREADS_BATCH, counts, (PROMPT,), effect=LARGE)
    yield Axis("flash-attn", ("auto", "off"))
    if not scope.pools:
        larger = ("1024", "2048") if scope.cards else ()
        yield Axis(UBATCH, (str(USUAL_UBATCH), "256", "128", *larger), (PROMPT,), True)
    if scope.lossy and not scope.pools:
        yield Axis(CACHE, ("f16", "q8_0"))
    mode = given.flags.get("load-mode")
    others = [each for each in ("none", "mlock", "dio") if mode and each in mode.choices]
    # Where the weights lie counts most where each is read for one token.
    phase = PROMPT if scope.pools else DECODE
    yield Axis("load-mode", ("auto", *others), (phase,), effect=SMALL)
    if scope.cards and not scope.pools:
        yield Axis(BATCH, ("2048", "1024"), (PROMPT,), True)


def _threads(scope: Scope) -> tuple[str, ...]:
    """The numbers of threads, llama-server's own first."""
    count = scope.processors
    others = {max(1, round(count * share)) for share in SHARES} | ({1} if count <= FEW else set())
    return (str(scope.threads), *map(str, sorted(others - {scope.threads})))


def _options(axis: Axis) -> tuple[str, ...]:
    """The options that an axis sets."""
    if axis.name == PLACEMENT:
        return ("gpu-layers", "n-cpu-moe")
    return ("cache-type-k", "cache-type-v") if axis.name == CACHE else (axis.name,)


def server_options(setting: Setting, threads: int) -> dict[str, str]:
    """The options of llama-server for a setting. `threads` is its own default: a changed number for
    one phase would change that of the other too."""
    options = _expanded(setting)
    if THREADS in options or THREADS_BATCH in options:
        for name in (THREADS, THREADS_BATCH):
            options.setdefault(name, str(threads))
    return options


def bench_words(
    setting: Setting, phase: str, given: Mapping[str, str], *, cards: int = 0, ctx_size: int = 0
) -> list[str]:
    """The options of llama-bench for one phase of a setting, beside what the user has `given` for
    llama-server. With `cards` the layers that fit beside a context of `ctx_size` tokens lie on
    them, as llama-server decides it, unless the setting says otherwise."""
    options = {**given, **_expanded(setting)}
    batch = options.pop(THREADS_BATCH, "")
    if phase == PROMPT and (threads := batch or given.get(THREADS)):
        options[THREADS] = threads
    elif phase == PROMPT:
        options.pop(THREADS, None)
    if options.get("gpu-layers") in AUTO_LAYERS:
        del options["gpu-layers"]
    words = ["-fitt", FIT_MARGIN, "-fitc", str(ctx_size)] if cards else []
    if "gpu-layers" in options:
        words = []
    for name, value in options.items():
        if name in BENCH:
            words += [BENCH[name], bench_value(name, value)]
    return words


def bench_value(name: str, value: str) -> str:
    """The value of an option of llama-server as llama-bench takes it."""
    if name == THREADS and int(value) <= 0:
        return str(os.cpu_count() or 1)  # llama-bench would crash
    if (name, value) in (("gpu-layers", ALL), ("gpu-layers", "-2")):
        return ALL_LAYERS
    return value.replace(",", BETWEEN.get(name, ","))


def _expanded(setting: Setting) -> dict[str, str]:
    """The options of llama-server that a setting changes."""
    options: dict[str, str] = {}
    for name, value in setting.items():
        if name == PLACEMENT:
            options["gpu-layers"] = ALL
            if value.startswith(EXPERTS):
                options["n-cpu-moe"] = value.removeprefix(EXPERTS).strip()
        elif name == CACHE:
            options |= {"cache-type-k": value, "cache-type-v": value}
        else:
            options[name] = value
    return options
