from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

from pipeline.commands.request import elsewhere
from pipeline.commands.variables import GROUPS, TABLE
from pipeline.core.errors import UsageError
from pipeline.deploy import boot
from pipeline.serve.config import named, synonyms
from pipeline.tasks import command_line, reference
from pipeline.tasks.step import Step
from pipeline.tasks.table import STEPS


def understood(line: str) -> list[str]:
    return command_line.understood(line.split())


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
        ("serve --print-diagnostics --port 1", "doctor serve port=1"),
        ("--print_diagnostics", "doctor"),
        ("fetch:one --model demo", "fetch:one model=demo"),
        ("claude --start -- --model x -p", "claude start=1 -- --model x -p"),
        ("test tests/core", "test tests/core"),
        ("list --all --status", "list --all --status"),
        ("clean -n quantize --dry-run", "clean -n --dry-run quantize"),
        ("list --status --model demo", "list --status model=demo"),
        ("list --stat -qs", "list --stat -qs"),
        ("list --sort name serve", "list --sort name serve"),
        ("clean q*", "clean q*"),
        ("run -n 2 fetch:one", "run -n 2 fetch:one"),
        ("help port", "help port"),
        ("help clean", "help clean"),
        ("completion zsh", "completion zsh"),
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
        ("serve --porrt 1", "--porrt: there is no such option; did you mean --port\\?"),
        ("serve --gguf_pat 1", "did you mean --gguf-path\\?"),
        ("serve -c 4096", "here it is --ctx-size"),
        ("serve --max-model-len 4096", "here it is --ctx-size"),
        ("serve --quantization q8_0", "here it is --quant"),
        ("serve --server-port 1", "here it is --port"),
        ("serve --n-gpu-layers 1", "here it is --gpu-layers"),
        ("serve --flash-attention on", "here it is --server.flash-attn"),
        ("serve --hf-repo org/x", "here it is --model"),
        ("serve --no-mmproj", "server.NAME="),
        ("serve --server. on", "no such option"),
        ("serve -v", "-v: there is no such option"),
        ("serve --model", "--model: needs a value"),
        ("serve --model --port 1", "--model: needs a value"),
        ("list serv", "serv: there is no such task; did you mean serve\\?"),
        ("clean fetc", "did you mean fetch\\?"),
        ("forget nosuch", "nosuch: there is no such task"),
        ("run serv", "did you mean serve\\?"),
        ("info", "info: needs one task"),
        ("info nosuch", "nosuch: there is no such task"),
        ("help serv", "did you mean serve\\?"),
        ("help ctx_sise", "did you mean ctx_size\\?"),
        ("list --statsu", "--statsu: there is no such option; did you mean --status\\?"),
        ("clean --port", "--port: needs a value"),
        ("serve port=1 model=demo port=2", "port=1 and port=2 contradict each other"),
        ("serve --port 1 port=2", "port=1 and port=2 contradict each other"),
        ("serve port = 8080", "=: a space stands beside the =\n.*write port=8080"),
        ("serve port =8080 model=demo", "=8080: a space stands beside the =\n.*write port=8080"),
        ("serve port= 8080", "port=: a space stands beside the =\n.*write port=8080"),
        ("serve server.top_k=1 --server.top-k 2", "server.top-k=1 and server.top-k=2 contradict"),
    ],
)
def test_mistakes_are_answered_by_what_there_is(line: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        understood(line)
    assert re.search(said, str(caught.value))


@pytest.mark.parametrize(
    ("line", "same"),
    [
        ("plan --help", "help plan"),
        ("serve model=demo -h", "help serve"),
        ("serve alias= model=demo", "serve alias= model=demo"),
        ("prepare alias= plan", "prepare alias= plan"),
        ("claude -- --help", "claude -- --help"),
    ],
)
def test_help_and_empty_values(line: str, same: str) -> None:
    assert understood(line) == same.split()


def test_an_empty_word() -> None:
    with pytest.raises(UsageError, match="is empty"):
        command_line.understood(["serve", ""])
    behind = ["claude", "--", "", "x"]
    assert command_line.understood(behind) == behind


def test_the_variables_are_read_where_an_option_is_written_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(command_line, "parsers")
    line = ["serve", "model=demo", "--", "--port"]
    assert command_line.understood(line) == line
    with pytest.raises(NameError):
        command_line.understood(["serve", "--port", "1"])


def test_what_other_tools_call_it_leads_to_something() -> None:
    tasks, known = {step.name for step in STEPS}, {variable.name for variable in TABLE}
    assert {*command_line.TASKS_ELSEWHERE.values(), *command_line.WITH_WORDS} <= tasks
    assert not {*command_line.TASKS_ELSEWHERE} & {*tasks, *command_line.COMMANDS}
    for name in (*synonyms.KEYS, *synonyms.MEANINGS):
        assert (elsewhere(name) or "server.").startswith(("server.", *known))


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
    assert (
        doitw("list", "--port").stderr == "doitw: --port: needs a value\n  hint: write --port=…\n"
    )
    output = doitw("--version").stdout.splitlines()
    assert [line.split()[0] for line in output] == ["llama-pipeline", "llama.cpp", "doit"]


@pytest.mark.skipif(sys.platform == "win32", reason="a shell's pipe")
def test_variables_of_the_environment_that_are_not_read_are_named(tmp_path: Path) -> None:
    file = tmp_path / "mixed.toml"
    file.write_text("[instance.a.control]\nengine = 'vllm'\n[instance.a.server]\nmodel = 'o/x'")
    overrides = '{"instance": {"a": {"server": {"port": 8123}}}}'
    env = {**os.environ, "AUTO_INFER_VLLM_OVERRIDES": overrides, "LLM_PROFILE": "chat"}
    env.pop("AUTO_INFER_VLLM_CONFIG", None)
    said = doitw("plan", f"config={file}", env=env)
    both = said.stdout + said.stderr
    assert "LLM_PROFILE is set, and not read; did you mean LLM_PROFILE_NAME?" in both
    why = "AUTO_INFER_VLLM_OVERRIDES is set, and not read here; this file takes AUTO_INFER_LLAMA"
    assert why in both
    env = {**os.environ, "AUTO_INFER_LLAMA_CPP_CONFIG": str(tmp_path / "gone.toml")}
    said = doitw("plan", env=env)
    assert "AUTO_INFER_LLAMA_CPP_CONFIG=" in said.stdout + said.stderr


@pytest.mark.parametrize("value", ["of", "strict", "none"])
def test_a_sandbox_that_cannot_be_meant_is_refused(value: str) -> None:
    """`strict` would be taken for what it is not."""
    wrong = doitw("ps", env={**os.environ, "LLAMA_PIPELINE_SANDBOX": value})
    assert wrong.returncode == 3
    assert f"LLAMA_PIPELINE_SANDBOX={value}: must be off, or unset" in wrong.stderr
    assert doitw("ps", env={**os.environ, "LLAMA_PIPELINE_SANDBOX": " "}).returncode == 0
    off = doitw("ps", env={**os.environ, "LLAMA_PIPELINE_SANDBOX": "False"})
    assert off.returncode == 0 and "the sandbox is off" in off.stderr


@pytest.mark.parametrize("home", [__file__, "~nobody-of-this-name/home"])
def test_a_home_that_is_none_is_an_error_of_usage(home: str) -> None:
    said = doitw("models", env={**os.environ, "LLAMA_PIPELINE_HOME": home})
    assert said.returncode == 3 and said.stderr.startswith("error: ")
    assert said.stderr.count("error: ") == 1 and "Traceback" not in said.stderr


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("LLM_PROFILES_CONFIG", "LLM_PROFILES_CONFIG_PATH"),
        ("AUTO_INFER_LLAMACPP_CONFIG", "AUTO_INFER_LLAMA_CPP_CONFIG"),
        ("LLAMA_PIPELINE_HOM", "LLAMA_PIPELINE_HOME"),
        ("LLM_PROFIL_NAME", "LLM_PROFILE_NAME"),
        ("AUTOINFER_LLAMA_CPP_ON_BOOT", "AUTO_INFER_LLAMA_CPP_ON_BOOT"),
        ("LLAMACPP_CTX_SIZE_OVERIDE", "LLAMACPP_CTX_SIZE_OVERRIDE"),
        ("LLAMACPP_CTX_SIZE", "LLAMACPP_CTX_SIZE_OVERRIDE"),
        ("LLAMACPP_HOST", "LLAMACPP_HOST_OVERRIDE"),
        ("LLAMA_SERVER_BIN_DIR", "LLAMA_SERVER_BINS_DIR"),
        ("LLAMACPP_HOST_PORT", ""),
        ("LLAMA_SERVER_BINS_DIR", ""),
        ("LLAMA_PIPELINE_KEY_CHAT_1A", ""),
        ("LLM_API_KEY", ""),
        *((start + end, "") for start, ends in named.READ.items() for end in ends),
        *((variable, "") for variable in (*boot.FILES, *boot.FILES.values())),
        *((variable, "") for variable in ("LLM_USER", "LLM_CACHE_DIR", "LLM_API_KEY_FILE")),
    ],
)
def test_a_variable_that_is_almost_one_that_is_read(name: str, meant: str) -> None:
    lines = [f"{name} is set, and not read; did you mean {meant}?"] if meant else []
    assert named.misspelled({name: "x"}) == lines


