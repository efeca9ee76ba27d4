"""The npm packages of a lock file in the tests, installed once for all checkouts."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import REPOSITORY
from filelock import FileLock

from pipeline.core.paths import Home, cache

HERE = Path(__file__).parent / "clients"
FILES = ("package.json", "package-lock.json", ".npmrc")  # the last may be missing
WORDS = ("ci", "--ignore-scripts", "--no-audit", "--no-fund", "--prefer-offline")


def installed(here: Path = HERE) -> Path:
    """The folder that holds `node_modules` for the lock file `here`. The test is skipped where npm
    is not here."""
    npm = shutil.which("npm")
    if not (npm and shutil.which("node")):
        pytest.skip("needs Node.js with npm")
    files = [here / name for name in FILES if (here / name).exists()]
    content = b"".join(file.read_bytes() for file in files)
    folder = cache(Home(REPOSITORY)) / here.name / hashlib.sha256(content).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / "done").exists():
            for file in files:
                shutil.copy(file, folder)
            done = subprocess.run([npm, *WORDS], cwd=folder, capture_output=True, text=True)
            if done.returncode:
                why = done.stderr.strip()[-300:]
                pytest.skip(f"npm could not install the packages of {here.name}: {why}")
            (folder / "done").touch()
    return folder


def claude_code() -> Path:
    """The folder of a program named `claude`: the package's own, of this platform.

    Its install script, which is not run, would put the same file there.
    """
    packages = installed() / "node_modules" / "@anthropic-ai"
    programs = [one for one in packages.glob("claude-code-*/claude*") if one.is_file()]
    if not programs:
        pytest.skip("Claude Code has no package for this platform")
    return programs[0].parent


def codex() -> Path:
    """The program of Codex: the package's own, of this platform, without the script around it."""
    packages = installed() / "node_modules" / "@openai"
    found = [one for one in packages.glob("codex-*/vendor/*/bin/codex*") if one.is_file()]
    if not found:
        pytest.skip("Codex has no package for this platform")
    return found[0]
