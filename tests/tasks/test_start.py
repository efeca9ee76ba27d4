"""What a start costs: which modules it loads. No time is measured, see benchmarks/."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping
from itertools import takewhile
from pathlib import Path

import pytest
from conftest import REPOSITORY, Doit

# Each takes milliseconds, or brings many others.
SLOW = {
    *("asyncio", "configparser", "email", "http.client", "httpx2", "huggingface_hub"),
    *("importlib.metadata", "logging", "multiprocessing", "numpy", "packaging", "pdb", "psutil"),
    *("pydantic", "rich", "ssl", "tarfile", "yaml", "zipfile"),
    *("dataclasses", "dbm", "gettext", "pickle", "pprint", "sqlite3"),
}
MOST = 305  # modules until a server is started; 290 on Linux


def names(lines: Iterable[str]) -> set[str]:
    """The modules in what `-X importtime` prints."""
    return {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}


def loaded(env: Mapping[str, str], *words: str) -> set[str]:
    """The modules that a command loads."""
    command = [sys.executable, "-X", "importtime", "-m", "pipeline", *words]
    options = {"cwd": REPOSITORY, "capture_output": True, "text": True, "encoding": "utf-8"}
    done = subprocess.run(command, env=env, check=True, **options)  # type: ignore[call-overload]
    return names(done.stderr.splitlines())


@pytest.mark.parametrize("words", [("list",), ("help",), ("help", "serve")])
def test_a_command_that_only_prints_loads_nothing_slow(
    tmp_path: Path, words: tuple[str, ...]
) -> None:
    modules = loaded({**os.environ, "LLAMA_PIPELINE_HOME": str(tmp_path)}, *words)
    assert "pipeline.tasks.command_line" in modules
    assert modules & SLOW == set()


def test_a_module_that_is_loaded_on_use_counts(tmp_path: Path) -> None:
    modules = loaded({**os.environ, "LLAMA_PIPELINE_HOME": str(tmp_path)}, "help", "serve")
    assert "pipeline.tasks.reference" in modules


def test_no_python_is_read_as_text(tmp_path: Path) -> None:
    """doit would tokenize dodo.py, only to sort its one function: see `sort_without_source`."""
    code = (
        "import runpy, sys, tokenize; tokenize._compile = None; sys.argv[0] = 'pipeline'; "
        "runpy.run_module('pipeline', run_name='__main__')"
    )
    words = [sys.executable, "-c", code, "recipe", "backend=cpu", "ui=off"]
    env = {**os.environ, "LLAMA_PIPELINE_HOME": str(tmp_path)}
    done = subprocess.run(words, cwd=REPOSITORY, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.build
@pytest.mark.parametrize("words", [("build_bins",), ("fetch", "model=demo-embed")])
def test_a_run_that_has_nothing_to_do_loads_nothing_slow(
    demo: Doit, words: tuple[str, ...]
) -> None:
    assert demo(*words).steps == []
    assert loaded(demo.env, *words) & SLOW == set()


@pytest.mark.build
def test_what_only_the_summary_needs_is_loaded_while_the_server_starts(
    doit: Doit, gguf: Path
) -> None:
    words = (f"model={gguf}", "backend=cpu")
    with doit.serving(*words):
        pass  # what is found out once is kept from now on
    assert loaded(doit.env, "plan", *words) & SLOW == set()
    command = doit.command("serve", *words)
    command[1:3] = ["-X", "importtime", "-m", "pipeline"]
    with subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=doit.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    ) as process:
        assert process.stderr is not None
        before = list(takewhile(lambda line: not line.startswith("+ "), process.stderr))
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=120)
    assert before[-1].startswith("import time:"), "".join(before[-20:])
    modules = names(before)
    assert "pipeline.serve.supervise" in modules
    assert modules & SLOW == set()
    assert "pipeline.commands.summary" not in modules
    assert len(modules) < MOST, "is one of them only needed later?"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no disk that is always full")
@pytest.mark.parametrize("module", ["doit", "pipeline"])
def test_an_output_that_cannot_be_written_is_named(bare: Doit, module: str) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", module, "plan", "model=demo"],
            cwd=REPOSITORY,
            env=bare.env,
            stdin=subprocess.DEVNULL,
            stdout=full,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            timeout=60,
        )
    assert done.returncode == 1
    assert "the output cannot be written: No space left on device" in done.stderr
