"""`serve`, and what it decides before it starts anything: the launch, and the memory for it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.bins import smoke_test
from pipeline.core import capacity, log
from pipeline.core.paths import Home, user_folder
from pipeline.core.store import stat_cache
from pipeline.core.text import size
from pipeline.models import chat_template, gguf, memory
from pipeline.models import projector as projectors
from pipeline.models.chain import Chain
from pipeline.models.gguf import Header
from pipeline.models.memory import Fit, Memory
from pipeline.serve import flags, health, launch, sandbox, supervise
from pipeline.serve.flags import Flag
from pipeline.serve.launch import Launch
from pipeline.serve.service import service

from . import estimate
from .estimate import MemoryEstimate
from .model import Steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A launch and what is known about it."""

    launch: Launch
    name: str
    header: Header
    bytes: int
    fit: Fit


def known_flags(steps: Steps) -> dict[str, Flag]:
    """The options of the llama-server that will run. Raises PipelineError."""
    programs = steps.binaries
    return flags.read(
        programs.program("llama-server"),
        programs.sha256("llama-server"),
        steps.home.run / "flags",
    )


def check_start(steps: Steps) -> None:
    """Raise PipelineError where the port is taken, or the backend's device is not here: then the
    CPU would be used."""
    if steps.programs.are_chosen:
        steps.programs.selection.require_device()
    health.require_free(steps.request.settings.host, steps.request.settings.port)


def check_flags(steps: Steps) -> None:
    """Raise UsageError where llama-server has no such option."""
    flags.arguments(steps.request.settings.server, known_flags(steps), "server.")


def fit_context(steps: Steps, ahead: MemoryEstimate) -> Fit:
    """The context to serve with, and the memory that it takes, the projector's included."""
    beside = projector_bytes(steps)

    def measured(ctx_size: int) -> Memory | None:
        found = ahead.at(ctx_size)
        return found and replace(found, weights=found.weights + beside)

    return memory.fit(ahead.trained, steps.request.settings.ctx_size, capacity.memory(), measured)


def projector(steps: Steps) -> Path | None:
    """The projector that the model is served with."""
    resolved = steps.require_resolved()
    if steps.request.mmproj:
        return steps.request.mmproj
    return resolved.folder / resolved.mmproj if resolved.mmproj else None


def projector_bytes(steps: Steps) -> int:
    """Its size, whether or not it is there yet."""
    if steps.request.mmproj:
        return steps.request.mmproj.stat().st_size
    resolved = steps.require_resolved()
    return sum(file.size for file in resolved.files if file.name == resolved.mmproj)


def launch_of(steps: Steps, chain: Chain, header: Header, fit: Fit) -> Launch:
    """How llama-server will be started. Raises PipelineError."""
    request, home = steps.request, steps.home
    server = {name.replace("-", "_"): value for name, value in request.settings.server.items()}
    arguments = launch.server_arguments(
        request.settings,
        known_flags(steps),
        model=chain.final,
        mmproj=projector(steps),
        ctx_size=fit.ctx_size,
        # a comma would make two names of it
        alias=chain.resolved.name.replace(",", " "),
        pooling=header.pooling,
    )
    made = Launch(
        executable=steps.binaries.program("llama-server"),
        arguments=tuple(arguments),
        env=launch.clean_environment(
            os.environ, home.run / "xdg", downloads=launch.downloads(arguments)
        ),
        host=request.settings.host,
        port=request.settings.port,
        log=home.logs / f"serve-{request.settings.port}.log",
        folder=user_folder(),
        prefix=server.get("api_prefix", "").rstrip("/"),
        tls="ssl_cert_file" in server,
        downloads=launch.downloads(arguments),
        sandbox=request.sandbox,
    )
    sandbox.require(made, "sandbox")
    return made


def prepare(steps: Steps, chain: Chain) -> Prepared:
    """The launch of a model that is all made. Starts no server. Raises PipelineError."""
    made = estimate.of_made(steps, chain.final)
    header = gguf.read_noted(chain.final, steps.home.run / "gguf.json")
    its = projector(steps)
    if its:
        projectors.require(gguf.read_noted(its, steps.home.run / "gguf.json"), header, its.name)
    fit = fit_context(steps, made)
    ready = launch_of(steps, chain, header, fit)
    require_template_ends(steps.home, ready.command, chain.final, known_flags(steps))
    return Prepared(
        launch=ready,
        name=chain.resolved.name,
        header=header,
        bytes=made.bytes,
        fit=fit,
    )


