"""What is typed: several lines, commands, and where it is kept."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from prompt_toolkit.history import InMemoryHistory

from pipeline.chat.terminal import SavedHistory, history, is_unfinished, unquoted


@pytest.mark.parametrize(
    ("typed", "is_open", "text"),
    [
        ("hello", False, "hello"),
        ('"""hello', True, None),
        ('"""one\ntwo"""', False, "one\ntwo"),
        ('say """ twice', False, 'say """ twice'),
        ("one \\", True, None),
        ("one \\\ntwo", False, "one \ntwo"),
        (" /exit ", False, "/exit"),
        (os.fsdecode(b"caf\xe9"), False, "caf\ufffd"),
        ("t\udcc3\udcabst", False, "tëst"),  # where Python took the terminal for one of ASCII
        ("half \ud83d", False, "half \ufffd"),
    ],
)
def test_several_lines(typed: str, is_open: bool, text: str | None) -> None:
    assert is_unfinished(typed) is is_open
    if text is not None:
        assert unquoted(typed) == text


def test_inputs_are_kept_for_this_user_alone(tmp_path: Path) -> None:
    file = tmp_path / "a ü" / "history"
    history(file).store_string("one\ntwo")
    assert list(history(file).load_history_strings()) == ["one\ntwo"]
    if os.name == "posix":
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_where_inputs_cannot_be_kept_they_are_not(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert isinstance(history(tmp_path / "file" / "history"), InMemoryHistory)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no disk that is always full")
def test_a_full_disk_loses_the_input_alone() -> None:
    SavedHistory("/dev/full").store_string("hello")
