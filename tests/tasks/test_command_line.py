from __future__ import annotations

import re
import subprocess
import sys

import pytest
from conftest import REPOSITORY

from pipeline.commands.variables import TABLE
from pipeline.core.errors import UsageError
from pipeline.core.variables import flag, text
from pipeline.tasks import command_line

TASKS = ("serve", "plan", "fetch", "test", "claude", "doctor", "_check")
PARSERS = {"model": text, "port": text, "keep_f16": flag, "gguf_path": text, "ctx_size": text}
PARSERS |= {"quant": text, "start": flag}


def understood(line: str) -> list[str]:
    return command_line.understood(line.split(), TASKS, lambda: PARSERS)


@pytest.mark.parametrize(
    ("line", "same"),
    [
        ("serve model=demo", "serve model=demo"),
        ("serve --model demo", "serve model=demo"),
        ("serve --model=demo --port 1", "serve model=demo port=1"),
        ("--port 1 serve --model demo", "port=1 serve model=demo"),
        ("serve --gguf-path X --port N --keep-f16", "serve gguf_path=X port=N keep_f16=1"),
        ("serve --keep_f16 --port 1", "serve keep_f16=1 port=1"),
        ("serve --keep-f16 no --port 1", "serve keep_f16=no port=1"),
        ("serve --keep-f16=0", "serve keep_f16=0"),
        ("serve --keep-f16 model=demo", "serve keep_f16=1 model=demo"),
        ("serve --model a=b", "serve model=a=b"),
        ("serve --ctx-size -1", "serve ctx_size=-1"),
        ("serve --server.flash-attn on", "serve server.flash-attn=on"),
        ("serve -port 1", "serve port=1"),
        ("fetch:one --model demo", "fetch:one model=demo"),
        ("claude --start -- --model x -p", "claude start=1 -- --model x -p"),
        ("test tests/core", "test tests/core"),
        ("list --all --status", "list --all --status"),
        ("clean -n quantize --dry-run", "clean -n quantize --dry-run"),
        ("", ""),
    ],
)
def test_options_are_variables(line: str, same: str) -> None:
    assert understood(line) == same.split()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("serv model=demo", "serv: there is no such task; did you mean serve\\?"),
        ("pull demo", "here it is prepare"),
        ("check", "no such task"),  # what is private is not offered
        ("serve --prot 1", "--prot: there is no such option; did you mean port\\?"),
        ("serve --gguf_pat 1", "did you mean gguf-path\\?"),
        ("serve -c 4096", "here it is --ctx-size"),
        ("serve --max-model-len 4096", "here it is --ctx-size"),
        ("serve --quantization q8_0", "here it is --quant"),
        ("serve --print-diagnostics", "try ./doitw doctor"),
        ("serve --flash-attn on", "server.NAME="),
        ("serve --server. on", "no such option"),
        ("serve -v", "-v: there is no such option"),
        ("serve --model", "--model: needs a value"),
        ("serve --model --port 1", "--model: needs a value"),
    ],
)
def test_mistakes_are_answered_by_what_there_is(line: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        understood(line)
    assert re.search(said, str(caught.value))


def test_an_empty_word() -> None:
    with pytest.raises(UsageError, match="is empty"):
        command_line.understood(["serve", ""], TASKS, lambda: PARSERS)
    behind = ["claude", "--", "", "x"]
    assert command_line.understood(behind, TASKS, lambda: PARSERS) == behind


def test_the_variables_are_read_where_an_option_is_written_alone() -> None:
    def table() -> dict[str, object]:
        raise AssertionError

    line = ["serve", "model=demo", "--", "--port"]
    assert command_line.understood(line, TASKS, table) == line


def test_what_other_tools_call_it_leads_to_something() -> None:
    tasks, known = command_line.task_names(), {variable.name for variable in TABLE}
    assert {*command_line.TASKS_ELSEWHERE.values(), *command_line.WITH_WORDS} <= {*tasks}
    assert {*command_line.OPTIONS_ELSEWHERE.values()} <= {*known, *tasks}
    assert not {*command_line.TASKS_ELSEWHERE} & {*tasks, *command_line.COMMANDS}
    assert not {*command_line.OPTIONS_ELSEWHERE} & known


def doitw(*words: str, **more: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline", *words]
    return subprocess.run(  # type: ignore[call-overload,no-any-return]
        command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=60, **more
    )


def test_as_users_type_it() -> None:
    wrong = doitw("serv")
    assert (wrong.returncode, wrong.stdout) == (3, "")
    assert wrong.stderr.splitlines()[0] == "doitw: serv: there is no such task; did you mean serve?"
    refused = doitw("plan", "--model", "demo", "--port", "99999999")
    assert refused.returncode == 3 and "port=99999999: must be a whole number" in refused.stderr
    told = doitw("--version").stdout.splitlines()
    assert [line.split()[0] for line in told] == ["llama-pipeline", "llama.cpp", "doit"]


@pytest.mark.skipif(sys.platform == "win32", reason="a shell's pipe")
def test_a_reader_that_has_enough_is_no_error() -> None:
    line = (
        f"'{sys.executable}' -m pipeline list --all --template '{{name}}{'x' * 9000}\n' | head -1"
    )
    done = subprocess.run(
        line, shell=True, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.stdout.startswith("_") or done.stdout.startswith("build_bins")
    assert done.stderr == ""
