"""macOS: a profile for sandbox-exec, which is part of the system."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path

from . import policy
from .policy import Sandbox

PROGRAM = "sandbox-exec"
SYSTEM = ("/System", "/Library/Apple", "/private/var/db/timezone", "/opt/homebrew")


@cache
def is_here() -> bool:
    return sys.platform == "darwin" and shutil.which(PROGRAM) is not None


def prefix(sandbox: Sandbox, env: Mapping[str, str]) -> list[str]:
    """The words in front of a command."""
    return [PROGRAM, "-p", "\n".join(_profile(sandbox, env))]


def _profile(sandbox: Sandbox, env: Mapping[str, str]) -> Iterator[str]:
    yield "(version 1)"
    yield "(deny default)"
    yield '(import "system.sb")'
    yield "(allow sysctl-read)"
    run = [*policy.executable(sandbox, env), *map(Path, SYSTEM)]
    yield f"(allow process-exec file-map-executable{_paths(run)})"
    yield f"(allow file-read*{_paths([*run, *policy.readable(sandbox), *sandbox.write])})"
    yield f"(allow file-write*{_paths([*sandbox.write, Path('/dev/null')])})"
    yield "(allow file-read-metadata)"  # of the folders above a file
    if sandbox.gpus:
        yield "(allow iokit-open mach-lookup)"
    if sandbox.ports is None:
        yield "(allow network*)"
    if sandbox.sockets:
        yield f"(allow network-bind network-inbound{_paths(sandbox.sockets)})"
        yield f"(allow file-write*{_paths(sandbox.sockets)})"
    for port in sandbox.ports or ():
        yield f'(allow network-bind network-inbound (local tcp "*:{port}"))'


def _paths(paths: Iterable[Path]) -> str:
    """Filters for a rule, with all links resolved as the system demands."""
    names = dict.fromkeys(str(path.resolve()) for path in paths if path.exists())
    return "".join(f" (subpath {_quoted(name)})" for name in names)


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
