"""Every parser but those of model files, fed with hostile input. See `hostile_input.py`."""

from __future__ import annotations

from pathlib import Path

import parsers_of_answers
import parsers_of_archives
import parsers_of_configurations
import parsers_of_figures
import parsers_of_records
import parsers_of_requests
import parsers_of_words
import pytest
from figures import Figure
from hostile_input import HARNESSES, explore, explore_for

MODULES = (
    *(parsers_of_answers, parsers_of_archives, parsers_of_configurations, parsers_of_figures),
    *(parsers_of_records, parsers_of_requests, parsers_of_words),
)
FEW, ENOUGH_TO_FAIL, SECONDS = 25, 400, 2.5
all_of_them = pytest.mark.parametrize("name", HARNESSES)


@all_of_them
def test_hostile_input(name: str, tmp_path: Path) -> None:
    explore(HARNESSES[name], tmp_path, FEW)


@pytest.mark.trust
@all_of_them
def test_much_hostile_input(name: str, tmp_path: Path, figure: Figure) -> None:
    figure("hostile inputs parsed", explore_for(HARNESSES[name], tmp_path, SECONDS))


@all_of_them
def test_a_spoiled_parser_is_noticed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    HARNESSES[name].spoil(monkeypatch)
    with pytest.raises(Exception):  # noqa: B017 - whatever a broken parser raises
        explore(HARNESSES[name], tmp_path, ENOUGH_TO_FAIL, shrinks=False)
