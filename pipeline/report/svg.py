"""SVG as text: elements, scales and labels. The same input gives the same bytes.

A picture takes its colours from variables of CSS, so that it follows the reader's light or dark
scheme, and is light on paper. What it says by colour it also says by shape or in words.
"""

from __future__ import annotations

import html
import math
import re
import unicodedata
from collections.abc import Iterator, Sequence

from msgspec import Struct

from pipeline.core.text import printable

FONT = 13  # pixels; the height of a letter in a picture
LINE = 18  # pixels from one line of text to the next
LETTER = 0.6  # of the font's height: the width of most letters of most fonts, with some to spare
BOLD = 0.7  # the same in bold
CLEARLY = 3  # pixels by which a label is nearer to its point than to any other
NO_XML = re.compile("[\ufffe\uffff]")  # letters that XML has not, beside those that nobody prints

# Blue and orange are told apart by nearly everybody. The three colours of a bar's parts differ in
# lightness too, as on grey paper.
LIGHT = (
    "--ink:#1b1b1b;--soft:#595959;--line:#dcdcdc;--ground:#fff;--main:#0067a3;--main-soft:#cfe3f1;"
    "--other:#a64b00;--second:#eb9a3c;--third:#d6d6d6"
)
DARK = (
    "--ink:#ececec;--soft:#b0b0b0;--line:#3d3d3d;--ground:#161616;--main:#6cb8ee;"
    "--main-soft:#1d3d54;--other:#f0a35e;--second:#a85f1b;--third:#4d4d4d"
)
STYLE = f"""
.chart{{{LIGHT};font:{FONT}px system-ui,sans-serif}}
@media (prefers-color-scheme:dark){{.chart{{{DARK}}}}}
@media print{{.chart{{{LIGHT}}}}}
.chart text{{fill:var(--ink)}}
.chart .soft{{fill:var(--soft)}}
.chart .strong{{font-weight:600}}
.chart .label{{paint-order:stroke;stroke:var(--ground);stroke-width:4px;stroke-linejoin:round}}
.chart .ground{{fill:var(--ground)}}
.chart .grid{{stroke:var(--line);stroke-width:1;fill:none}}
.chart .axis{{stroke:var(--soft);stroke-width:1;fill:none}}
.chart .leader{{stroke:var(--soft);stroke-width:1;fill:none}}
.chart .halo{{stroke:var(--ground);stroke-width:4;fill:none}}
.chart .whisker{{stroke:var(--soft);stroke-width:1.5;fill:none}}
.chart .limit{{stroke:var(--other);stroke-width:2;stroke-dasharray:6 4;fill:none}}
.chart .front{{stroke:var(--main);stroke-width:2;fill:none}}
.chart .point{{fill:var(--main);stroke:var(--ground);stroke-width:1}}
.chart .hollow{{fill:var(--ground);stroke:var(--other);stroke-width:2}}
.chart .bar{{fill:var(--main)}}
.chart .bar2{{fill:var(--second)}}
.chart .bar3{{fill:var(--third)}}
.chart .done{{fill:var(--ground);stroke:var(--soft);stroke-width:1}}
.chart .todo{{fill:var(--main-soft);stroke:var(--main);stroke-width:2}}
.chart .always{{fill:var(--ground);stroke:var(--soft);stroke-width:1;stroke-dasharray:4 3}}
""".strip()


def escaped(text: str) -> str:
    """`text` as a part of HTML or XML, whoever wrote it."""
    return html.escape(NO_XML.sub("", printable(text).replace("\n", " ")), quote=True)


def number(value: float) -> str:
    """A coordinate, to a tenth of a pixel; never -0."""
    return f"{round(value, 1) + 0.0:.1f}".removesuffix(".0")


def element(name: str, *children: str, text: str = "", **attributes: str | float) -> str:
    """An element. `children` are elements already, `text` is escaped; `_` in the name of an
    attribute stands for `-`, and one at its end for nothing: `class_`."""
    shown = "".join(
        f' {key.rstrip("_").replace("_", "-")}="'
        f'{escaped(value) if isinstance(value, str) else number(value)}"'
        for key, value in attributes.items()
    )
    inner = escaped(text) + "".join(children)
    return f"<{name}{shown}>{inner}</{name}>" if inner else f"<{name}{shown}/>"


def write(x: float, y: float, text: str, class_: str = "", anchor: str = "start") -> str:
    """A line of text that starts, is centred (`middle`) or ends at `x`, on the base line `y`."""
    more = {"class_": class_} if class_ else {}
    more |= {"text_anchor": anchor} if anchor != "start" else {}
    return element("text", x=x, y=y, text=text, **more)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> str:
    return element("path", d=path((x1, y1), (x2, y2)), class_=class_)


def path(*points: tuple[float, float]) -> str:
    """What draws a line through the points."""
    return "M" + "L".join(f"{number(x)} {number(y)}" for x, y in points)


def width(text: str, letter: float = LETTER) -> float:
    """About how many pixels a text is wide; rather more than less."""
    wide = sum(unicodedata.east_asian_width(each) in "WF" for each in text)
    return FONT * (letter * (len(text) - wide) + wide)


def shortened(text: str, room: float) -> str:
    """As much of a text as fits into `room` pixels."""
    if width(text) <= room:
        return text
    end = len(text)
    while end and width(text[:end]) + FONT > room:
        end -= 1
    return f"{text[:end].rstrip()}…"


