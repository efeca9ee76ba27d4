"""The page that compares quants, drawn from made rows: what is in it, and that it can be read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html.parser import HTMLParser
from itertools import combinations, pairwise
from math import inf, isfinite
from xml.etree import ElementTree

import pytest

from pipeline.report import bars, candidates, comparison, scatter, svg
from pipeline.report.candidates import Candidate, MemoryUse
from pipeline.report.comparison import QuantReport
from pipeline.report.figures import Estimate, Quality, Speed

GB = 10**9
SVG = "{http://www.w3.org/2000/svg}"
# Published for an 8B model (nats per token); sizes as llama-quantize makes them.
ROWS = {
    "Q2_K": (3.18, 0.31),
    "Q3_K_M": (4.02, 0.085),
    "Q4_K_S": (4.69, 0.037),
    "Q4_K_M": (4.92, 0.0313),
    "Q4_0": (4.66, 0.061),
    "Q5_K_M": (5.73, 0.0108),
    "Q6_K": (6.60, 0.0055),
    "Q8_0": (8.54, 0.0014),
}


def candidate(
    quant: str,
    gigabytes: float,
    loss: float | None,
    *,
    error: float = 0.05,
    speed: bool = True,
    fits: bool = True,
) -> Candidate:
    """A row whose error is a share of its loss."""
    size = int(gigabytes * GB)
    rate = Speed(prompt=Estimate(900 / gigabytes, 3), decode=Estimate(60 / gigabytes, 0.4))
    quality = None
    if loss is not None:
        kld = Estimate(loss, abs(loss) * error)
        quality = Quality(quant=quant, bytes=size, bits_per_weight=size / GB, kld=kld)
    return Candidate(
        quant=quant,
        bytes=size,
        quality=quality,
        speed=rate if speed else None,
        memory=MemoryUse(weights=size, cache=GB // 2, compute=GB // 4, fits=fits),
    )


def report(rows: Sequence[Candidate], model: str = "org/model") -> QuantReport:
    return QuantReport(
        model=model,
        ctx_size=4096,
        room=8 * GB,
        candidates=tuple(rows),
        machine=(("processor", "made up"),),
        commands=(f"./doitw compare model={model}",),
    )


EIGHT = [candidate(n, size, loss, fits=size < 7) for n, (size, loss) in ROWS.items()]
TWENTY = [candidate(f"IQ{n}_XXS_LONG", 3 + n / 40, 0.3 * 0.9**n) for n in range(20)]
NO_QUALITY = [candidate(n, size, None) for n, (size, _) in ROWS.items()]
NO_SPEED = [candidate(n, size, loss, speed=False) for n, (size, loss) in ROWS.items()]
# Measured of all-MiniLM-L6-v2: many close together, some of one size, and F16 far away.
CROWD = [
    *(("Q2_K", 19.50, 0.0513), ("Q3_K_S", 19.50, 0.0513), ("Q4_0", 19.97, 0.0414)),
    *(("Q3_K_M", 20.21, 0.0259), ("Q4_1", 20.64, 0.0321), ("Q4_K_S", 20.90, 0.01165)),
    *(("Q4_K_M", 21.27, 0.00912), ("Q5_0", 21.30, 0.00954), ("Q5_K_M", 21.99, 0.00604)),
    *(("Q6_K", 24.43, 0.000692), ("Q8_0", 25.28, 0.000397), ("F16", 46.22, 3e-7)),
]
CROWDED = [candidate(quant, size / 1000, loss) for quant, size, loss in CROWD]
BELOW_ZERO = [
    candidate("Q4_K_M", 4.9, 0.03, error=0.8),
    candidate("Q8_0", 8.5, 0.0001, error=3),
    candidate("F16", 16, -0.0000002, error=2),
]
CASES = {
    "eight": EIGHT,
    "one": EIGHT[:1],
    "twenty": TWENTY,
    "no quality": NO_QUALITY,
    "no speed": NO_SPEED,
    "crowded": CROWDED,
    "below zero": BELOW_ZERO,
    "nothing": [Candidate(quant="Q4_0", bytes=10)],
    "lossless": [candidate("F16", 16, 0.0)],
    "not finite": [candidate("Q1_0", 1, inf), *EIGHT],
    "one sample": [candidate("Q4_0", 4, 0.1, error=inf)],
}


@pytest.mark.parametrize("rows", CASES.values(), ids=CASES)
def test_every_picture_is_well_formed_and_within_its_frame(rows: list[Candidate]) -> None:
    for wide, narrow, _ in comparison.drawn(report(rows)):
        for picture in (wide, narrow):
            root = ElementTree.fromstring(picture.file())
            numbers = [
                float(each)
                for element in root.iter()
                for name in ("x", "y", "cx", "cy", "width", "height", "d")
                for each in re.findall(r"-?[\d.]+", element.get(name, ""))
            ]
            assert all(isfinite(each) and each >= 0 for each in numbers), picture.name
            assert max(numbers) <= max(picture.width, picture.height)
            texts = [each.tag.rpartition("}")[2] for each in root]
            assert texts[:3] == ["style", "title", "desc"]


@pytest.mark.parametrize("wide", [360, 760])
@pytest.mark.parametrize("name", ["eight", "twenty", "crowded", "below zero"])
def test_labels_do_not_overlap_and_it_is_seen_whose_they_are(name: str, wide: int) -> None:
    rows = CASES[name]
    picture = scatter.size_and_quality("m", rows, wide)
    assert picture
    drawing = ElementTree.fromstring(picture.file())
    boxes = {}
    for text in drawing.iter(f"{SVG}text"):
        if text.text in {each.quant for each in rows}:
            wide = svg.width(text.text, svg.BOLD)
            left = {"start": 0.0, "middle": wide / 2, "end": wide}[text.get("text-anchor", "start")]
            x, y = float(text.get("x", 0)) - left, float(text.get("y", 0))
            boxes[text.text] = svg.Box(x, y - 12, wide, 16)
            assert x >= 0 and x + wide <= picture.width
    assert len(boxes) == len(rows), "every quant has its name"
    assert not [pair for pair in combinations(boxes.values(), 2) if pair[0].overlaps(pair[1])]
    points = {
        str(each[0].text).partition(":")[0]: (float(mark.get("cx", 0)), float(mark.get("cy", 0)))
        for each in drawing.iter(f"{SVG}g")
        for mark in each.iter(f"{SVG}circle")
    }
    leaders = [
        re.findall(r"[\d.]+", each.get("d", ""))
        for each in drawing.iter(f"{SVG}path")
        if each.get("class") == "leader"
    ]
    led = {(float(x), float(y)) for x, y, *_ in leaders}
    for quant, point in points.items():
        is_near = svg.is_clear(boxes[quant], *point, [*points.values()])
        assert point in led or is_near, f"{quant} stands beside another's point"


def test_the_frontier_holds_what_nothing_smaller_beats() -> None:
    best = [each.quant for each in candidates.frontier(EIGHT)]
    assert best == ["Q2_K", "Q3_K_M", "Q4_0", "Q4_K_S", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0"]
    worse = candidate("Q5_0", 5.6, 0.033)
    assert worse not in candidates.frontier([*EIGHT, worse])


def test_what_is_not_positive_lies_on_the_axis_and_its_bar_ends_in_an_arrow() -> None:
    picture = scatter.size_and_quality("m", BELOW_ZERO, 760)
    assert picture
    groups = {
        (group[0].text or "").partition(":")[0]: group
        for group in ElementTree.fromstring(picture.file()).iter("{http://www.w3.org/2000/svg}g")
    }
    shapes = {
        name: [each.tag.rpartition("}")[2] for each in group] for name, group in groups.items()
    }
    assert shapes["F16"].count("circle") == 0, "a triangle that points below the scale"
    assert shapes["Q8_0"].count("circle") == 1
    for name in ("F16", "Q8_0"):
        assert any(each.get("d", "").count("L") == 2 for each in groups[name]), "an arrow"


@pytest.mark.parametrize(
    ("quality", "name"),
    [({"cosine": Estimate(0.992, 0.001)}, "cosine"), ({"rank": Estimate(0.98, 0.01)}, "rank")],
)
def test_models_without_next_tokens_are_compared_by_what_they_have(
    quality: dict[str, Estimate], name: str
) -> None:
    row = Quality(quant="Q4_0", bytes=GB, bits_per_weight=4.5, **quality)  # type: ignore[arg-type]
    rows = [Candidate(quant="Q4_0", bytes=GB, quality=row)]
    measured = candidates.metric(rows)
    assert measured and measured.name == f"{name} distance"
    (value,) = quality.values()
    loss = measured.of(rows[0])
    assert loss and loss.value == pytest.approx(1 - value.value) and loss.error == value.error


class Links(HTMLParser):
    """What a page would load or run."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [f"{n}={v}" for n, v in attrs if n in ("src", "href", "data", "srcset")]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_loads_and_runs_nothing_and_shows_foreign_names_as_text() -> None:
    name = 'org/<script>alert(1)</script>&"\x1b[31m\ufffe'
    rows = [*EIGHT, candidate("<img src=x onerror=alert(1)>", 5, 0.05)]
    made = comparison.files(report(rows, name))
    links = Links()
    links.feed(made[comparison.PAGE])
    assert links.loads == [] and not {"script", "img", "link", "iframe"} & {*links.tags}
    assert "url(" not in made[comparison.PAGE] and "@import" not in made[comparison.PAGE]
    shown = "".join(links.text)
    assert 'org/<script>alert(1)</script>&"' in shown and "<img src=x onerror=alert(1)>" in shown
    assert not re.search("[\x00-\x08\x1b\ufffe]", "".join(made.values()))
    for file, text in made.items():
        if file.endswith(".svg"):
            tags = {each.tag.rpartition("}")[2] for each in ElementTree.fromstring(text).iter()}
            assert tags <= {"svg", "style", "title", "desc", "rect", "text", "path", "g", "circle"}


