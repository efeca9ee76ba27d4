"""Whether a text is long enough, which llama-perplexity tells in a file: what it prints is lost
where it ends before its last lines are written."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipeline.core.errors import UsageError
from pipeline.models import text_length

WORDS = "Some words about nothing, in short. "


@pytest.fixture(params=[True, False], ids=["prints", "prints nothing"])
def program(request: pytest.FixtureRequest, built: Path, tmp_path: Path) -> Path:
    """llama-perplexity, and one that prints nothing, as on a busy machine."""
    real = next(built.glob("*-cpu")) / "llama-perplexity"
    if request.param:
        return real
    folder = tmp_path / "programs-cpu"
    folder.mkdir()
    shutil.copy2(real, folder / "real")
    silent = folder / "llama-perplexity"
    silent.write_text('#!/bin/sh\nexec "${0%/*}/real" "$@" --log-disable\n')
    silent.chmod(0o755)
    return silent


def test_a_short_text_is_refused_whatever_is_printed(
    program: Path, gguf: Path, tmp_path: Path
) -> None:
    text = tmp_path / "kürz.txt"
    text.write_text(WORDS * 40, encoding="utf-8")
    refused = r"text=.*kürz.txt: has (\d+|too few) tokens, and 1024 are needed at least"
    with pytest.raises(UsageError, match=refused) as error:
        text_length.require(program, gguf, text, "text")
    assert error.value.hint == "pass a longer text=PATH"
    text_length.require(program, gguf, text, "text", 64)
    text.write_text(WORDS * 400, encoding="utf-8")
    text_length.require(program, gguf, text, "text")


def test_where_the_program_cannot_tell_nothing_is_refused(gguf: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(WORDS * 40, encoding="utf-8")
    broken = tmp_path / "llama-perplexity"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    text_length.require(broken, gguf, text, "text")
