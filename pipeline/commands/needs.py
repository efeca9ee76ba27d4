"""What the servers of a file take of memory, and whether what is to be loaded together fits."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from pipeline.bins.binaries import Binaries
from pipeline.bins.hardware import nvidia
from pipeline.core import capacity
from pipeline.core.errors import UsageError
from pipeline.core.paths import Home
from pipeline.core.text import size
from pipeline.models import formula, gguf, memory
from pipeline.models.memory import MIB, Memory
from pipeline.serve import placing
from pipeline.serve.config import vllm
from pipeline.serve.placing import Bytes
from pipeline.serve.server import BOOT, LLAMA_CPP, VLLM, Server
from pipeline.serve.supervisor.memory import devices

from . import beside, estimate, serve
from .servers import Servers

PROCESS = 64 * MIB  # of a llama-server beside its model: its code, threads, requests
VLLM_RAM = 2048 * MIB  # of a vLLM beside what it takes on the cards
VLLM_SHARE = 0.9  # of a card's memory, vLLM's own default
UNITED = re.compile(r"Host|CPU|MTL|Metal|BLAS")  # devices whose memory is main memory


def budget(file: Servers) -> dict[str, int]:
    """What the servers of a file may take together, in bytes by device. Raises UsageError."""
    machine = {device.name: device.total for device in devices()}
    try:
        return placing.budget(file.configuration.master.memory, machine)
    except UsageError as error:
        message = f"{file.configuration.label}: master.{error.message}"
        raise UsageError(message, error.hint) from None


def of_servers(file: Servers, servers: Iterable[Server]) -> dict[str, Bytes]:
    """The bytes that each server takes of each device, by name. Raises PipelineError."""
    return {server.name: of_server(file, server) for server in servers if is_model(server)}


def is_model(server: Server) -> bool:
    """Whether it serves a model: the gateway does not."""
    return server.engine in (LLAMA_CPP, VLLM)


def of_server(file: Servers, server: Server) -> Bytes:
    """The bytes that a server takes of each device. Raises PipelineError."""
    if server.engine == VLLM:
        return _of_vllm(server)
    if path := serve.model_file(server):
        needed = _of_file(file.home, server, path)
    else:
        needed = _of_model(file, server)
    by_device = {"ram": PROCESS}
    for name, count in _by_device(needed, server) if needed else ():
        by_device[name] = by_device.get(name, 0) + count
    return by_device


def _of_file(home: Home, server: Server, path: Path) -> Memory | None:
    """Of a model that is here, with its projector, its adapters and its draft."""
    programs = Binaries(folder=Path(server.executable).parent, commit="", home=home)
    header = gguf.read_cached(path, home.run)
    ctx_size = _context(server, header.context_length)

    def measured(file: Path) -> Memory | None:
        ubatch = int(server.argument("--ubatch-size") or formula.UBATCH)
        pools = server.kind != serve.CHAT
        return estimate.measure(programs, file, server.cmd, ctx_size, ubatch=ubatch, pools=pools)

    if (needed := measured(path)) is None:
        return None
    more = [Path(server.folder, server.argument("--mmproj")), *(x for x, _ in server.adapters)]
    needed = memory.grown(needed, sum(file.stat().st_size for file in more if file.is_file()))
    draft = Path(server.folder, beside.draft_file(server))
    drafting = measured(draft) if draft.is_file() else None
    return memory.added(needed, drafting) if drafting else needed


def _of_model(file: Servers, server: Server) -> Memory | None:
    """Of a model that is not here yet, by its header."""
    for spec in file.configuration.enabled:
        if spec.name == server.name and spec.model:
            model = file.model_of(spec).served_by(spec)
            ahead = estimate.outlook(model, model.require_chain())
            return serve.measured(model, ahead)(_context(server, ahead.trained))
    return None


def _context(server: Server, trained: int) -> int:
    """The context that it is served with, in tokens."""
    context = server.argument("--ctx-size")
    return int(context) if context.isdecimal() and int(context) else trained


def _by_device(needed: Memory, server: Server) -> Iterable[tuple[str, int]]:
    """The devices as the file names them, and the bytes on each."""
    has_card = server.gpu_ids != "none" and server.argument("--gpu-layers") != "0"
    shared = nvidia.shared() if has_card else set()
    for row in needed.devices:
        number = re.search(r"(\d+)$", row.name)
        if row.name == memory.UNKNOWN:
            device = _card(server, 0) if has_card and nvidia.find() else "ram"
        elif number and not UNITED.match(row.name):
            device = _card(server, int(number[1]))
        else:
            device = "ram"
        device = "ram" if device in shared else device
        yield device, row.weights + row.context + row.compute


def _card(server: Server, index: int) -> str:
    """The card that a server sees at this place, by its slot."""
    ids = (server.gpu_ids or "").split(",")
    shown = ids[index] if index < len(ids) else ""
    return f"gpu{shown if shown.isdecimal() else index}"


def _of_vllm(server: Server) -> Bytes:
    """A vLLM takes a share of each of its cards, whatever its model."""
    options = vllm.of_words(server.cmd)
    share = float(options.text("gpu-memory-utilization") or VLLM_SHARE)
    cards, taken = nvidia.listed(), {"ram": VLLM_RAM}
    for index in range(vllm.gpus(options)):
        name = _card(server, index)
        if (slot := int(name.removeprefix("gpu"))) < len(cards):
            own = cards[slot].total
            device = name if own else "ram"
            taken[device] = taken.get(device, 0) + int((own or capacity.total()) * share)
    return taken


def require_fit(
    file: Servers, servers: Sequence[Server], needs: Mapping[str, Bytes], budget: Bytes
) -> list[str]:
    """Warnings about servers that can never be loaded, beside those that are pinned. Raises
    UsageError where those that `up` loads do not fit together."""
    models = [server for server in servers if is_model(server)]
    booted = [server for server in models if server.start == BOOT]
    for device, allowed in budget.items():
        total = sum(placing.amount(needs[server.name], device) for server in booted)
        if total > allowed:
            figures = ", ".join(
                f"{server.name} {size(placing.amount(needs[server.name], device))}"
                for server in booted
            )
            raise UsageError(
                f"{file.configuration.label}: {', '.join(x.name for x in booted)} are loaded "
                f"together and take {size(total)} of {device} ({figures}); models may take "
                f"{size(allowed)}",
                'let some be loaded on demand: [instance.NAME.control] start = "demand"',
            )
    pinned = {server.name: needs[server.name] for server in models if server.pinned}
    lines = []
    for server in models:
        others = [placing.Resident(n, x, 0, is_pinned=True) for n, x in pinned.items()]
        placed = placing.place(server.name, needs[server.name], others, budget)
        if placed.problem:
            lines.append(f"{server.name} can never be loaded: {placed.problem}")
    return lines
