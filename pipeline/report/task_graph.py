"""The steps as a graph: which run after which, and what each has to do; as text, DOT and SVG."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

from msgspec import Struct, to_builtins
from msgspec.structs import replace

from pipeline.core.text import table

from . import page
from .svg import LINE, Picture, element, number, path, shortened, width, write

DONE, TODO, ALWAYS = "up to date", "to do", "always runs"
CLASSES = {DONE: "done", TODO: "todo", ALWAYS: "always"}
MARKS = {DONE: "✓", TODO: "●", ALWAYS: "▸"}
HIGH, GAP, BETWEEN = 46, 34, 24  # pixels: of a box, between two rows, between two boxes
LEAST, EDGE, TOP = 120, 14, 40  # pixels: the width of a box at least, and what is left free
BRANCHES = (("├── ", "│   "), ("└── ", "    "))

Place = tuple[float, float]  # the middle of an upper edge, in pixels


class StepNode(Struct, frozen=True, kw_only=True):
    """A step. `after` are the steps that it runs after, `why` says why it has something to do, and
    `makes` is what comes of it; both may be empty."""

    name: str
    help: str
    after: tuple[str, ...]
    state: str
    why: str = ""
    makes: str = ""


def below(nodes: Sequence[StepNode], root: str) -> list[StepNode]:
    """The node `root` and all that it runs after, directly or not, in their order."""
    known = {node.name: node for node in nodes}
    names = [root]
    for name in names:
        names += [each for each in known[name].after if each not in names]
    return [node for node in nodes if node.name in names]


def reduced(nodes: Sequence[StepNode]) -> list[StepNode]:
    """The nodes without what others say already: where c runs after b, and b after a, it is not
    said that c runs after a."""
    known = {node.name: node for node in nodes}
    before: dict[str, set[str]] = {}

    def all_before(name: str) -> set[str]:
        if name not in before:
            direct = known[name].after
            before[name] = set(direct).union(*map(all_before, direct))
        return before[name]

    def kept(node: StepNode) -> tuple[str, ...]:
        further = set().union(*map(all_before, node.after))
        return tuple(dict.fromkeys(name for name in node.after if name not in further))

    return [replace(node, after=kept(node)) for node in nodes]


def ordered(nodes: Sequence[StepNode]) -> list[StepNode]:
    """The nodes, each after those that it runs after; else in their order."""
    known, names = {node.name: node for node in nodes}, dict[str, None]()

    def add(name: str) -> None:
        for each in known[name].after:
            add(each)
        names.setdefault(name)

    for node in nodes:
        add(node.name)
    return [known[name] for name in names]


# As text


def tree(nodes: Sequence[StepNode], *, is_ascii: bool = False) -> str:
    """What runs last at the top, and below each step what it runs after. A step that stands in
    several places has what is below it at the first of them alone."""
    known = {node.name: node for node in nodes}
    first = {name for node in nodes for name in node.after}
    shown: set[str] = set()
    rows: list[tuple[str, str, str]] = []

    def add(name: str, start: str, further: str) -> None:
        node = known[name]
        if name in shown and node.after:
            rows.append((f"{start}{name}", node.state, "as above"))
            return
        shown.add(name)
        rows.append((f"{start}{name}", node.state, node.why))
        for each in node.after:
            branch, rail = BRANCHES[each == node.after[-1]]
            add(each, f"{further}{branch}", f"{further}{rail}")

    for node in nodes:
        if node.name not in first:
            add(node.name, "", "")
    text = table(rows)
    return text.translate(str.maketrans("├└│─", "|`|-")) if is_ascii else text


def document(nodes: Sequence[StepNode]) -> str:
    """One JSON list, an object a step."""
    return json.dumps(to_builtins(nodes), indent=1)


def dot(nodes: Sequence[StepNode]) -> str:
    """The graph in the DOT language of Graphviz."""
    styles = {DONE: "solid", TODO: "bold", ALWAYS: "dashed"}
    lines = ["digraph steps {", '  node [shape=box, fontname="sans-serif"];']
    for node in nodes:
        label = json.dumps(f"{node.name}\n{node.state}", ensure_ascii=False)
        lines.append(f'  "{node.name}" [label={label}, style={styles[node.state]}];')
    lines += [f'  "{each}" -> "{node.name}";' for node in nodes for each in node.after]
    return "\n".join([*lines, "}", ""])


# As a picture


def levels_of(nodes: Sequence[StepNode]) -> list[list[str]]:
    """The names, a row for each length of the longest way to them. A line that passes a row has a
    place in it, so that it crosses no box: `FROM>TO` of its ends."""
    known = {node.name: node for node in nodes}
    depth: dict[str, int] = {}
    for node in ordered(nodes):
        depth[node.name] = 1 + max((depth[name] for name in node.after), default=-1)
    levels: list[list[str]] = [[] for _ in range(1 + max(depth.values(), default=-1))]
    for node in ordered(nodes):
        levels[depth[node.name]].append(node.name)
        for name in node.after:
            for level in range(depth[name] + 1, depth[node.name]):
                levels[level].append(f"{name}>{node.name}")
    for _ in range(4):  # what hangs together stands together
        for before, after in pairwise(levels):
            place = {name: at / max(1, len(before) - 1) for at, name in enumerate(before)}
            after.sort(key=lambda name: _middle(name, known, place))
    return levels


def _middle(name: str, known: Mapping[str, StepNode], place: Mapping[str, float]) -> float:
    """The middle of what leads to a node, or to a place of a line, in the row before."""
    start, _, end = name.partition(">")
    names = [start, name] if end else known[name].after
    passing = [each for each in place if each.endswith(f">{name}")]
    at = [place[each] for each in (*names, *passing) if each in place]
    return sum(at) / len(at) if at else 0.5


def picture(nodes: Sequence[StepNode], title: str) -> Picture:
    """Boxes from top to bottom, each below those that it runs after."""
    levels, known = levels_of(nodes), {node.name: node for node in nodes}
    wide = max([LEAST, *(width(node.name) + 40 for node in nodes)])
    room = {name: wide if name in known else BETWEEN for level in levels for name in level}
    widths = [sum(room[name] + BETWEEN for name in level) - BETWEEN for level in levels]
    legend = " · ".join(f"{MARKS[state]} {state}" for state in CLASSES)
    total = max([width(legend), *widths])
    places: dict[str, list[Place]] = {}  # of a node one, of a line one for each row
    for at, (level, taken) in enumerate(zip(levels, widths, strict=True)):
        x = EDGE + (total - taken) / 2
        for name in level:
            places.setdefault(name, []).append((x + room[name] / 2, TOP + at * (HIGH + GAP)))
            x += room[name] + BETWEEN
    lines = [
        _line([*places[name], *places.get(f"{name}>{node.name}", ()), *places[node.name]])
        for node in nodes
        for name in node.after
    ]
    boxes = [part for node in nodes for part in _box(node, places[node.name][0], wide)]
    states = ", ".join(f"{node.name} {node.state}" for node in ordered(nodes))
    end = TOP + len(levels) * (HIGH + GAP) - GAP
    return Picture(
        name="steps",
        width=total + 2 * EDGE,
        height=end + 40,
        title=title,
        text=f"Each step stands below those that it runs after: {states}.",
        body=(
            write(EDGE, 22, shortened(title, total), "strong"),
            *lines,
            *boxes,
            write(EDGE, end + 26, legend, "soft"),
        ),
    )


def _line(points: Sequence[Place]) -> str:
    """A line from the foot of a box, straight through its places in the rows between, to the head
    of another. `points` are the middles of their upper edges."""
    (x, y), *rest = points
    d = f"M{number(x)} {number(y + HIGH)}"
    for at, (x2, y2) in enumerate(rest):
        bend = number(y2 - GAP / 2)
        d += f"C{number(x)} {bend} {number(x2)} {bend} {number(x2)} {number(y2)}"
        d += f"V{number(y2 + HIGH)}" if at < len(rest) - 1 else ""
        x, y = x2, y2
    arrow = path((x - 4, y - 7), (x, y - 1), (x + 4, y - 7))
    return element("path", d=d, class_="axis") + element("path", d=arrow, class_="axis")


def _box(node: StepNode, place: Place, wide: float) -> Iterator[str]:
    x, y = place
    tooltip = f"{node.name}: {node.help}" + (f" ({node.why})" if node.why else "")
    yield element(
        "g",
        element("title", text=tooltip),
        element(
            "rect", x=x - wide / 2, y=y, width=wide, height=HIGH, rx=6, class_=CLASSES[node.state]
        ),
        write(x, y + LINE + 1, node.name, "strong", "middle"),
        write(x, y + 2 * LINE, f"{MARKS[node.state]} {node.state}", "soft", "middle"),
    )


def html(nodes: Sequence[StepNode], title: str) -> str:
    """A page with the picture and the steps as a table."""
    drawn = picture(nodes, title)
    rows = [
        [node.name, node.state, node.why or "–", ", ".join(node.after) or "–", node.help]
        for node in ordered(nodes)
    ]
    heads = ("step", "state", "why", "runs after", "what it does")
    return page.page(
        title,
        element("figure", page.scrolling(title, drawn.svg())),
        page.table("Steps in the order in which they run", heads, rows, frozenset({1, 2, 3, 4})),
    )
