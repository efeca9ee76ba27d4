"""Small disks, full ones, and such as cannot be written or run from."""

from __future__ import annotations

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
