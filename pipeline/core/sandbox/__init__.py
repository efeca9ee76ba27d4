"""A program that reads untrusted files may access those, its output, and nothing else.

    policy = Sandbox(programs=[python], read=[folder], write=[made], memory=4 << 30)
    run(argv, log=log, sandbox=policy)

Linux: Landlock limits files and TCP ports, seccomp everything else (sockets, new processes, other
processes); where the kernel has no Landlock, bubblewrap if it is installed. macOS: sandbox-exec.
Windows: a job object, which limits memory and processes but no files. `strength` names
what this system has. The limits on memory and file size are the system's own (`limits`).
"""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache

from msgspec import Struct

from pipeline.core.errors import UsageError

from .policy import Sandbox as Sandbox

SWITCH = "LLAMA_PIPELINE_SANDBOX"
OFF, ON = ("off", "0", "false", "no"), ("", "on", "1", "true", "yes", "auto")


class Strength(Struct, frozen=True):
    """`name` is its name in receipts and `doctor`. `files`, `network` and `ports` say whether it
    limits what is read and written, all connections, and the ports to listen on."""

    name: str
    files: bool = False
    network: bool = False
    ports: bool = False

    @property
    def lacks(self) -> str:
        """What it cannot limit, for a warning; empty where it limits everything."""
        rows = (("files", self.files), ("the network", self.network))
        return " or ".join(what for what, is_limited in rows if not is_limited)


def is_off() -> bool:
    """Whether the user turned it off, of which warnings remind."""
    return _switch() in OFF


def require_switch() -> None:
    """Raise UsageError where the variable has a value that means nothing, or more than it can."""
    if _switch() not in (*OFF, *ON):
        raise UsageError(
            f"{SWITCH}={os.environ[SWITCH]}: must be off, or unset",
            "sandbox=strict, or control.sandbox in a file, requires it of llama-server",
        )


def _switch() -> str:
    return os.environ.get(SWITCH, "").strip().lower()


def strength() -> Strength:
    """The strongest limit that this system has."""
    return Strength("off") if is_off() else _strongest()


@cache
def _strongest() -> Strength:
    if sys.platform == "win32":
        return Strength("job object")
    from . import bubblewrap, landlock, seatbelt, seccomp

    if seatbelt.is_here():
        return Strength("sandbox-exec", files=True, network=True, ports=True)
    calls = seccomp.is_here()
    if abi := landlock.abi():
        ports = calls and abi >= landlock.PORTS_SINCE
        name = f"Landlock {abi}{', seccomp' * calls}"
        return Strength(name, files=True, network=calls, ports=ports)
    if bubblewrap.program():
        return Strength("bubblewrap" + ", seccomp" * calls, files=True, network=True)
    return Strength("seccomp" if calls else "limits", network=calls)


class Wrapper(Struct, frozen=True, kw_only=True):
    """`prefix` are words in front of the command, `steps` are called between fork and exec, and
    `files` are descriptors that the program inherits."""

    prefix: Sequence[str] = ()
    steps: Sequence[Callable[[], None]] = ()
    files: Sequence[int] = ()


@contextmanager
def entry(sandbox: Sandbox, env: Mapping[str, str]) -> Iterator[Wrapper]:
    """How to start a program with `env` in `sandbox`; the block starts it. Raises OSError."""
    # On Windows `process.start` puts it into a job.
    if is_off() or sys.platform == "win32":
        yield Wrapper()
        return
    from . import bubblewrap, landlock, seatbelt, seccomp

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
        yield Wrapper(prefix=prefix, steps=steps, files=files)


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
    from . import seccomp

    reader, writer = os.pipe()
    with os.fdopen(writer, "wb") as pipe:
        steps = seccomp.instructions(sandbox, platform.machine())
        pipe.write(seccomp.compiled(steps, own_pid=2))
    return reader
