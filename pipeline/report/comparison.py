"""The page that compares the quants of a model, and its pictures as files."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from msgspec import Struct

from pipeline.core.text import size, sizes

from . import bars, page, scatter
from .candidates import Candidate, Metric, frontier, metric, with_error
from .svg import Picture, element

PAGE = "compare.html"
NAMES = ("size-and-quality.svg", "speed.svg", "memory.svg", PAGE)  # the page comes last
MARK = "<!-- written by llama-pipeline compare -->\n"  # in each of them
INTERVAL = "Error bars span 1.96 standard errors on each side: 95 % where errors are normal."


class QuantReport(Struct, frozen=True, kw_only=True):
    """All that the page says. `ctx_size` is in tokens, `room` is the machine's memory in bytes;
    `machine` and `commands` say where it was measured, and how to repeat it; `notes` what is
    missing, and why."""

    model: str
    ctx_size: int
    room: int
    candidates: tuple[Candidate, ...]
    machine: tuple[tuple[str, str], ...] = ()
    commands: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def files(report: QuantReport) -> dict[str, str]:
    """The page and the pictures, by the names of their files."""
    pictures = {f"{each.name}.svg": each.file() for each, _, _ in drawn(report)}
    return {name: text + MARK for name, text in {**pictures, PAGE: whole(report)}.items()}


def drawn(report: QuantReport) -> Iterator[tuple[Picture, Picture, str]]:
    """The pictures for which there are figures: wide, narrow, and what is said below them."""
    model, rows = report.model, report.candidates
    square = "A square that is not filled does not fit the memory of this machine. "
    squares = square if any(each.does_not_fit for each in rows) else ""
    for draw, caption in (
        (
            partial(scatter.size_and_quality, model, rows),
            "Size against quality. On the line, the frontier, every quant loses less than all that "
            f"are no larger; those are in bold. {squares}{INTERVAL}",
        ),
        (
            partial(bars.speed, model, rows),
            "Speed on this machine, by llama-bench with its own settings; more is better. "
            f"{INTERVAL}",
        ),
        (
            partial(bars.memory, model, rows, report.ctx_size, report.room),
            "Memory that is needed to serve it, and what this machine has.",
        ),
    ):
        wide, narrow = draw(page.WIDE), draw(page.NARROW)
        if wide and narrow:
            yield wide, narrow, caption


def whole(report: QuantReport) -> str:
    """The page as HTML."""
    heads, rows = table(report)
    parts = [
        *(element("p", text=note) for note in report.notes),
        *(page.figure(wide, narrow, caption) for wide, narrow, caption in drawn(report)),
        element("h2", text="All figures"),
        page.table("Figures of each quant; ± is one standard error", heads, rows, frozenset()),
    ]
    if report.commands:
        parts += [element("h2", text="To repeat it"), page.code(report.commands)]
    if report.machine:
        parts += [element("h2", text="Measured on"), page.terms(report.machine)]
    return page.page(f"Quants of {report.model}", *parts)


def table(report: QuantReport) -> tuple[list[str], list[list[str]]]:
    """All figures as text: the heads of the columns, and a row a quant. A column without any
    figure is left out."""
    measured, best = metric(report.candidates), frontier(report.candidates)
    rows = [dict(cells(each, measured, report.ctx_size)) for each in report.candidates]
    files = sizes([each.bytes for each in report.candidates])
    for row, each, file in zip(rows, report.candidates, files, strict=True):
        row["file"] = file
        if measured and measured.of(each):
            row["frontier"] = "yes" if each in best else "no"
    heads = list(dict.fromkeys(name for row in rows for name in row))
    kept = [name for name in heads if any(row.get(name) for row in rows)]
    return kept, [[row.get(name) or "–" for name in kept] for row in rows]


def cells(each: Candidate, measured: Metric | None, ctx_size: int) -> Iterator[tuple[str, str]]:
    """The figures of a quant, by the heads of their columns; empty where one is missing."""
    quality, speed, memory = each.quality, each.speed, each.memory
    yield "quant", each.quant
    yield "file", ""  # to so many digits as tell all files apart
    yield "bits per weight", f"{quality.bits_per_weight:.2f}" if quality else ""
    if measured:
        loss = measured.loss(quality) if quality else None
        yield f"{measured.name}, {measured.unit}", with_error(loss)
    yield "perplexity ratio", with_error(quality.ppl_ratio if quality else None)
    yield "same top token", with_error(quality.same_top if quality else None)
    yield "prompt, tokens/s", with_error(speed.prompt if speed else None)
    yield "decode, tokens/s", with_error(speed.decode if speed else None)
    yield f"memory at {ctx_size}", size(memory.total) if memory else ""
    yield "fits here", ("yes" if memory.fits else "no") if memory else ""
