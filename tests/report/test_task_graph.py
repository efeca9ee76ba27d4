"""The graph of steps: what is left of it, and how it is drawn."""

from __future__ import annotations

import re
from itertools import combinations
from xml.etree import ElementTree

import pytest

from pipeline.report import svg, task_graph
from pipeline.report.task_graph import ALWAYS, DONE, TODO, StepNode

SVG = "{http://www.w3.org/2000/svg}"


def graph(**after: str) -> list[StepNode]:
    return [
        StepNode(name=name, help=f"make {name}", after=tuple(names.split()), state=DONE)
        for name, names in after.items()
    ]


CHAIN = graph(
    resolve="",
    source="",
    build="source",
    fetch="resolve build",
    converter="fetch",
    convert="resolve source build fetch converter",
    quantize="convert fetch build",
    serve="quantize fetch",
)
WIDE = graph(**{f"step{n}": "" for n in range(9)}, end=" ".join(f"step{n}" for n in range(9)))


def test_what_follows_from_others_is_left_out() -> None:
    after = {node.name: node.after for node in task_graph.reduced(CHAIN)}
    assert after["fetch"] == ("resolve", "build")
    assert after["convert"] == ("converter",)
    assert after["quantize"] == ("convert",) and after["serve"] == ("quantize",)


def test_below_a_step_is_all_that_it_runs_after() -> None:
    assert [node.name for node in task_graph.below(CHAIN, "fetch")] == [
        *("resolve", "source", "build", "fetch")
    ]


def test_the_order_is_one_in_which_the_steps_can_run() -> None:
    mixed = [*reversed(CHAIN)]
    names = [node.name for node in task_graph.ordered(mixed)]
    assert sorted(names) == sorted(node.name for node in CHAIN)
    for node in CHAIN:
        assert all(names.index(name) < names.index(node.name) for name in node.after)


def test_the_tree_shows_a_step_whole_once() -> None:
    text = task_graph.tree(task_graph.reduced(CHAIN))
    assert text.splitlines()[:4] == [
        "serve                           up to date",
        "└── quantize                    up to date",
        "    └── convert                 up to date",
        "        └── converter           up to date",
    ]
    twice = graph(a="", b="a", c="b", d="b", e="c d")
    assert task_graph.tree(twice).splitlines()[-1].split() == [
        "└──",
        "b",
        "up",
        "to",
        "date",
        "as",
        "above",
    ]
    assert task_graph.tree(twice, is_ascii=True).isascii()


@pytest.mark.parametrize("nodes", [CHAIN, WIDE, CHAIN[:1]], ids=["chain", "wide", "one"])
def test_boxes_lie_apart_and_below_what_they_run_after(nodes: list[StepNode]) -> None:
    picture = task_graph.picture(task_graph.reduced(nodes), "Steps")
    root = ElementTree.fromstring(picture.file())
    boxes = {}
    for group in root.iter(f"{SVG}g"):
        rect, name = group.find(f"{SVG}rect"), group.find(f"{SVG}text")
        assert rect is not None and name is not None
        x, y, wide, high = (float(rect.get(key, 0)) for key in ("x", "y", "width", "height"))
        boxes[name.text] = svg.Box(x, y, wide, high)
        assert x >= 0 and x + wide <= picture.width and y + high <= picture.height
        assert svg.width(name.text or "") <= wide
    assert boxes.keys() == {node.name for node in nodes}
    assert not [pair for pair in combinations(boxes.values(), 2) if pair[0].overlaps(pair[1])]
    for node in nodes:
        assert all(boxes[name].y < boxes[node.name].y for name in node.after)


def test_a_line_that_passes_a_row_has_a_place_of_its_own_there() -> None:
    nodes = graph(a="", b="a", c="b", other="", end="c other")
    assert task_graph.levels_of(nodes)[1:3] == [["b", "other>end"], ["c", "other>end"]]


def test_states_differ_in_words_and_in_shape() -> None:
    nodes = [
        StepNode(name="a", help="", after=(), state=DONE),
        StepNode(name="b", help="", after=("a",), state=TODO, why="missing"),
        StepNode(name="c", help="", after=("b",), state=ALWAYS),
    ]
    text = task_graph.picture(nodes, "Steps").file()
    classes = re.findall(r'<rect[^>]*rx="6" class="(\w+)"', text)
    assert classes == ["done", "todo", "always"]
    assert all(f"{mark} {state}" in text for state, mark in task_graph.MARKS.items())
    assert '"b" [label="b\\nto do", style=bold];' in task_graph.dot(nodes)
    assert '"a" -> "b";' in task_graph.dot(nodes)
    assert '<td class="words">missing</td>' in task_graph.html(nodes, "Steps")