def test_every_figure_stands_in_the_table() -> None:
    heads, rows = comparison.table(report(EIGHT))
    assert heads[:4] == ["quant", "file", "bits per weight", "KL divergence, nats per token"]
    row = dict(zip(heads, rows[3], strict=True))
    assert row["quant"] == "Q4_K_M" and row["file"] == "4.92 GB"
    assert row["KL divergence, nats per token"] == "0.0313 ± 0.0016"
    assert row["memory at 4096"] == "5.7 GB" and row["frontier"] == "yes"
    assert "perplexity ratio" not in heads, "a column without figures is left out"


def test_files_of_nearly_one_size_are_told_apart() -> None:
    rows = [candidate("4.83bpw", 4.912, 0.02), candidate("Q4_K_M", 4.92, 0.0313)]
    assert [row[1] for row in comparison.table(report(rows))[1]] == ["4.91 GB", "4.92 GB"]
    picture = scatter.size_and_quality("m", rows, 760)
    labels = re.findall(r">(4\.9\d* GB)<", picture.file() if picture else "")
    assert len(labels) == len({*labels}) > 2


def test_the_same_rows_give_the_same_bytes() -> None:
    assert comparison.files(report(EIGHT)) == comparison.files(report(EIGHT))


@pytest.mark.parametrize(
    ("rows", "names"),
    [
        (EIGHT, ["size-and-quality.svg", "speed.svg", "memory.svg"]),
        (NO_QUALITY, ["speed.svg", "memory.svg"]),
        (NO_SPEED, ["size-and-quality.svg", "memory.svg"]),
        (CASES["nothing"], []),
    ],
)
def test_a_picture_without_figures_is_left_out(rows: list[Candidate], names: list[str]) -> None:
    assert [*comparison.files(report(rows))] == [*names, comparison.PAGE]


