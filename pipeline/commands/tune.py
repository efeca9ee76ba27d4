"""`tune`: the fastest settings of a model on this machine, measured and kept."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from copy import copy
from pathlib import Path
from typing import Any

from msgspec import Struct, to_builtins
from msgspec.structs import replace

from pipeline.core import capacity, log
from pipeline.core.errors import PipelineError, doitw
from pipeline.core.paths import require_writable
from pipeline.core.store import receipts
from pipeline.core.store.locks import only_one
from pipeline.core.text import size, table
from pipeline.models import gguf
from pipeline.models.gguf import Header
from pipeline.models.memory import MARGIN
from pipeline.report import bandwidth, served_speed, tuning, tuning_axes, tuning_bench
from pipeline.report.figures import Estimate
from pipeline.report.tuned import Runs, Tuned, drop, load, runs_of, save
from pipeline.report.tuning import DECODE, PROMPT, Axis, Found
from pipeline.report.tuning_axes import THREADS_BATCH, UBATCH
from pipeline.report.tuning_bench import Bench
from pipeline.serve.config import instances, options
from pipeline.serve.config.options import ResolvedOptions
from pipeline.serve.server import Server

from . import chat, estimate, serve, summary, tuned
from .model import Model

FOR_SEARCH = 0.8  # of the budget; the rest is for llama-server itself
SERVED_SLOWER = 0.98  # llama-server's own speed with the options, over without, that is accepted
BUSY = 0.15  # share of the processors that other programs use, above which it is said


class Subject(Struct, frozen=True, kw_only=True):
    """What is tuned: the model's file, and its server with the defaults. `path` is where the result
    is kept."""

    model: Model
    file: Path
    header: Header
    server: Server
    options: ResolvedOptions
    cards: int
    path: Path

    @property
    def ctx_size(self) -> int:
        return int(self.server.argument("--ctx-size") or 0)


def tune(model: Model) -> None:
    """Find the fastest settings, keep and print them; what is known already is printed at once.
    Raises PipelineError."""
    subject = prepared(model)
    require_writable(subject.path.parent)
    request = model.request
    with only_one(subject.path):
        kept = load(subject.path)
        if kept and not request.anew and kept.lossy == request.lossy:
            log.info(f"measured at {kept.at}; force=1 measures again")
        else:
            if request.anew:
                drop(subject.path)
            kept = measured(subject)
    print(json.dumps(document(subject, kept)) if request.json else text(subject, kept))


def prepared(original: Model) -> Subject:
    """What there is to tune. Raises PipelineError."""
    model, port = copy(original), chat.free_port()
    model.request = original.request.replace(tuned=False, host="127.0.0.1", port=port)
    server = serve.checked_server(model)
    file = model.require_chain().final
    return Subject(
        model=model,
        file=file,
        header=gguf.read_cached(file, model.home.run / "gguf.json"),
        server=replace(server, log_file=str(model.home.logs / f"tune-{port}.log"), guard=False),
        options=instances.resolve(model.spec, serve.known_flags(model.programs)),
        cards=len(summary.seen_devices(model.programs, server)),
        path=tuned.key(model, tuned.digest(model, file)).place(model.home.run),
    )


def measured(subject: Subject) -> Tuned:
    """Search, try the result with llama-server, and keep it. Raises PipelineError; what was
    measured until then is kept for the next run."""
    notes = [*disturbances(subject.model)]
    for note in notes:
        log.info(f"warning: {note}")
    began, budget = time.monotonic(), float(subject.model.request.budget)
    runs = Runs(runs_of(subject.path))
    if runs.are_resumed:
        log.info("going on with what an earlier run has measured")
    bench = bench_of(subject, runs)
    axes = axes_of(subject, bench)
    found = tuning_bench.search(
        bench, axes, lambda share: time.monotonic() - began < share * FOR_SEARCH * budget
    )
    require_quiet(subject, found)
    if axes and len(found.untried) == len(axes):
        raise PipelineError(
            f"budget={budget:.0f} s is too short: no comparison was finished",
            "run it again, it goes on from there; or give it more: budget=30m",
        )
    chosen, ratio, served = found.setting, found.ratio, None
    if chosen:
        served = served_ratio(subject, tuning_axes.server_options(chosen, bench.first.threads))
        if served < SERVED_SLOWER:
            notes.append(
                f"{tuning.shown(chosen)}: {ratio.value:.2f} times as fast by llama-bench, but "
                f"{served:.2f} times by llama-server, so it is not used"
            )
            chosen, ratio, served = {}, Estimate(1.0, ratio.error), None
    decode = bench.speed(chosen, DECODE)
    result = Tuned(
        key=tuned.key(subject.model, tuned.digest(subject.model, subject.file)),
        options=tuning_axes.server_options(chosen, bench.first.threads),
        ratio=ratio,
        served=served,
        spread=found.spread,
        prompt=bench.speed(chosen, PROMPT),
        decode=decode,
        **limit_of(subject, decode),
        left_out=dict(found.left_out),
        untried=found.untried,
        notes=tuple(notes),
        lossy=subject.model.request.lossy,
        seconds=round(time.monotonic() - began, 1),
        at=receipts.now(),
    )
    save(subject.path, result)
    return result


def disturbances(model: Model) -> Iterator[str]:
    """What else runs here and makes the figures vary."""
    import psutil

    from pipeline.serve.supervisor import liveness, state

    if any(map(liveness.is_running, state.folders(model.home))):
        yield f"servers are up: {doitw('ps')} lists them, {doitw('down')} stops them"
    if (others := psutil.cpu_percent(interval=0.5) / 100) > BUSY:
        yield f"other programs use {others:.0%} of the processors"


def bench_of(subject: Subject, runs: Runs) -> Bench:
    """llama-bench with the model. Raises PipelineError where that does not run."""
    given = subject.options
    return Bench(
        subject.model.binaries.program("llama-bench"),
        subject.file,
        runs,
        given={n: text for n in (*tuning_axes.BENCH, THREADS_BATCH) if (text := given.text(n))},
        cards=subject.cards,
        ctx_size=subject.ctx_size,
        trained=subject.header.context_length,
    )


def axes_of(subject: Subject, bench: Bench) -> list[Axis]:
    """What is tried: only what fits into the memory."""
    header = subject.header
    experts = gguf.whole(header.values, f"{header.architecture}.expert_count", 0)
    layers = gguf.whole(header.values, f"{header.architecture}.block_count", 0)
    axes = tuning_axes.axes(
        tuning_axes.Subject(
            processors=capacity.processors(),
            threads=bench.first.threads,
            cards=subject.cards,
            experts=layers if experts else 0,
            pools=header.pooling != "none",
            lossy=subject.model.request.lossy,
        ),
        subject.options,
    )
    return [
        replace(axis, values=tuple(v for v in axis.values if fits(subject, int(v))))
        if axis.name == UBATCH
        else axis
        for axis in axes
    ]


def fits(subject: Subject, ubatch: int) -> bool:
    """Whether the model can be served with so many tokens at once in the memory that is free: its
    compute buffers grow with them."""
    if ubatch <= tuning_axes.USUAL_UBATCH:
        return True
    table = {**options.expanded(subject.options), UBATCH: ubatch}
    needed = estimate.measure(
        subject.model.binaries,
        subject.file,
        options.words(table),
        subject.ctx_size,
        ubatch=ubatch,
        pools=False,
    )
    return needed is None or needed.total + MARGIN <= capacity.memory()


def require_quiet(subject: Subject, found: Found) -> None:
    """Raise PipelineError where the default's speed varied so much that nothing can be told."""
    if found.is_busy:
        drop(subject.path)
        raise PipelineError(
            f"the same settings were {found.spread:.0%} faster or slower from run to run: "
            "something else loads this machine, so nothing is kept",
            "stop what else runs here, and try again",
        )


