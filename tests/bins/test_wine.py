"""The real Windows programs, under wine where there is one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import debian
import kept
import pytest

from pipeline.bins.binaries import program_file
from pipeline.bins.release.prebuilt import Prebuilt
from pipeline.core.paths import Home
from pipeline.core.pins import pins
from pipeline.core.store.locks import only_one
from pipeline.core.store.publish import part, publish_folder, recover_folder, remove

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


def call(prefix: Path, name: str | None, *words: str | Path) -> subprocess.CompletedProcess[bytes]:
    """Run it with this folder as wine's drives and registry."""
    env = {**os.environ, "WINEPREFIX": str(prefix), "WINEDEBUG": "-all"}
    env.pop("DISPLAY", None)
    return subprocess.run(
        [str(name), *words], env=env, capture_output=True, timeout=300, check=False
    )


def server() -> str:
    return program("wineserver64", "wineserver") or "wineserver"


@pytest.fixture
def prefix() -> Iterator[Path]:
    """Wine's drives and registry, which take half a minute to make and are kept for later runs;
    nothing of it is left running."""
    if not wine():
        debian.require("wine64")
    version = call(Path(), wine(), "--version").stdout.decode()
    folder = kept.FOLDER / "wine" / kept.key_of([version, os.getuid()])
    with only_one(folder):
        recover_folder(folder)
        if not folder.is_dir():
            made = part(folder)
            remove(made)
            made.mkdir(parents=True)
            assert call(made, wine(), "wineboot", "-u").returncode == 0
            call(made, server(), "-w")  # it writes the registry when all has ended
            publish_folder(made, folder)
        os.utime(folder)
        kept.drop_old(folder.parent, 1)
        try:
            yield folder
        finally:
            call(folder, server(), "-k")


def test_the_pinned_programs_run(tmp_path: Path, prefix: Path) -> None:
    home, release = Home(tmp_path / "mein häus"), pins().prebuilt.release
    plan = Prebuilt(platform="windows-x64", backend="cpu", release=release, home=home)
    plan.make()
    # llama-server --version does not end under wine.
    for name in ("llama-quantize", "llama-gguf-split"):
        file = plan.target / program_file(name, windows=True)
        done = call(prefix, wine(), file, "--help")
        assert b"usage: " in (done.stdout + done.stderr).lower()
        assert file.name.encode() in done.stdout + done.stderr
