"""What a start costs: which modules it loads. No time is measured, see benchmarks/."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

# Each takes milliseconds, or brings many others.
SLOW = {
    *("asyncio", "configparser", "email", "http.client", "httpx2", "huggingface_hub"),
    *("importlib.metadata", "logging", "multiprocessing", "numpy", "packaging", "pdb", "psutil"),
    *("pydantic", "rich", "ssl", "tarfile", "yaml", "zipfile"),
}


def loaded(home: Path, *words: str) -> set[str]:
    """The modules that a command loads."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "pipeline", *words],
        cwd=REPOSITORY,
        env={**os.environ, "LLAMA_PIPELINE_HOME": str(home)},
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=True,
    )
    lines = done.stderr.splitlines()
    return {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}


@pytest.mark.parametrize("words", [("list",), ("help",), ("help", "serve")])
def test_a_command_that_only_prints_loads_nothing_slow(
    tmp_path: Path, words: tuple[str, ...]
) -> None:
    modules = loaded(tmp_path, *words)
    assert "pipeline.tasks.command_line" in modules
    assert modules & SLOW == set()
