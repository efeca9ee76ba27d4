"""The page as a browser draws it: with its own letters, on a wide and on a narrow screen."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from browsing import script_errors
from test_comparison import CASES, report

from pipeline.report import comparison

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

# The names of quants in the first picture that is shown, and whether two of them overlap.
LABELS = """
const svg = [...document.querySelectorAll("svg.chart")].find(each => each.clientWidth);
const boxes = [...svg.querySelectorAll("text.label")].map(each => each.getBoundingClientRect());
const overlap = (a, b) => a.left < b.right - 1 && b.left < a.right - 1
    && a.top < b.bottom - 3 && b.top < a.bottom - 3;
const pairs = boxes.flatMap((a, n) => boxes.slice(n + 1).map(b => [a, b]));
return [boxes.length, pairs.filter(([a, b]) => overlap(a, b)).length];
"""
# What stands out of the page, or out of its picture.
OUTSIDE = """
const wide = document.documentElement;
const outside = [...document.querySelectorAll("svg.chart text")].filter(each => {
    const box = each.getBoundingClientRect(), svg = each.ownerSVGElement.getBoundingClientRect();
    return box.width && (box.left < svg.left - 1 || box.right > svg.right + 1);
});
return [wide.scrollWidth - wide.clientWidth, ...outside.map(each => each.textContent)];
"""


@pytest.mark.slow
def test_nothing_overlaps_and_nothing_is_cut(browser: Chrome, tmp_path: Path) -> None:
    name = "an-organisation-with-a-long-name/A-Model-Whose-Name-Is-Long-Too-70B-Instruct"
    for case in ("eight", "twenty", "crowded", "below zero", "no quality"):
        page = tmp_path / case / comparison.PAGE
        page.parent.mkdir()
        page.write_text(comparison.files(report(CASES[case], name))[comparison.PAGE], "utf-8")
        for wide in (360, 1000):
            size = {"width": wide, "height": 900, "deviceScaleFactor": 1, "mobile": False}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            browser.get(page.as_uri())
            assert browser.execute_script(OUTSIDE) == [0], (case, wide)
            if case != "no quality":
                rows = len(CASES[case])
                assert browser.execute_script(LABELS) == [rows, 0], (case, wide)
    assert script_errors(browser) == []
