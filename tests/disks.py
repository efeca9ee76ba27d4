"""Small disks, full ones, and such as cannot be written or run from."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def disk(folder: Path, options: str) -> Iterator[Callable[[str], None]]:
    """A small disk mounted on `folder`; yields a function that mounts it with other options."""
    if sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("only root on Linux can mount a small disk")
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        yield lambda other: subprocess.run(["mount", "-o", f"remount,{other}", folder], check=True)
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


# What flock does on some disks: it fails with this number, or does nothing.
FLOCK = """
#include <errno.h>
int flock(int file, int what) { errno = FAILS; return FAILS ? -1 : 0; }
"""


def flock_that(fails: int, folder: Path) -> Path:
    """A library for LD_PRELOAD with which flock fails with this number; with 0 it does nothing."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if sys.platform != "linux" or not compiler:
        pytest.skip("needs a C compiler and LD_PRELOAD")
    source = folder / "flock.c"
    source.write_text(FLOCK)
    library = source.with_suffix(".so")
    words = [compiler, f"-DFAILS={fails}", "-shared", "-fPIC", "-o", library, source]
    subprocess.run(words, check=True)
    return library


@pytest.fixture(params=[errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, 0])
def locks_that_do_not_work(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For the programs that the test starts."""
    library = flock_that(request.param, tmp_path_factory.mktemp("flock"))
    monkeypatch.setenv("LD_PRELOAD", str(library))
