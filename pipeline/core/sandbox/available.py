"""How far this system can limit a program."""

from __future__ import annotations

import os
import sys
from functools import cache

from msgspec import Struct

from . import bubblewrap, landlock, seatbelt, seccomp

SWITCH = "LLAMA_PIPELINE_SANDBOX"


class Strength(Struct, frozen=True):
    """`name` is its name in receipts and `doctor`. `files`, `network` and `ports` say whether it
    limits what is read and written, all connections, and the ports to listen on."""

    name: str
    files: bool
    network: bool
    ports: bool

    @property
    def lacks(self) -> str:
        """What it cannot limit, for a warning; empty where it limits everything."""
        rows = (("files", self.files), ("the network", self.network))
        return " or ".join(what for what, is_limited in rows if not is_limited)


def is_off() -> bool:
    """Whether the user turned it off, of which warnings remind."""
    return os.environ.get(SWITCH, "").strip().lower() in ("off", "0")


def strength() -> Strength:
    """The strongest limit that this system has."""
    return Strength("off", files=False, network=False, ports=False) if is_off() else _strongest()


@cache
def _strongest() -> Strength:
    if sys.platform == "win32":
        return Strength("job object", files=False, network=False, ports=False)
    if seatbelt.is_here():
        return Strength("sandbox-exec", files=True, network=True, ports=True)
    calls = seccomp.is_here()
    if abi := landlock.abi():
        ports = calls and abi >= landlock.PORTS_SINCE
        name = f"Landlock {abi}{', seccomp' * calls}"
        return Strength(name, files=True, network=calls, ports=ports)
    if bubblewrap.program():
        return Strength("bubblewrap" + ", seccomp" * calls, files=True, network=True, ports=False)
    return Strength("seccomp" if calls else "limits", files=False, network=calls, ports=False)
