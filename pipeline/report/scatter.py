"""The picture of size against quality: every quant, its error, and the frontier."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

from msgspec import Struct

from pipeline.core.text import plural, size, sizes

from .candidates import Candidate, Metric, frontier, interval, metric, with_error
from .figures import Estimate
from .svg import (
    LINE,
    Box,
    Picture,
    element,
    is_clear,
    line,
    log_ticks,
    path,
    placed,
    shortened,
    ticks,
    write,
)

TOP = 56  # pixels above a plot, for its title and its legend
LEFT, RIGHT = 66, 14  # pixels beside it
MARKER = 5  # half of a point's width


class Plot(Struct, frozen=True, kw_only=True):
    """Where sizes in bytes and losses lie in a picture: sizes from left to right, and losses on a
    logarithmic scale from `floor` up. Nothing below the floor can be drawn."""

    area: Box
    sizes: tuple[float, float]
    floor: float
    ceiling: float

    def x(self, bytes_: float) -> float:
        low, high = self.sizes
        return self.area.x + self.area.width * (bytes_ - low) / (high - low)

    def y(self, loss: float) -> float:
        share = math.log(max(loss, self.floor) / self.floor, self.ceiling / self.floor)
        return self.area.y + self.area.height * (1 - share)


def size_and_quality(model: str, candidates: Sequence[Candidate], wide: float) -> Picture | None:
    """Each candidate's size and loss, with the frontier; None where no quality is known.
    `wide`: the picture's width in pixels."""
    measured = metric(candidates)
    if measured is None:
        return None
    shown = [(each, loss) for each in candidates if (loss := measured.of(each))]
    if not shown:
        return None
    best = frontier(candidates)
    plot = _plot(shown, wide)
    area = plot.area
    stairs = _stairs(plot, measured, best)
    parts = [*_frame(model, measured, plot), element("path", d=path(*stairs), class_="front")]
    labels = [(plot.x(each.bytes), plot.y(loss.value), each.quant) for each, loss in shown]
    points = [Box(x - MARKER - 1, y - MARKER - 1, *[2 * MARKER + 2] * 2) for x, y, _ in labels]
    lines = [_interval_box(plot, each, loss) for each, loss in shown]
    lines += [_line_box(start, end) for start, end in pairwise(stairs)]
    boxes = placed(labels, area, points, lines)
    centres = [(x, y) for x, y, _ in labels]
    for (x, y, _), box in zip(labels, boxes, strict=True):
        parts += _leader(x, y, box, centres) if box else ()
    for each, loss in shown:
        parts += _point(plot, each, loss, is_best=each in best)
    for (x, _, text), box in zip(labels, boxes, strict=True):
        is_best = any(text == each.quant for each in best)
        parts += [_label(x, text, box, is_best=is_best)] if box else []
    words = (
        f"{plural(len(shown), 'quant')} of {model}: file size from left to right, {measured.name} "
        f"({measured.unit}) upwards on a logarithmic scale. On the frontier, smallest first: "
        f"{', '.join(each.quant for each in best)}."
    )
    return Picture(
        name="size-and-quality",
        width=wide,
        height=area.y + area.height + 50,
        title=f"Size and {measured.name} of {model}",
        text=words,
        body=tuple(parts),
    )


def _plot(shown: Sequence[tuple[Candidate, Estimate]], wide: float) -> Plot:
    """The scales that hold all points, and their intervals as far as they are above 0."""
    sizes = [each.bytes for each, _ in shown]
    room = (max(sizes) - min(sizes)) * 0.1 or max(sizes) * 0.1 or 1
    ends = [end for _, loss in shown for end in (loss.value, interval(loss)[1]) if end > 0]
    centres = [loss.value for _, loss in shown if loss.value > 0] or ends or [1e-6]
    return Plot(
        area=Box(LEFT, TOP, wide - LEFT - RIGHT, min(560, max(260, wide / 2, 24 * len(shown)))),
        sizes=(max(0, min(sizes) - room), max(sizes) + room),
        floor=min(centres) / 3,
        ceiling=max(ends or centres) * 2,
    )


