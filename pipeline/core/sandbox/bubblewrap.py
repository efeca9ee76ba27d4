"""bubblewrap, for kernels without Landlock: a view of the file system with only what is allowed.

It creates namespaces, which most containers forbid; `program` tries it once.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from functools import cache

from . import policy
from .policy import Sandbox

SECONDS = 10


@cache
def program() -> str:
    """The path of bubblewrap where it is installed and may create namespaces; else empty."""
    path = shutil.which("bwrap") or ""
    command = [path, "--unshare-all", "--ro-bind", "/", "/", path, "--version"]
    try:
        result = subprocess.run(command, capture_output=True, timeout=SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return path if result.returncode == 0 else ""


def prefix(sandbox: Sandbox, env: Mapping[str, str], filter_file: int | None) -> list[str]:
    """The words in front of a command. `filter_file` is a descriptor with a seccomp filter."""
    words = [program(), "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    if sandbox.ports is None:
        words.append("--share-net")
    if filter_file is not None:
        words += ["--seccomp", str(filter_file)]
    words += ["--proc", "/proc"]
    for path in (*policy.executable(sandbox, env), *policy.readable(sandbox)):
        if not path.is_relative_to("/proc"):
            bind = "--dev-bind-try" if path.is_relative_to("/dev") else "--ro-bind-try"
            words += [bind, str(path), str(path)]
    for path in sandbox.write:
        words += ["--bind-try", str(path), str(path)]
    # Not all of /dev: a mapping of /dev/zero is shared memory, which no limit counts.
    for path in policy.devices(sandbox):
        words += ["--dev-bind-try", str(path), str(path)]
    # Files in / are in memory that no limit counts. In /proc/sys root may, without any capability,
    # set the program that the kernel starts after a crash.
    return [*words, "--remount-ro", "/", "--remount-ro", "/proc"]
