"""What stands behind `--`."""

from __future__ import annotations

import sys

import pytest

from pipeline.tasks.doit import behind_dashes, typed


def test_words_of_another_program_are_no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    line = ["doit", "claude", "name=one", "a=b=c", "--", "-p", "if a == b", "name=two"]
    monkeypatch.setattr(sys, "argv", line)
    assert typed() == ({"name": "one", "a": "b=c"}, ["claude"])
    assert behind_dashes(["-p"]) == ["-p", "if a == b", "name=two"]


def test_without_them_all_is_as_doit_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["doit", "-v", "2", "test", "model=demo", "tests/x.py"])
    assert typed() == ({"model": "demo"}, ["2", "test", "tests/x.py"])
    assert behind_dashes(["tests/x.py"]) == ["tests/x.py"]
