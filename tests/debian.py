"""Programs that tests need and that no Python package has, from apt where this machine has it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest


def require(*packages: str) -> None:
    """Have the packages installed; the test is skipped, with the reason, where that cannot be."""
    for program in ("apt-get", "dpkg"):
        if not shutil.which(program):
            pytest.skip(f"needs {', '.join(packages)} as Debian names them, and has no {program}")
    absent = missing(packages)
    if absent and os.geteuid():
        pytest.skip(f"as root: apt-get install {' '.join(absent)}")
    if absent:
        call("apt-get", "update", check=False)  # a source of someone else's may be out of order
        call("apt-get", "install", "--yes", "--no-install-recommends", *absent)


def missing(packages: tuple[str, ...]) -> list[str]:
    """Those that dpkg does not know as installed."""
    status = ("dpkg-query", "-W", "-f=${db:Status-Status}")
    return [name for name in packages if asked(*status, name) != "installed"]


def asked(*words: str) -> str:
    """What a program prints; nothing where it is missing or fails."""
    if not shutil.which(words[0]):
        return ""
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    return done.stdout if done.returncode == 0 else ""


def call(*words: str, folder: Path | None = None, check: bool = True) -> None:
    """Run it; the tests are skipped where it fails, as without a network."""
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"}
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=600)
    if check and done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith(("E:", "dpkg"))]
        pytest.skip(f"{words[0]} failed with {done.returncode}: {' '.join(said[:1])}")
