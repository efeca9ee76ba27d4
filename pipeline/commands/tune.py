"""`tune`: the fastest settings of a model on this machine, measured and kept."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from copy import copy
from pathlib import Path
from typing import Any

from msgspec import Struct, to_builtins
from msgspec.structs import replace

from pipeline.core import capacity, log
from pipeline.core.errors import PipelineError, doitw
from pipeline.core.paths import require_writable
from pipeline.core.store import receipts
from pipeline.core.store.locks import alone_with, lock_of
from pipeline.core.text import size, table
from pipeline.models import gguf
from pipeline.models.gguf import Header
from pipeline.models.memory import MARGIN
from pipeline.report import bandwidth, served_speed, tuning, tuning_axes, tuning_bench
from pipeline.report.figures import Estimate
from pipeline.report.tuned import Conditions, Runs, TuneResult, drop, load, runs_of, save, sweep
from pipeline.report.tuning import SearchResult
from pipeline.report.tuning_axes import DECODE, PROMPT, THREADS_BATCH, UBATCH, Axis
from pipeline.report.tuning_bench import Bench
from pipeline.serve.config import options
from pipeline.serve.config.options import ResolvedOptions
from pipeline.serve.server import Server
from pipeline.serve.supervisor import environment, liveness, state

from . import beside, estimate, serve, summary, tuned
from .model import Model

FOR_SEARCH = 0.8  # of the budget; the rest is for llama-server itself
N_MAX, DRAFTED = "spec-draft-n-max", ("1", "6", "12")  # tokens that are drafted at once
DEFAULTS, TUNED, WITHOUT = "defaults", "tuned", "without drafts"  # variants of the server
CLEARLY = 1.05  # times as fast has another number of drafted tokens to be
SERVED_SLOWER = 0.98  # llama-server's own speed with the options, over without, that is accepted
BUSY = 0.15  # share of the processors that other programs use, above which it is said


class TuneTask(Struct, frozen=True, kw_only=True):
    """What is tuned: the model's file, and its server with the defaults. `key` is what the result
    is valid for."""

    model: Model
    file: Path
    header: Header
    server: Server
    options: ResolvedOptions
    cards: int
    key: Conditions

    @property
    def path(self) -> Path:
        """Where the result is kept."""
        return self.key.place(self.model.home.run)

    @property
    def given(self) -> dict[str, str]:
        """The user's options that are not tried, and count for the speed."""
        return tuned.given(self.options)

    @property
    def ctx_size(self) -> int:
        return int(self.server.argument("--ctx-size") or 0)


def tune(model: Model) -> None:
    """Find the fastest settings, keep and print them; what is known already is printed at once.
    Raises PipelineError."""
    task = prepared(model)
    require_writable(task.path.parent)
    request = model.request
    waiting = "another tune is measuring on this machine; waiting for it"
    with alone_with(lock_of(task.path.parent / "tune"), waiting):
        kept = load(task.path)
        fits = kept and (kept.lossy, kept.given) == (request.lossy, task.given)
        if kept and fits and not request.anew:
            log.info(f"measured at {kept.at}; force=1 measures again")
            sweep(task.path)
        else:
            if request.anew:
                drop(task.path)
            kept = measured(task)
    print(json.dumps(document(task, kept)) if request.json else text(task, kept))


def prepared(original: Model) -> TuneTask:
    """What there is to tune. Raises PipelineError."""
    model, port = copy(original), serve.free_port()
    model.request = original.request.replace(tuned=False, host="127.0.0.1", port=port)
    server = serve.checked_server(model)
    file = model.require_chain().final
    typed = serve.typed_options(model)
    return TuneTask(
        model=model,
        file=file,
        header=gguf.read_cached(file, model.home.run),
        server=replace(server, log_file=str(model.home.logs / f"tune-{port}.log"), guard=False),
        options=typed,
        cards=len(summary.seen_devices(model.programs, server)),
        key=tuned.key(model, tuned.digest(model, file), typed),
    )


