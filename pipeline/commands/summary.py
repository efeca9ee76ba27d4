"""The summary of a server that is ready."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from pipeline.bins import binaries
from pipeline.core import log
from pipeline.core.environment import servers
from pipeline.core.text import size
from pipeline.models import gguf
from pipeline.models.gguf import Header
from pipeline.serve import sandbox
from pipeline.serve.guard import port
from pipeline.serve.server import LLAMA_CPP, Server, service

from . import beside
from .programs import Programs


def summary(
    programs: Programs,
    server: Server,
    output: str,
    names_context: bool,
    not_started: Sequence[str] = (),
) -> dict[str, object]:
    """Its facts by name, in the order in which they are shown. `output` is what it has printed,
    `names_context` whether the user named the context."""
    rows: dict[str, object] = {**service(os.environ), "url": server.url}
    if server.api_key_file:
        rows["key"] = server.api_key_file
    if server.engine == LLAMA_CPP:
        rows |= _model(programs, server, output, names_context)
    else:
        rows |= {"model": server.model_name, "engine": server.engine}
    rows["log"] = server.log_file
    if not_started:
        rows["not started"] = "; ".join(not_started)
    return rows


def _model(
    programs: Programs, server: Server, output: str, names_context: bool
) -> dict[str, object]:
    name, ctx_size = server.argument("--model"), server.argument("--ctx-size")
    path = Path(server.folder, name)
    rows: dict[str, object] = {"model": server.model_name}
    header = None
    if name and path.is_file():
        header = gguf.read_cached(path, programs.home.run)
        rows |= {"file": str(path), "quant": header.quant or "unknown"}
        rows["size"] = size(gguf.file_bytes(path))
    if mmproj := server.argument("--mmproj"):
        rows["projector"] = Path(mmproj).name
    if adapters := server.adapters:
        rows["adapters"] = ", ".join(
            path.name if scale == "1" else f"{path.name} (scale {scale})"
            for path, scale in adapters
        )
    if draft := drafting(server, output, header):
        rows["draft"] = draft
    ours = is_ours(programs, server)
    packed = "" if ours else binaries.packed(Path(server.executable).parent, "backend")
    devices = seen_devices(programs, server) if ours or packed else []
    threads = re.search(r"n_threads = (\d+)", output)
    return rows | {
        "backend": backend(programs) if ours else packed or f"that of {server.executable}",
        "device": server.argument("--device")
        or ", ".join(devices)
        or ("CPU" if ours or packed else "llama-server's choice"),
        "sandbox": sandbox.shown(server),
        "guard": port.shown(server),
        "threads": tuned_threads(server)
        or server.argument("--threads")
        or (int(threads[1]) if threads else "llama-server's default"),
        "context": context(
            int(ctx_size), header.context_length if header else 0, is_named=names_context
        )
        if ctx_size.isdecimal()
        else "llama-server's choice",
        **others_tuned(server),
    }


def others_tuned(server: Server) -> dict[str, str]:
    """The other options that `tune` found, in one row."""
    others = [name for name in server.tuned if name != "threads"]
    rows = ", ".join(f"{name} {server.argument(f'--{name}')}" for name in others)
    return {"tuned": rows} if rows else {}


def tuned_threads(server: Server) -> str:
    """The number of threads that `tune` found; empty where it comes from elsewhere."""
    return f"{server.argument('--threads')} (tuned)" if "threads" in server.tuned else ""


def drafting(server: Server, output: str, header: Header | None) -> str:
    """How a server drafts; empty where it does not. `output`: its log; `header`: of its model."""
    kind, draft = server.argument("--spec-type"), beside.draft_file(server)
    if kind and "failed to initialize speculative" in output:
        return "not used: llama-server could not, as its log says"
    if kind in ("", "none"):
        has_head = header is not None and header.heads
        return "none; the model has a head for it: draft=mtp uses it" if has_head else ""
    return f"{Path(draft).name} ({kind})" if draft else f"{kind}, without a model"


def is_ours(programs: Programs, server: Server) -> bool:
    """Whether it runs a program that was made or installed here."""
    return not programs.are_external and programs.binaries.folder in Path(server.executable).parents


def seen_devices(programs: Programs, server: Server) -> list[str]:
    """The devices that our llama-server sees, as it names them; one for the CPU sees none."""
    if programs.backend == "cpu":
        return []
    devices = binaries.devices(Path(server.executable), {**servers(os.environ), **server.env})
    if programs.backend and not devices:
        log.info("warning: llama-server sees no device of its backend; the CPU is used")
    return devices


def backend(programs: Programs) -> str:
    """The backend, and why it was chosen."""
    if not programs.are_chosen:
        return "that of the installed package"
    selected = programs.selection
    return f"{selected.backend} ({selected.why})" if selected.why else selected.backend


def context(ctx_size: int, trained: int, *, is_named: bool) -> str:
    """The context, and where it comes from: `is_named` where the user named it."""
    if is_named:
        return f"{ctx_size} tokens, as asked for ({trained or 'unknown'} trained)"
    if not trained:
        return f"{ctx_size} tokens; the trained context is not known"
    if ctx_size == trained:
        return f"{ctx_size} tokens, as trained"
    return f"{ctx_size} tokens of {trained} trained: as many as fit into the free memory"