def _frame(model: str, measured: Metric, plot: Plot) -> Iterator[str]:
    """The title, the axes and their names."""
    area = plot.area
    right, bottom = area.x + area.width, area.y + area.height
    yield write(14, 22, shortened(f"Size and {measured.name} of {model}", right - 14), "strong")
    yield write(14, 42, f"{measured.name}, {measured.unit}; lower is better", "soft")
    for value in log_ticks(plot.floor, plot.ceiling):
        y = plot.y(value)
        yield line(area.x, y, right, y, "grid")
        yield write(area.x - 8, y + 4, f"{value:g}".replace("e-0", "e-"), "soft", "end")
    values = ticks(*plot.sizes, count=max(4, int(area.width / 110)))
    for value, text in zip(values, sizes(values), strict=True):
        x = plot.x(value)
        yield line(x, bottom, x, bottom + 5, "axis")
        yield write(x, bottom + 20, text, "soft", "middle")
    yield line(area.x, bottom, right, bottom, "axis")
    yield write(area.x + area.width / 2, bottom + 40, "file size", "soft", "middle")


def _stairs(plot: Plot, measured: Metric, best: Sequence[Candidate]) -> list[tuple[float, float]]:
    """The corners of the frontier: from a size on, the least that is lost."""
    points: list[tuple[float, float]] = []
    for each in best:
        if loss := measured.of(each):
            x, y = plot.x(each.bytes), plot.y(loss.value)
            points += [(x, points[-1][1]), (x, y)] if points else [(x, y)]
    return [*points, (plot.area.x + plot.area.width, points[-1][1])]


def _point(plot: Plot, each: Candidate, loss: Estimate, *, is_best: bool) -> Iterator[str]:
    """A candidate with its interval. What reaches 0 or less ends in an arrow on the axis."""
    x, y = plot.x(each.bytes), plot.y(loss.value)
    low, high = interval(loss)
    bottom, parts = plot.y(low), []
    if high > low:
        parts.append(line(x, plot.y(high), x, bottom, "whisker"))
        parts.append(line(x - 4, plot.y(high), x + 4, plot.y(high), "whisker"))
        if low < plot.floor:
            arrow = path((x - 4, bottom - 6), (x, bottom), (x + 4, bottom - 6))
            parts.append(element("path", d=arrow, class_="whisker"))
        else:
            parts.append(line(x - 4, bottom, x + 4, bottom, "whisker"))
    class_ = "hollow" if each.does_not_fit else "point"
    r = MARKER + 1 if is_best else MARKER - 1
    if loss.value <= 0:  # a logarithmic scale has no place for it
        d = path((x - r, y - 2 * r), (x + r, y - 2 * r), (x, y)) + "Z"
        parts.append(element("path", d=d, class_=class_))
    elif each.does_not_fit:
        parts.append(element("rect", x=x - r, y=y - r, width=2 * r, height=2 * r, class_=class_))
    else:
        parts.append(element("circle", cx=x, cy=y, r=r, class_=class_))
    tooltip = f"{each.quant}: {size(each.bytes)}, {with_error(loss)}"
    tooltip += ", does not fit" if each.does_not_fit else ""
    yield element("g", element("title", text=tooltip), *parts)


def _line_box(start: tuple[float, float], end: tuple[float, float]) -> Box:
    """The box around a level or upright line."""
    (x1, y1), (x2, y2) = start, end
    return Box(min(x1, x2) - 1, min(y1, y2) - 1, abs(x1 - x2) + 2, abs(y1 - y2) + 2)


def _interval_box(plot: Plot, each: Candidate, loss: Estimate) -> Box:
    """The box around the interval of a candidate."""
    low, high = (plot.y(end) for end in interval(loss))
    return Box(plot.x(each.bytes) - 4, high, 8, low - high)


def _leader(x: float, y: float, box: Box, points: Sequence[tuple[float, float]]) -> Iterator[str]:
    """A line from a point to its name, where that is not right beside it or could be another's."""
    if box.distance(x, y) > LINE or not is_clear(box, x, y, points):
        near_x = min(max(x, box.x), box.x + box.width)
        near_y = min(max(y, box.y), box.y + box.height)
        yield line(x, y, near_x, near_y, "leader")


def _label(x: float, text: str, box: Box, *, is_best: bool) -> str:
    """The name of a point."""
    base, class_ = box.y + box.height / 2 + 4, "label strong" if is_best else "label"
    if box.x >= x:
        return write(box.x, base, text, class_)
    if box.x + box.width <= x:
        return write(box.x + box.width, base, text, class_, "end")
    return write(box.x + box.width / 2, base, text, class_, "middle")