def measured(task: TuneTask) -> TuneResult:
    """Search, try the result with llama-server, and keep it. Raises PipelineError; what was
    measured until then is kept for the next run."""
    notes = [*disturbances(task.model)]
    for note in notes:
        log.info(f"warning: {note}")
    began, budget = time.monotonic(), float(task.model.request.budget)
    runs = Runs(runs_of(task.path), task.given)
    if runs.are_resumed:
        log.info("going on with what an earlier run has measured")
    bench = bench_of(task, runs)
    axes = axes_of(task, bench)
    found = tuning_bench.search(
        bench, axes, lambda share: time.monotonic() - began < share * FOR_SEARCH * budget
    )
    require_quiet(task, found)
    if axes and len(found.untried) == len(axes):
        raise PipelineError(
            f"budget={budget:.0f} s is too short: no comparison was finished",
            "run it again, it goes on from there; or give it more: budget=30m",
        )
    chosen, ratio = found.setting, found.ratio
    options = tuning_axes.server_options(chosen, bench.first.threads)
    served = served_ratios(task, options)
    if (own := served.get(TUNED)) and own < SERVED_SLOWER:
        notes.append(
            f"{tuning.shown(chosen)}: {ratio.value:.2f} times as fast by llama-bench, but "
            f"{own:.2f} times by llama-server, so it is not used"
        )
        chosen, options, ratio = {}, {}, Estimate(1.0, ratio.error)
    name = TUNED if chosen else DEFAULTS
    count, without = fastest_draft(served, name)
    if count:
        options |= {N_MAX: count}
        name = draft_name(count)
    if without:
        notes.append(f"without drafts it is {without:.2f} times as fast: leave draft= out")
    speeds = found.speeds if chosen else found.default_speeds
    decode = speeds.get(DECODE, 0.0)
    result = TuneResult(
        key=task.key,
        options=options,
        given=task.given,
        ratio=ratio,
        served=served[name] if options else None,
        spread=found.spread,
        prompt=speeds[PROMPT],
        decode=decode,
        **limit_of(task, decode),
        left_out=dict(found.left_out),
        untried=found.untried,
        notes=tuple(notes),
        lossy=task.model.request.lossy,
        seconds=round(time.monotonic() - began, 1),
        at=receipts.now(),
    )
    save(task.path, result)
    return result


def disturbances(model: Model) -> Iterator[str]:
    """What else runs here and makes the figures vary."""
    import psutil

    if any(map(liveness.is_running, state.folders(model.home))):
        yield f"servers are up: {doitw('ps')} lists them, {doitw('down')} stops them"
    if (others := psutil.cpu_percent(interval=0.5) / 100) > BUSY:
        yield f"other programs use {others:.0%} of the processors"


def bench_of(task: TuneTask, runs: Runs) -> Bench:
    """llama-bench with the model. Raises PipelineError where that does not run."""
    given = task.options
    return Bench(
        task.model.binaries.program("llama-bench"),
        task.file,
        runs,
        given={n: text for n in (*tuning_axes.BENCH, THREADS_BATCH) if (text := given.text(n))},
        cards=task.cards,
        ctx_size=task.ctx_size,
        trained=task.header.context_length,
    )


def axes_of(task: TuneTask, bench: Bench) -> list[Axis]:
    """What is tried: only what fits into the memory."""
    header = task.header
    experts = gguf.whole(header.values, f"{header.architecture}.expert_count", 0)
    layers = gguf.whole(header.values, f"{header.architecture}.block_count", 0)
    axes = tuning_axes.axes(
        tuning_axes.Scope(
            processors=capacity.processors(),
            threads=bench.first.threads,
            cards=task.cards,
            experts=layers if experts else 0,
            pools=header.pooling != "none",
            lossy=task.model.request.lossy,
        ),
        task.options,
    )
    return [
        replace(axis, values=tuple(v for v in axis.values if fits(task, int(v))))
        if axis.name == UBATCH
        else axis
        for axis in axes
    ]


def fits(task: TuneTask, ubatch: int) -> bool:
    """Whether the model can be served with so many tokens at once in the memory that is free: its
    compute buffers grow with them."""
    if ubatch <= tuning_axes.USUAL_UBATCH:
        return True
    table = {**options.expanded(task.options), UBATCH: ubatch}
    needed = estimate.measure(
        task.model.binaries,
        task.file,
        options.words(table),
        task.ctx_size,
        ubatch=ubatch,
        pools=False,
    )
    return needed is None or needed.total + MARGIN <= capacity.memory()