class Picture(Struct, frozen=True, kw_only=True):
    """A drawing of so many pixels. `title` and `text` say in words what it shows."""

    name: str  # of its file, and unique on a page
    width: float
    height: float
    title: str
    text: str
    body: tuple[str, ...]

    def svg(self, form: str = "") -> str:
        """The element for a page, whose style is `STYLE`; `form` is a class of it, and tells it
        from the same picture in another size."""
        name = f"{self.name}-{form}" if form else self.name
        return element(
            "svg",
            element("title", text=self.title, id=f"{name}-title"),
            element("desc", text=self.text, id=f"{name}-text"),
            element("rect", class_="ground", width=self.width, height=self.height),
            *self.body,
            xmlns="http://www.w3.org/2000/svg",
            class_=f"chart {form}".strip(),
            viewBox=f"0 0 {number(self.width)} {number(self.height)}",
            width=self.width,
            height=self.height,
            role="img",
            aria_labelledby=f"{name}-title {name}-text",
        )

    def file(self) -> str:
        """The content of an SVG file."""
        start, title, rest = self.svg().partition("<title")
        return f"{start}<style>{STYLE}</style>{title}{rest}\n"


# Scales


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, about `count` of them."""
    step = (high - low) / max(1, count)
    power = 10 ** math.floor(math.log10(step)) if step > 0 else 1.0
    step = next((power * times for times in (1, 2, 5) if power * times >= step), power * 10)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(at * step, 12) for at in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between positive numbers; where few lie there, their doubles and halves too;
    where many do, not each."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    step = max(1, math.ceil((last - first) / 8))
    for times in ((1,), (1, 3), (1, 2, 5)):
        powers = range(first, last + 1, step)
        values = [float(f"{factor}e{power}") for power in powers for factor in times]
        shown = [value for value in values if low * 0.999 <= value <= high * 1.001]
        if len(shown) >= 3:
            return shown
    return shown if len(shown) > 1 else [low, high]


# Labels beside points


class Box(Struct, frozen=True):
    """A rectangle, in pixels; `y` is its upper edge."""

    x: float
    y: float
    width: float
    height: float

    def lies_in(self, other: Box) -> bool:
        return (
            other.x <= self.x
            and other.y <= self.y
            and self.x + self.width <= other.x + other.width
            and self.y + self.height <= other.y + other.height
        )

    def distance(self, x: float, y: float) -> float:
        """Of a point; 0 within."""
        right, bottom = self.x + self.width, self.y + self.height
        return math.hypot(max(self.x - x, 0, x - right), max(self.y - y, 0, y - bottom))

    def overlaps(self, other: Box) -> bool:
        return (
            self.x < other.x + other.width
            and other.x < self.x + self.width
            and self.y < other.y + other.height
            and other.y < self.y + self.height
        )


def places(x: float, y: float, wide: float, high: float) -> Iterator[Box]:
    """Where the label of a point may stand: beside it, then further and further away."""
    for away in range(11, 400, 7):
        yield Box(x + away, y - high / 2, wide, high)
        yield Box(x - away - wide, y - high / 2, wide, high)
        for side in (-1, 1):
            middle = y + side * (away + high / 2 - 4) - high / 2
            yield Box(x - wide / 2, middle, wide, high)
            yield Box(x + away / 2, middle, wide, high)
            yield Box(x - away / 2 - wide, middle, wide, high)


def anywhere(x: float, y: float, wide: float, high: float, area: Box) -> list[Box]:
    """Where a label may stand in all of the area, the nearest to its point first."""
    right, bottom = int(area.x + area.width - wide), int(area.y + area.height - high)
    boxes = [
        Box(left, top, wide, high)
        for left in range(math.ceil(area.x), right + 1, 6)
        for top in range(math.ceil(area.y), bottom + 1, 4)
    ]
    return sorted(boxes, key=lambda box: box.distance(x, y))


def _free(boxes: Sequence[Box], taken: Sequence[Box]) -> Box | None:
    """The first that overlaps nothing; None where there is none."""
    return next((box for box in boxes if not any(map(box.overlaps, taken))), None)


def is_clear(box: Box, x: float, y: float, points: Sequence[tuple[float, float]]) -> bool:
    """Whether a label in `box` can be taken for that of its point alone, and of those that lie on
    it."""
    near = box.distance(x, y) + CLEARLY
    others = (each for each in points if math.dist(each, (x, y)) > CLEARLY)
    return all(box.distance(*each) >= near for each in others)


def placed(
    labels: Sequence[tuple[float, float, str]],
    area: Box,
    points: Sequence[Box],
    better_free: Sequence[Box] = (),
) -> list[Box | None]:
    """A box inside `area` for the label of each point `(x, y, text)`. None overlaps another, nor
    one of `points`, nor what is `better_free` unless there is no other room; None without room.
    Right beside its point it stands only where it cannot be taken for the label of another."""
    used: list[Box] = []
    boxes = []
    centres = [(x, y) for x, y, _ in labels]
    for x, y, text in labels:
        wide, high = width(text, BOLD), LINE - 2
        inside = [each for each in places(x, y, wide, high) if each.lies_in(area)]
        near = [each for each in inside if each.distance(x, y) < LINE]
        clear = [each for each in near if is_clear(each, x, y, centres)]
        some, all_ = [*used, *points], [*used, *points, *better_free]
        tries = ((clear, all_), (clear, some), (inside, all_), (inside, some))
        box = next(filter(None, (_free(*each) for each in tries)), None)
        box = box or _free(anywhere(x, y, wide, high, area), some)
        used += [box] if box else []
        boxes.append(box)
    return boxes