def test_a_reader_that_has_enough_is_no_error() -> None:
    line = (
        f"'{sys.executable}' -m pipeline list --all --template '{{name}}{'x' * 9000}\n' | head -1"
    )
    done = subprocess.run(
        line, shell=True, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.stdout.startswith("_") or done.stdout.startswith("build_bins")
    assert done.stderr == ""


def doit(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "doit", *words]
    return subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=60
    )


def test_plain_doit_understands_the_same() -> None:
    wrong = doit("serv")
    assert wrong.returncode == 3 and "serv: there is no such task; did you mean" in wrong.stderr
    assert "hint: doit list shows all tasks" in wrong.stderr
    refused = doit("plan", "--model", "demo", "--port", "99999999")
    assert refused.returncode == 3 and "port=99999999: must be a whole number" in refused.stderr
    assert doit("-n", "2", "plan", "modle=x").stderr.startswith("error: modle: there is no such")
    assert doit("info", "nosuch").stderr.startswith("error: nosuch: there is no such task")


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_what_a_step_reads_is_a_variable_or_a_group(step: Step) -> None:
    assert {*step.reads} <= {*GROUPS, *(each.name for each in TABLE)}


def test_every_variable_is_read_by_a_step() -> None:
    assert {each.name for each in TABLE} <= {
        each.name for step in reference.PUBLIC for each in reference.read_by(step)
    }