def require_quiet(task: TuneTask, found: SearchResult) -> None:
    """Raise PipelineError where the default's speed varied so much that nothing can be told."""
    if found.is_busy:
        drop(task.path)
        raise PipelineError(
            f"the same settings were {found.spread:.0%} faster or slower from run to run: "
            "something else loads this machine, so nothing is kept",
            "stop what else runs here, and try again",
        )


def served_ratios(task: TuneTask, options_found: dict[str, str]) -> dict[str, float]:
    """How many times as fast llama-server answers with the options that were found, by requests
    that the search has not seen; and with other numbers of drafted tokens, where it drafts. Nothing
    where there is nothing to compare. Raises PipelineError."""
    at = state.folder(task.model.home, f"tune-{task.server.port}")
    variants = {DEFAULTS: task.server}
    if options_found:
        variants[TUNED] = with_options(task.server, options_found)
    if kind := task.server.argument("--spec-type"):
        fastest = variants.get(TUNED, task.server)
        variants[WITHOUT] = without_drafts(fastest)
        if kind.startswith("draft") and not task.options.has(N_MAX) and N_MAX in task.options.flags:
            for count in DRAFTED:
                variants[draft_name(count)] = with_options(fastest, {N_MAX: count})
    if len(variants) < 2:
        return {}
    log.info("trying the result with llama-server")

    def seconds(name: str) -> list[float]:
        server = variants[name]
        times = served_speed.seconds(server, environment.environment(server, at))
        Path(server.log_file).unlink(missing_ok=True)  # of use only where something went wrong
        return times

    return served_speed.ratios([*variants], seconds)


def with_options(server: Server, added: Mapping[str, str]) -> Server:
    """The server with more options, none of which it has."""
    return replace(server, cmd=(*server.cmd, *options.words({**added})))


def without_drafts(server: Server) -> Server:
    """The server, as it would be without draft=."""
    cmd = [*server.cmd]
    for name in (*beside.DRAFT_OPTIONS, "--spec-type"):
        if name in cmd:
            at = cmd.index(name)
            del cmd[at : at + 2]
    return replace(server, cmd=tuple(cmd))


def draft_name(count: str) -> str:
    """The variant with so many drafted tokens."""
    return f"{N_MAX} {count}"


def fastest_draft(ratios: Mapping[str, float], name: str) -> tuple[str, float]:
    """The number of drafted tokens that is clearly faster than the default, empty for none; and how
    many times as fast it is without drafts, 0 where that is not clear."""
    counts = {count: ratios[draft_name(count)] for count in DRAFTED if draft_name(count) in ratios}
    best = max(counts, key=counts.__getitem__, default="")
    if not best or counts[best] < CLEARLY * ratios[name]:
        best = ""
    reached = counts[best] if best else ratios.get(name, 1.0)
    without = ratios.get(WITHOUT, 0.0) / reached
    return best, without if without > CLEARLY else 0.0


def limit_of(task: TuneTask, decode: float) -> dict[str, float]:
    """The memory's bandwidth in bytes a second, and the share of it that writing uses; nothing
    where cards hold the model."""
    if task.cards or not decode:
        return {}
    weights = bandwidth.read_per_token(task.file)
    limit = bandwidth.measured(weights)
    if not limit:
        return {}
    # What writing reads shows what memory can do, too.
    return {"bandwidth": limit, "bandwidth_share": weights * decode / max(limit, weights * decode)}


def document(task: TuneTask, kept: TuneResult) -> dict[str, Any]:
    """The result as plain values, with the command that serves with it."""
    return {"model": task.server.model_name, "file": str(task.file), **to_builtins(kept)}


def text(task: TuneTask, kept: TuneResult) -> str:
    """The result as people read it."""
    shown = ", ".join(f"{name} {value}" for name, value in kept.options.items())
    rows: list[tuple[str, object]] = [("model", task.server.model_name)]
    rows.append(("settings", shown or "nothing to gain: the defaults are as fast as any"))
    if kept.options:
        error = f" ± {kept.ratio.error:.2f}" if kept.ratio.error >= 0.005 else ""
        rows.append(("llama-bench", f"{kept.ratio.value:.2f}{error} times as fast as by default"))
        if kept.served:
            rows.append(("llama-server", f"{kept.served:.2f} times as fast, with other prompts"))
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
