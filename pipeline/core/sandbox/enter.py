"""How to start a program in the sandbox."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

from msgspec import Struct

from . import bubblewrap, landlock, seatbelt, seccomp
from .available import is_off
from .policy import Sandbox


class Wrapper(Struct, frozen=True, kw_only=True):
    """`prefix` are words in front of the command, `child` is called between fork and exec, and
    `files` are descriptors that the program inherits."""

    prefix: Sequence[str] = ()
    child: Callable[[], None] | None = None
    files: Sequence[int] = ()


@contextmanager
def entry(sandbox: Sandbox | None, env: Mapping[str, str]) -> Iterator[Wrapper]:
    """How to start a program with `env` in `sandbox`; the block starts it. Raises OSError."""
    # On Windows `process.start` puts it into a job.
    if sandbox is None or is_off() or sys.platform == "win32":
        yield Wrapper()
        return
    steps: list[Callable[[], None]] = [limits(sandbox)]
    prefix: list[str] = []
    files: list[int] = []
    with ExitStack() as open_files:
        if seatbelt.is_here():
            prefix = seatbelt.prefix(sandbox, env)
        elif landlock.abi():
            rules, enter = landlock.prepare(sandbox, env)
            open_files.callback(os.close, rules)
            steps += [seccomp.drop_rights(), enter]
            steps += [seccomp.prepare(sandbox)] if seccomp.is_here() else []
        elif bubblewrap.program():  # it drops rights and sets the filter itself
            if seccomp.is_here():
                files.append(_filter_file(sandbox))
                open_files.callback(os.close, files[0])
            prefix = bubblewrap.prefix(sandbox, env, files[0] if files else None)
        elif seccomp.is_here():
            steps += [seccomp.drop_rights(), seccomp.prepare(sandbox)]

        def child() -> None:
            for step in steps:
                step()

        yield Wrapper(prefix=prefix, child=child, files=files)


def limits(sandbox: Sandbox) -> Callable[[], None]:
    """What the child calls to limit its memory and file sizes, and to write no core dump."""
    import resource  # not on Windows

    bounds = {
        resource.RLIMIT_CORE: 0,
        # Address space would be the wrong measure: a model's whole file is mapped.
        resource.RLIMIT_DATA: sandbox.memory,
        resource.RLIMIT_FSIZE: sandbox.file_bytes,
    }

    def enter() -> None:
        for kind, most in bounds.items():
            if most is not None:
                hard = resource.getrlimit(kind)[1]
                bound = most if hard == resource.RLIM_INFINITY else min(most, hard)
                with contextlib.suppress(ValueError):  # macOS has none for data
                    resource.setrlimit(kind, (bound, bound))

    return enter


def _filter_file(sandbox: Sandbox) -> int:
    """A pipe with the filter in it. In its own namespace the program has the process number 2."""
    reader, writer = os.pipe()
    with os.fdopen(writer, "wb") as pipe:
        steps = seccomp.instructions(sandbox, platform.machine())
        pipe.write(seccomp.compiled(steps, own_pid=2))
    return reader