def require_template_ends(
    home: Home, command: Sequence[str], model: Path, options: Mapping[str, Flag]
) -> None:
    """Raise PipelineError where the template that `command` would serve `model` with runs on."""
    if not chat_template.is_overridden(command):
        server = Path(command[0])
        build = stat_cache.identity(home.run / "sha256.json", server)
        chat_template.require_ends(server, build, options, model, home.run)


def serve(steps: Steps) -> None:
    """Serve the model in the foreground until asked to stop. Raises PipelineError."""
    prepared = prepare(steps, steps.require_chain())
    (steps.home.run / "xdg").mkdir(parents=True, exist_ok=True)
    for warning in (*steps.programs.warnings(), *warnings(steps, prepared)):
        log.info(f"warning: {warning}")

    def ready(seconds: float, output: str) -> None:
        devices = seen_devices(steps, prepared)
        if lacks_device(steps, devices):
            log.info("warning: llama-server sees no device of its backend; the CPU is used")
        told = summary(steps, prepared, seconds, output, devices)
        if steps.request.json:
            print(json.dumps(told), flush=True)
        else:
            width = max(len(name) for name in told)
            print("\n".join(f"{name:<{width}}  {value}" for name, value in told.items()))
            print("Ctrl-C stops it.", flush=True)

    supervise.foreground(
        prepared.launch,
        ready=ready,
        ready_timeout=steps.request.ready_timeout,
        stop_timeout=steps.request.stop_timeout,
    )


def warnings(steps: Steps, prepared: Prepared) -> list[str]:
    """What the user should know before the server is started."""
    settings, fit = steps.request.settings, prepared.fit
    found = []
    loopback = settings.host in ("localhost", "::1") or settings.host.startswith("127.")
    if not loopback and not settings.api_key_file:
        found.append(f"{settings.host} can be reached by others, and no api_key_file is given")
    if not fit.fits and fit.memory:
        found.append(
            f"{size(fit.memory.total)} are needed at a context of {fit.ctx_size}, "
            f"{size(fit.available)} are free: expect it to be slow, or to fail"
        )
    if prepared.header.pooling == "none" and not prepared.header.has_chat_template:
        found.append("the model brings no chat template; llama-server assumes ChatML")
    return found


def context_text(fit: Fit, asked: int | None) -> str:
    """The context, and where it comes from."""
    if asked:
        return f"{fit.ctx_size} tokens, as asked for ({fit.trained or 'unknown'} trained)"
    if not fit.trained:
        return f"{fit.ctx_size} tokens; the trained context is not known"
    if fit.ctx_size == fit.trained:
        return f"{fit.ctx_size} tokens, as trained"
    return f"{fit.ctx_size} tokens of {fit.trained} trained: what the free memory holds"


def seen_devices(steps: Steps, prepared: Prepared) -> list[str]:
    """The devices that our llama-server sees, as it names them; one for the CPU sees none."""
    programs = steps.programs
    if programs.are_external or programs.backend == "cpu":
        return []
    return smoke_test.devices(prepared.launch.executable, prepared.launch.env)


def lacks_device(steps: Steps, devices: list[str]) -> bool:
    """Whether programs for a graphics card see none."""
    programs = steps.programs
    return programs.backend not in ("cpu", "") and not devices


def backend_text(steps: Steps) -> str:
    """The backend, and why it was chosen."""
    if steps.programs.wish.way == "package":
        return "that of the installed package"
    selected = steps.programs.selection
    return f"{selected.backend} ({selected.why})" if selected.why else selected.backend


def summary(
    steps: Steps, prepared: Prepared, seconds: float, output: str, devices: list[str]
) -> dict[str, object]:
    """What is told once the server is ready; `output` is what it has printed."""
    threads = re.search(r"n_threads = (\d+)", output)
    settings = steps.request.settings
    ours = not steps.programs.are_external
    return {
        **service(os.environ),
        "url": prepared.launch.url,
        "model": prepared.name,
        "quant": prepared.header.quant or "unknown",
        "size": size(prepared.bytes),
        **({"projector": its.name} if (its := projector(steps)) else {}),
        "backend": backend_text(steps) if ours else "that of LLAMA_SERVER_BINS_DIR",
        "device": settings.device
        or ", ".join(devices)
        or ("CPU" if ours else "llama-server's choice"),
        "sandbox": sandbox.shown(prepared.launch),
        "threads": settings.threads or (int(threads[1]) if threads else "llama-server's default"),
        "context": context_text(prepared.fit, settings.ctx_size),
        "log": str(prepared.launch.log),
        "ready in": f"{seconds:.2f} s",
    }
