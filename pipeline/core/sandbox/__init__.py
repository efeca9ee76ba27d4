"""A program that reads untrusted files may access those, its output, and nothing else.

    policy = Sandbox(programs=[python], read=[folder], write=[made], memory=4 << 30)
    run(argv, log=log, sandbox=policy)

Linux: Landlock limits files and TCP ports, seccomp everything else (sockets, new processes, other
processes); where the kernel has no Landlock, bubblewrap if it is installed. macOS: sandbox-exec.
Windows: a job object, which limits memory and processes but no files. `strength` names
what this system has. The limits on memory and file size are the system's own (`limits`).
"""

from __future__ import annotations

from .available import Strength, strength
from .enter import Wrapper, entry
from .policy import Sandbox

__all__ = ["Sandbox", "Strength", "Wrapper", "entry", "strength"]