def test_a_bar_that_is_not_measured_says_so() -> None:
    picture = bars.speed("m", [*EIGHT, candidate("Q1_0", 1, None, speed=False)], 760)
    assert picture and picture.file().count("not measured") == 2


@pytest.mark.parametrize(
    ("low", "high"), [(0.001, 0.4), (0.02, 0.03), (1e-9, 1), (3e-7, 2e-6), (1, 1.5)]
)
def test_a_logarithmic_axis_has_a_few_rising_ticks(low: float, high: float) -> None:
    values = svg.log_ticks(low, high)
    assert 2 <= len(values) <= 10
    assert all(a < b for a, b in pairwise(values))
    assert low * 0.99 <= values[0] and values[-1] <= high * 1.01


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        (Estimate(0.0313, 0.0006), "0.03130 ± 0.00060"),
        (Estimate(58.94, 0.3), "58.94 ± 0.30"),
        (Estimate(3456, 60), "3,456 ± 60"),
        (Estimate(0.0313), "0.0313"),
        (Estimate(0, 0.00002), "0.000000 ± 0.000020"),
        (Estimate(12345), "12,345"),
        (Estimate(2.91e-7, 1.2e-8), "2.91e-7 ± 1.2e-8"),
        (Estimate(0.5, inf), "0.5 ± ?"),
        (Estimate(inf, inf), "not finite"),
    ],
)
def test_figures_are_written_to_the_digits_that_their_error_allows(
    estimate: Estimate, text: str
) -> None:
    assert candidates.with_error(estimate) == text


def test_a_long_name_is_cut_in_a_picture_and_whole_in_its_title() -> None:
    name = "a-very-long-organisation-name/" + "x" * 200
    picture = scatter.size_and_quality(name, EIGHT, 360)
    assert picture and name in picture.title
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", picture.file())
    assert max(map(svg.width, texts)) <= 360
