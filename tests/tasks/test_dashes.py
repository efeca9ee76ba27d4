"""What stands behind `--`."""

from __future__ import annotations

import sys

import pytest

from pipeline.tasks.doit import before_dashes, behind_dashes


def test_words_of_another_program_are_no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    line = ["doit", "claude", "name=one", "a=b=c", "--", "-p", "if a == b", "name=two"]
    monkeypatch.setattr(sys, "argv", line)
    seen_by_doit = {"name": "two", "a": "b=c", "if a ": "= b"}
    assert before_dashes(seen_by_doit) == {"name": "one", "a": "b=c"}
    assert behind_dashes(["-p"]) == ["-p", "if a == b", "name=two"]


def test_without_them_all_is_as_doit_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["doit", "test", "tests/x.py"])
    assert before_dashes({"model": "demo"}) == {"model": "demo"}
    assert behind_dashes(["tests/x.py"]) == ["tests/x.py"]
