from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import REPOSITORY

from pipeline.core import log
from pipeline.core.errors import PipelineError, UsageError, did_you_mean
from pipeline.core.text import plural, size


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (1_234_567, "1.2 MB"),
        (999_999, "1.0 MB"),
        (4_920_734_272, "4.9 GB"),
        (2.5e12, "2.5 TB"),
        (12_345e12, "12345.0 TB"),
        (-5_000_000, "-5.0 MB"),
    ],
)
def test_size(count: float, text: str) -> None:
    assert size(count) == text


def test_plural() -> None:
    assert [plural(n, "file") for n in (0, 1, 2)] == ["0 files", "1 file", "2 files"]


def test_say_is_not_a_result(capsys: pytest.CaptureFixture[str]) -> None:
    log.info("größe")
    assert capsys.readouterr() == ("", "größe\n")


def test_errors_read_with_their_next_step() -> None:
    assert str(PipelineError("it is so", "do this")) == "it is so\n  hint: do this"
    assert str(UsageError("it is so")) == "it is so"
    assert issubclass(UsageError, PipelineError)


def test_did_you_mean() -> None:
    assert did_you_mean("ctx_sise", ("ctx_size", "port")) == "; did you mean ctx_size?"
    letters = "swapped letters come before a word that only looks alike"
    assert did_you_mean("prot", ("prompt", "port")) == "; did you mean port?", letters
    assert did_you_mean("zzz", ["ctx_size", "port"]) == ""


# Nothing that is printed controls the terminal

HOSTILE = "a\x1b[31mb\x1b[2Jc\x07\r\x7f\x9bd\u202e\u2066e\u2028f\u200fü\t日\n"
SHOWN = "ab[2Jcdefü\t日\n"


def printed(function: Callable[[], object], encoding: str = "utf-8") -> str:
    """What reaches the terminal of a run, on stdout and then on stderr."""
    files = [io.BytesIO(), io.BytesIO()]
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (io.TextIOWrapper(file, encoding=encoding) for file in files)
    try:
        log.guard_streams()
        log.guard_streams()  # once is enough
        function()
        sys.stdout.flush()
        sys.stderr.flush()
        return b"".join(file.getvalue() for file in files).decode(encoding)
    finally:
        sys.stdout, sys.stderr = before


def test_no_words_of_others_reach_the_terminal_as_they_are() -> None:
    assert printed(lambda: print(HOSTILE, end="")) == SHOWN
    assert printed(lambda: log.info(HOSTILE)) == SHOWN + "\n"
    assert printed(lambda: sys.stderr.write(HOSTILE)) == SHOWN
    assert printed(lambda: sys.stdout.writelines([HOSTILE, HOSTILE])) == SHOWN * 2


def test_json_is_what_it_was() -> None:
    text = json.dumps({"a": HOSTILE.replace("\x7f", "")})
    assert printed(lambda: print(text)) == text + "\n"


def test_a_letter_that_cannot_be_shown_is_its_number() -> None:
    assert printed(lambda: log.info("a\udcffb")) == "a\\udcffb\n"
    assert printed(lambda: log.info("日"), "latin-1") == "\\u65e5\n"


def test_what_draws_writes_to_the_stream_itself() -> None:
    def draw() -> None:
        log.unfiltered(sys.stdout).write("\x1b[2K")
        log.unfiltered(sys.stdout).flush()

    assert printed(draw) == "\x1b[2K"


@pytest.mark.parametrize("module", ["pipeline", "doit"])
def test_what_doit_prints_itself_is_in_a_file_too(module: str, tmp_path: Path) -> None:
    """It takes stdout before the streams are guarded, and Python empties only the guarded one."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    env["LLAMA_PIPELINE_HOME"] = str(tmp_path)
    command = [sys.executable, "-m", module, "list", "-q"]
    with (tmp_path / "list").open("w") as out:
        subprocess.run(command, cwd=REPOSITORY, env=env, stdout=out, check=True)
    assert "build_bins" in (tmp_path / "list").read_text().split()
