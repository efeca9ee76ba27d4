"""The figures of the tests that prove how far the pipeline can be trusted: `pytest -m trust`.

A test counts what it tried, and the end of the run names the sums:

    def test_killed_anywhere(figure: Figure) -> None:
        ...
        figure("kills survived", kills)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

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
    if sums:
        terminalreporter.section("figures")
        for name, count in sums.items():
            terminalreporter.line(f"{count:>10,} {name}")
