"""The pictures of speed and memory: a bar for each quant."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from msgspec import Struct

from pipeline.core.text import plural, size

from .candidates import Candidate, interval, with_error
from .figures import Estimate, Speed
from .svg import FONT, LINE, Box, Picture, element, line, shortened, width, write

NARROW = 560  # pixels: in a picture of less the panels stand below each other
PARTS = (("weights", "bar"), ("cache", "bar2"), ("compute", "bar3"))  # of the memory


def speed(model: str, candidates: Sequence[Candidate], wide: float) -> Picture | None:
    """How fast each candidate reads and writes; None where no speed was measured. `wide`: the
    picture's width in pixels."""
    known = [(each.quant, each.speed.main) for each in candidates if each.speed]
    if not known:
        return None
    panels = [_speeds("Prompt, tokens per second", candidates, lambda speed: speed.prompt)]
    if any(each.speed and each.speed.decode for each in candidates):
        panels.append(_speeds("Decode, tokens per second", candidates, lambda speed: speed.decode))
    body = [write(14, 22, shortened(f"Speed of {model}", wide - 28), "strong")]
    if wide < NARROW or len(panels) == 1:
        drawn, end = bars(panels, 14, 40, wide - 28)
        body += drawn
    else:
        half, end = (wide - 28) / 2, 0.0
        for at, panel in enumerate(panels):
            drawn, end = bars([panel], 14 + at * (half + 7), 40, half - 7)
            body += drawn
    quant, fastest = max(known, key=lambda each: each[1].value)
    what = "decodes" if len(panels) > 1 else "reads"
    return Picture(
        name="speed",
        width=wide,
        height=end,
        title=f"Speed of {model}",
        text=f"Tokens per second of {plural(len(known), 'quant')}, read and written. "
        f"{quant} {what} fastest: {with_error(fastest)}.",
        body=tuple(body),
    )


def _speeds(
    title: str, candidates: Sequence[Candidate], of: Callable[[Speed], Estimate | None]
) -> Panel:
    rows = []
    for each in candidates:
        measured = of(each.speed) if each.speed else None
        if measured:
            error, text = interval(measured)[1] - measured.value, with_error(measured)
            rows.append(Bar(label=each.quant, parts=(measured.value,), error=error, text=text))
        else:
            rows.append(Bar(label=each.quant))
    return Panel(title=title, bars=tuple(rows))


def memory(
    model: str, candidates: Sequence[Candidate], ctx_size: int, room: int, wide: float
) -> Picture | None:
    """What each candidate takes at a context of `ctx_size` tokens, against the `room` bytes of this
    machine; None where that is not known of any. `wide`: the picture's width in pixels."""
    known = [each.memory for each in candidates if each.memory]
    if not known:
        return None
    rows = []
    for each in candidates:
        if use := each.memory:
            text = f"{size(use.total)}, {'fits' if use.fits else 'does not fit'}"
            parts = (use.weights, use.cache, use.compute)
            rows.append(Bar(label=each.quant, parts=parts, text=text))
        else:
            rows.append(Bar(label=each.quant, text="not known"))
    # a machine with far more than is needed would leave no room for the bars
    limit = room if room <= 2 * max(use.total for use in known) else 0
    panel = Panel(
        title=f"At a context of {ctx_size} tokens",
        bars=tuple(rows),
        kinds=tuple(kind for _, kind in PARTS),
        limit=limit,
    )
    body = [write(14, 22, shortened(f"Memory of {model}", wide - 28), "strong")]
    x = 14.0
    for name, kind in PARTS:
        body.append(element("rect", x=x, y=32, width=12, height=12, class_=kind))
        body.append(write(x + 18, 43, name, "soft"))
        x += width(name) + 36
    drawn, end = bars([panel], 14, 58, wide - 28)
    body += drawn
    body += [line(14, end, 38, end, "limit")] if limit else []
    body.append(write(46 if limit else 14, end + 4, f"{size(room)} on this machine", "soft"))
    fit = [each.quant for each in candidates if each.memory and each.memory.fits]
    return Picture(
        name="memory",
        width=wide,
        height=end + 18,
        title=f"Memory of {model} at a context of {ctx_size} tokens",
        text=f"Weights, cache and compute buffers of {plural(len(known), 'quant')}; "
        f"{size(room)} on this machine. These fit: {', '.join(fit) or 'none'}.",
        body=tuple(body),
    )


# Bars


class Bar(Struct, frozen=True, kw_only=True):
    """One row: the lengths of its parts, half of its interval, and the figure in words."""

    label: str
    parts: tuple[float, ...] = ()
    error: float = 0
    text: str = "not measured"


class Panel(Struct, frozen=True, kw_only=True):
    """Rows of bars on one scale, that may have a `limit`. `kinds` are the classes of the parts."""

    title: str
    bars: tuple[Bar, ...]
    kinds: tuple[str, ...] = ("bar",)
    limit: float = 0


def bars(panels: Sequence[Panel], x: float, y: float, wide: float) -> tuple[list[str], float]:
    """The panels below each other in `wide` pixels, and where they end."""
    drawn: list[str] = []
    rows = [bar for panel in panels for bar in panel.bars]
    names = min(max((width(bar.label) for bar in rows), default=0), wide * 0.3) + 10
    figures = max((width(bar.text) for bar in rows), default=0) + 14
    room = max(40.0, wide - names - figures)
    for panel in panels:
        longest = max((sum(bar.parts) + bar.error for bar in panel.bars), default=0)
        scale = room / (max(longest, panel.limit) or 1)
        drawn.append(write(x, y + FONT, panel.title, "strong"))
        top = y = y + FONT + 10
        for bar in panel.bars:
            # a line through the figures would make them hard to read
            column = x + names + room if panel.limit else None
            drawn += _bar(bar, panel.kinds, Box(x, y, names, LINE), scale, column)
            y += LINE + 6
        if panel.limit:
            at = x + names + panel.limit * scale
            drawn.append(line(at, top - 2, at, y - 2, "limit"))
        y += 14
    return drawn, y


def _bar(
    bar: Bar, kinds: Sequence[str], name: Box, scale: float, column: float | None
) -> Iterator[str]:
    """A row: its name in the box `name`, the bar beside it, and its figure at `column`, or else
    where the bar ends. `scale`: pixels for 1."""
    x, middle = name.x + name.width, name.y + name.height / 2
    yield write(x - 8, middle + 4, shortened(bar.label, name.width - 8), anchor="end")
    for length, kind in zip(bar.parts, kinds, strict=False):
        wide = length * scale
        yield element("rect", x=x, y=name.y + 2, width=wide, height=LINE - 4, class_=kind)
        x += wide
    if bar.error:
        reach = bar.error * scale
        low = max(name.x + name.width, x - reach)
        for kind in ("halo", "whisker"):  # it would be hard to see on the bar
            yield line(low, middle, x + reach, middle, kind)
            for end in (low, x + reach):
                yield line(end, middle - 4, end, middle + 4, kind)
        x += reach
    yield write((column or x) + 8, middle + 4, bar.text, "" if bar.parts else "soft")
