"""The figures of the tests that prove how far the pipeline can be trusted: `pytest -m trust`.

A test counts what it tried, and the end of the run names the sums:

    def test_killed_anywhere(figure: Figure) -> None:
        ...
        figure("kills survived", kills)
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import seeds

Figure = Callable[[str, int], None]
PREFIX = "figure: "


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Figure:
    """Adds to a figure of this run, from any worker."""

    def add(name: str, count: int) -> None:
        request.node.user_properties.append((f"{PREFIX}{name}", count))

    return add


def pytest_terminal_summary(terminalreporter: Any) -> None:
    sums: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, count in getattr(report, "user_properties", ()):
                if name.startswith(PREFIX) and report.when == "call":
                    sums[name.removeprefix(PREFIX)] += count
    found = [*seeds_of(terminalreporter.stats)]
    if found and "trust" in terminalreporter.config.option.markexpr:
        terminalreporter.section(f"seeds ({seeds.PREFIX}… repeats a test)")
        for line in found:
            terminalreporter.line(line)
    if sums:
        terminalreporter.section("figures")
        for name, count in sums.items():
            terminalreporter.line(f"{count:>10,} {name}")


def seeds_of(stats: Any) -> Iterator[str]:
    """Each test that chance decides, with its seeds."""
    for reports in stats.values():
        for report in reports:
            printed = report.capstdout if getattr(report, "when", "") == "call" else ""
            if found := re.findall(rf"^{seeds.PREFIX}(\d+)$", printed, re.M):
                yield f"{' '.join(found):>10} {report.nodeid}"
