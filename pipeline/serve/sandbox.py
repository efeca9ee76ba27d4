"""llama-server in the sandbox: no network but its port, no writes but to what its options name.

strict   in the sandbox, or not at all
auto     where that costs nothing: programs for the CPU on a system that can limit everything,
         and no option that needs more
off      as its user
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from pipeline.bins import binaries
from pipeline.core.errors import UsageError
from pipeline.core.sandbox import Sandbox, strength
from pipeline.models import gguf

from .server import OFF, STRICT, Server

# Options for which the server starts programs, or connects to others, by request or by itself.
NEED_MORE = re.compile(r"--(tools|mcp-\S+|rpc|agent|models-\S+|ui-mcp-proxy|webui-mcp-proxy|tags)")
PROMPTS = "--log-prompts-dir"  # llama-server makes it, and goes on without a word where it cannot
WRITTEN = ("--slot-save-path", "--log-file", "--logits-output-dir", PROMPTS)
FIRST_PART = re.compile(r".*-00001-of-\d{5}\.gguf", re.ASCII)


def require(server: Server, where: str) -> None:
    """Raise UsageError where a server has to be in the sandbox and cannot be."""
    if server.sandbox == STRICT and (why := hindrance(server)):
        raise UsageError(f"{where}=strict: {why}", f"{where}=auto takes the sandbox where it can")


def hindrance(server: Server) -> str:
    """Why a server cannot be in the sandbox; empty where it can."""
    if not strength().ports:
        return f"this system cannot limit a server to its port ({strength().name})"
    for word in server.command[1:]:
        if NEED_MORE.fullmatch(word.partition("=")[0].replace("_", "-")):
            return f"{word} needs more than files and a port"
    if server.downloads:
        return "it may download, or fetch the images that a request names"
    if server.host.endswith(".sock"):
        return f"{server.host} is not a TCP port"
    return ""


def is_in(server: Server) -> bool:
    """Whether the server will be in the sandbox."""
    if server.sandbox == OFF or hindrance(server):
        return False
    return server.sandbox == STRICT or _is_for_cpu(server)


def policy(server: Server, sockets: Path | None = None) -> Sandbox | None:
    """What the server may touch; None: all that its user may. Call it once its files are there.
    `sockets` is the folder of its socket where it has no port of its own."""
    if not is_in(server):
        return None
    return Sandbox(
        programs=[Path(server.command[0])],
        read=list(_readable(server)),
        write=list(_written(server)),
        ports=[] if sockets else [server.port],
        sockets=[sockets] if sockets else [],
        gpus=not _is_for_cpu(server),
    )


def shown(server: Server) -> str:
    """The sandbox in words, for a plan and a summary."""
    if is_in(server):
        network = "no network" if server.guard else "no network but its port"
        return f"{strength().name}: {network}, no writes but its log"
    why = "sandbox=off" if server.sandbox == OFF else hindrance(server)
    return "none: " + (why or "a graphics card's driver needs more; sandbox=strict tries it")


def _is_for_cpu(server: Server) -> bool:
    """Whether its programs were built or packed for the CPU alone: a driver may need anything."""
    folder = Path(server.command[0]).resolve().parent
    return folder.name.endswith("-cpu") or binaries.packed(folder, "backend") == "cpu"


def _readable(server: Server) -> Iterator[Path]:
    """Every file and folder that an option names, with the other parts of a split model."""
    for path in server.named_paths:
        yield path
        if FIRST_PART.fullmatch(path.name):
            yield from gguf.shards(path)


def _written(server: Server) -> Iterator[Path]:
    for option, value in pairwise(server.command):
        path = Path(server.folder, value)
        if option == "--log-file":
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()  # what is not there cannot be allowed
        if option == PROMPTS:
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
        if option in WRITTEN:
            yield path
