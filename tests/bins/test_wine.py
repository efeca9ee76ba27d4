"""The real Windows programs, under wine where there is one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import debian
import pytest

from pipeline.bins.binaries import program_file
from pipeline.bins.release.prebuilt import Prebuilt
from pipeline.core.paths import Home
from pipeline.core.pins import pins

DEBIANS = Path("/usr/lib/wine")  # where it has the programs themselves


def program(*names: str) -> str | None:
    path = f"{DEBIANS}{os.pathsep}{os.environ.get('PATH', '')}"
    return next((found for name in names if (found := shutil.which(name, path=path))), None)


def wine() -> str | None:
    return program("wine64", "wine")


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="Windows needs no wine"),
]


@pytest.fixture
def env(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A wine of the test's own, and nothing of it left running."""
    if not wine():
        debian.require("wine64")
    env = {**os.environ, "WINEPREFIX": str(tmp_path / "prefix"), "WINEDEBUG": "-all"}
    env.pop("DISPLAY", None)
    subprocess.run(
        [wine(), "wineboot", "-u"], env=env, capture_output=True, timeout=300, check=True
    )
    yield env
    server = program("wineserver64", "wineserver")
    if server:
        subprocess.run([server, "-k"], env=env, capture_output=True, timeout=60, check=False)


def test_the_pinned_programs_run(tmp_path: Path, env: dict[str, str]) -> None:
    home, release = Home(tmp_path / "mein häus"), pins().prebuilt.release
    plan = Prebuilt(platform="windows-x64", backend="cpu", release=release, home=home)
    plan.make()
    # llama-server --version does not end under wine.
    for name in ("llama-quantize", "llama-gguf-split"):
        file = plan.target / program_file(name, windows=True)
        done = subprocess.run(
            [wine(), file, "--help"], env=env, capture_output=True, timeout=120, check=False
        )
        assert b"usage: " in (done.stdout + done.stderr).lower()
        assert file.name.encode() in done.stdout + done.stderr
