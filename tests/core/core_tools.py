"""Real surroundings for the tests of core/: Python children, an old kernel."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from conftest import REPOSITORY

# Put before a child's script: the kernel answers renameat2 as one that never heard of it does.
NO_RENAMEAT2 = """
import ctypes, platform, struct
number = {"x86_64": 316, "aarch64": 276}[platform.machine()]
# load the number; is it this one? then SECCOMP_RET_ERRNO | ENOSYS (0x50026), else allow
steps = [(0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x50026), (0x06, 0, 0, 0x7FFF0000)]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
rules = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(steps), ctypes.addressof(code)))
assert ctypes.CDLL(None).prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
assert ctypes.CDLL(None).prctl(22, 2, rules) == 0  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
"""


@contextmanager
def child(script: str, *words: object, **more: Any) -> Iterator[subprocess.Popen[str]]:
    """A Python process that runs `script`; killed at the end of the block if it still runs."""
    with subprocess.Popen(
        [sys.executable, "-c", script, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONUTF8": "1"},
        **more,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def line(process: subprocess.Popen[str]) -> str:
    """The next line that the child prints."""
    assert process.stdout is not None
    text = process.stdout.readline()
    assert text or process.stderr is None, process.stderr.read()
    return text.strip()


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for a good end; what the child said on stderr."""
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return err


def names(folder: Path) -> list[str]:
    """What is in `folder`, locks left out."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")