def served_ratio(subject: Subject, changed: dict[str, str]) -> float:
    """How many times as fast llama-server answers with the `changed` options, by requests that the
    search has not seen. Raises PipelineError."""
    from pipeline.serve.supervisor import state
    from pipeline.serve.supervisor.environment import environment

    at = state.folder(subject.model.home, f"tune-{subject.server.port}")
    log.info("trying the result with llama-server")

    def seconds(is_tuned: bool) -> list[float]:
        words = options.words(changed) if is_tuned else []
        server = replace(subject.server, cmd=(*subject.server.cmd, *words))
        return served_speed.seconds(server, environment(server, at))

    ratio = served_speed.ratio(seconds)
    Path(subject.server.log_file).unlink(missing_ok=True)  # of use only where something went wrong
    return ratio


def limit_of(subject: Subject, decode: float) -> dict[str, float]:
    """The memory's bandwidth in bytes a second, and the share of it that writing uses; nothing
    where cards hold the model."""
    if subject.cards or not decode:
        return {}
    weights = bandwidth.read_per_token(subject.file)
    limit = bandwidth.measured(weights)
    if not limit:
        return {}
    # What writing reads shows what memory can do, too.
    return {"bandwidth": limit, "bandwidth_share": weights * decode / max(limit, weights * decode)}


def document(subject: Subject, kept: Tuned) -> dict[str, Any]:
    """The result as plain values, with the command that serves with it."""
    return {"model": subject.server.model_name, "file": str(subject.file), **to_builtins(kept)}


def text(subject: Subject, kept: Tuned) -> str:
    """The result as people read it."""
    shown = ", ".join(f"{name} {value}" for name, value in kept.options.items())
    rows: list[tuple[str, object]] = [("model", subject.server.model_name)]
    rows.append(("settings", shown or "nothing to gain: the defaults are as fast as any"))
    if kept.options:
        error = f" ± {kept.ratio.error:.2f}" if kept.ratio.error >= 0.005 else ""
        rows.append(("speed", f"{kept.ratio.value:.2f}{error} times that of the defaults"))
        if kept.served:
            rows.append(("llama-server", f"{kept.served:.2f} times, with other prompts"))
    rows.append(("reading", f"{kept.prompt:.1f} tokens/s"))
    if kept.decode:
        rows.append(("writing", f"{kept.decode:.1f} tokens/s"))
    if kept.bandwidth:
        shared = f"{kept.bandwidth_share:.2f} of the {size(kept.bandwidth)}/s that memory allows"
        rows.append(("limit", f"writing reads weights at {shared}"))
    rows.append(("spread", f"{kept.spread:.1%} from run to run"))
    if kept.untried:
        rows.append(("not tried", f"{', '.join(kept.untried)}: no time left; budget=… allows more"))
    rows += [("left out", f"{setting}: {why}") for setting, why in kept.left_out.items()]
    rows += [("note", note) for note in kept.notes]
    rows.append(("took", f"{kept.seconds:.0f} s"))
    if kept.options:
        rows.append(("used by", f"{doitw('serve')} and {doitw('up')}; tuned=no leaves it out"))
    return table(rows)
