"""How hints name the command that the user has."""

from __future__ import annotations

import sys

import pytest

from pipeline.core.errors import did_you_mean, doitw

ANY = pytest.mark.skipif(sys.platform == "win32", reason="paths of other systems")


@ANY
@pytest.mark.parametrize(
    ("program", "name", "typed"),
    [
        ("doitw", "./doitw", "./doitw up"),
        ("doitw", "../my repo/doitw", "'../my repo/doitw' up"),
        ("doitw", "/repo/doitw", "/repo/doitw up"),
        ("/x/bin/doit", "", "doit up"),
        ("/x/site-packages/doit/__main__.py", "", "doit up"),
        ("/x/pipeline/serve/gateway/__main__.py", "", "./doitw up"),
        ("/x/pipeline/serve/gateway/__main__.py", "../doitw", "../doitw up"),
    ],
)
def test_a_hint_names_the_command_as_it_was_typed(
    monkeypatch: pytest.MonkeyPatch, program: str, name: str, typed: str
) -> None:
    monkeypatch.setattr(sys, "argv", [program, "serve"])
    monkeypatch.setenv("LLAMA_PIPELINE_COMMAND", name)
    assert doitw("up") == typed


@ANY
def test_a_command_that_the_shell_finds_goes_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["doitw"])
    monkeypatch.setenv("LLAMA_PIPELINE_COMMAND", "/bin/sh")
    monkeypatch.setenv("PATH", "/bin")
    assert doitw("up") == "sh up"


def test_another_letter_case_is_the_nearest() -> None:
    assert did_you_mean("MODEL", ["mode", "model"]) == "; did you mean model?"
    assert did_you_mean("XYZ", ["model"]) == ""