@pytest.mark.parametrize(
    ("words", "variables", "refused"),
    [
        ("chat", "model port server.seed", "port=1: not a variable of chat"),
        ("ps", "name format force", "force=1: not a variable of ps"),
        ("logs", "server.seed", "server.seed=1: not a variable of logs"),
        ("logs ps", "lines format model", "model=1: not a variable of ps, logs"),
        ("clean fetch", "model older_than", "older_than=1: not a variable of fetch"),
        ("fetch:a", "model port", ""),
        ("build_bins", "model port name", "name=1: not a variable of build_bins"),
        ("systemd", "config backend max_loading quant", ""),
        ("list", "model older_than", ""),
        ("clean q*", "older_than", ""),
        ("", "older_than", ""),
    ],
)
def test_what_no_step_reads_is_refused(words: str, variables: str, refused: str) -> None:
    given = dict.fromkeys(variables.split(), "1")
    if not refused:
        command_line.require_read(words.split(), given)
        return
    with pytest.raises(UsageError) as caught:
        command_line.require_read(words.split(), given)
    assert caught.value.message == refused and "lists its variables" in caught.value.hint


def test_help_lists_the_variables_of_a_step() -> None:
    output = doitw("help", "logs").stdout
    assert output.splitlines()[0] == "logs  print the log of name=; follow=1 stays with it"
    assert "  lines    how many lines from the end [50]" in output
    assert "dry_run" not in output, "that is of up"
    assert "docs/instances.md" in output and "](" not in output and "`" not in output
    readers = "read by: upgrade, serve, chat, tune, quality, compare, plan"
    assert readers in doitw("help", "ctx_size").stdout
    assert "doitw clean" in doitw("help").stdout
