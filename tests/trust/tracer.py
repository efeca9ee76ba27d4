"""The tracer of `tracer.c`, compiled once for all runs of the tests."""

from __future__ import annotations

import hashlib
import platform
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from conftest import REPOSITORY

from pipeline.core.paths import Home
from pipeline.core.paths import cache as cache_folder
from pipeline.core.store.locks import only_one

SOURCE = Path(__file__).with_name("tracer.c")
FLAGS = ("-O1", "-Wall", "-Wno-missing-field-initializers")


@cache
def tracer() -> Path:
    """The program; skips the test where there can be none."""
    compiler = shutil.which("cc")
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        pytest.skip("the tracer knows Linux on x86_64 and aarch64")
    if not compiler:
        pytest.skip("the tracer is compiled, and there is no cc")
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    target = cache_folder(Home(REPOSITORY)) / "tests" / "tracer" / digest
    with only_one(target):
        if not target.exists():
            made = target.with_suffix(".part")
            subprocess.run([compiler, *FLAGS, "-o", made, SOURCE], check=True)
            made.replace(target)
    if subprocess.run([target, "--", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this system does not let a process be traced")
    return target
