"""What `tune` makes of what it has measured, where no program has to run."""

from __future__ import annotations

import pytest

from pipeline.commands import tune
from pipeline.commands.variables import duration
from pipeline.serve.server import Server

CMD = ("--model", "m", "--spec-draft-model", "d", "--spec-type", "draft-simple", "--port", "1")
SERVER = Server(name="x", executable="llama-server", cmd=CMD, folder="/", log_file="/log")


def test_a_server_without_drafts_is_the_same_in_all_else() -> None:
    assert tune.without_drafts(SERVER).cmd == ("--model", "m", "--port", "1")


def test_options_come_last() -> None:
    assert tune.with_options(SERVER, {"threads": "3"}).cmd == (*CMD, "--threads", "3")


@pytest.mark.parametrize(
    ("ratios", "chosen", "without"),
    [
        ({}, "", 0),
        ({"defaults": 1.0, "without drafts": 1.04}, "", 0),
        ({"defaults": 1.0, "without drafts": 1.5}, "", 1.5),
        ({"defaults": 1.0, "spec-draft-n-max 6": 1.04, "without drafts": 0.5}, "", 0),
        ({"defaults": 1.0, "spec-draft-n-max 6": 1.2, "without drafts": 1.1}, "6", 0),
        ({"defaults": 1.0, "spec-draft-n-max 1": 1.2, "without drafts": 1.8}, "1", 1.5),
    ],
)
def test_drafts_are_chosen_where_they_are_clearly_faster(
    ratios: dict[str, float], chosen: str, without: float
) -> None:
    assert tune.fastest_draft(ratios, tune.DEFAULTS) == (chosen, pytest.approx(without))


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("5m", 300), ("5 M", 300)])
def test_a_budget_is_in_seconds_or_minutes(text: str, seconds: int) -> None:
    assert duration(30, 86400)(text) == seconds


@pytest.mark.parametrize("text", ["", "29", "0m", "1h", "-90", "1e3", "90.5", "9999999999"])
def test_any_other_budget_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="seconds from 30 to 86400"):
        duration(30, 86400)(text)
