"""`serve`, and what it decides before it starts anything: the launch, and the memory for it."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from pipeline.bins import binaries
from pipeline.core.paths import user_folder
from pipeline.core.say import say, size
from pipeline.models import gguf, memory
from pipeline.models.chain import Chain
from pipeline.models.gguf import Header
from pipeline.models.memory import Fit, Memory
from pipeline.serve import flags, health, launch, supervise
from pipeline.serve.flags import Flag
from pipeline.serve.launch import Launch

from .steps import Steps


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


def check_port(steps: Steps) -> None:
    """Raise PipelineError where the port is taken."""
    health.require_free(steps.request.settings.host, steps.request.settings.port)


def check_flags(steps: Steps) -> None:
    """Raise UsageError where llama-server has no such option."""
    flags.arguments(steps.request.settings.server, known_flags(steps), "server.")


def fit_context(steps: Steps, model: Path, header: Header) -> Fit:
    """The context to serve with, and the memory that it takes."""
    settings, programs = steps.request.settings, steps.binaries

    def measured(ctx_size: int) -> Memory | None:
        if not programs.has("llama-fit-params"):
            return None
        options = launch.batch_options(header.pooling, ctx_size, settings.batch_size)
        if settings.parallel:
            options += ["--parallel", str(settings.parallel)]
        program = programs.program("llama-fit-params")
        digest = programs.sha256("llama-fit-params")
        # Options such as cache_type_k change what is needed; it knows those that do.
        its = flags.read(program, digest, steps.home.run / "flags")
        shared = {n: v for n, v in settings.server.items() if n.replace("_", "-") in its}
        options += flags.arguments(shared, its, "server.")
        build = digest[:12]
        book = steps.home.run / "memory.json"
        return memory.measure(program, build, model, options, ctx_size, book)

    return memory.fit(header, settings.ctx_size, memory.available(), measured)


def prepare(steps: Steps, chain: Chain) -> Prepared:
    """The launch of a model that is all made. Starts no server. Raises PipelineError."""
    request, home, model = steps.request, steps.home, chain.final
    header = gguf.read_noted(model, home.run / "gguf.json")
    fit = fit_context(steps, model, header)
    config = home.run / "xdg"
    server = {name.replace("-", "_"): value for name, value in request.settings.server.items()}
    arguments = launch.server_arguments(
        request.settings,
        known_flags(steps),
        model=model,
        ctx_size=fit.ctx_size,
        # a comma would make two names of it
        alias=chain.resolved.name.replace(",", " "),
        pooling=header.pooling,
    )
    return Prepared(
        launch=Launch(
            executable=steps.binaries.program("llama-server"),
            arguments=tuple(arguments),
            env=launch.clean_environment(os.environ, config),
            host=request.settings.host,
            port=request.settings.port,
            log=home.logs / f"serve-{request.settings.port}.log",
            folder=user_folder(),
            prefix=server.get("api_prefix", "").rstrip("/"),
            tls="ssl_cert_file" in server,
        ),
        name=chain.resolved.name,
        header=header,
        bytes=sum(part.stat().st_size for part in gguf.shards(model)),
        fit=fit,
    )


def serve(steps: Steps) -> None:
    """Serve the model in the foreground until asked to stop. Raises PipelineError."""
    prepared = prepare(steps, steps.require_chain())
    (steps.home.run / "xdg").mkdir(parents=True, exist_ok=True)
    for warning in warnings(steps, prepared):
        say(f"warning: {warning}")

    def ready(seconds: float, output: str) -> None:
        told = summary(steps, prepared, seconds, output)
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
        return f"{fit.ctx_size} tokens, as asked for ({fit.trained} trained)"
    if fit.ctx_size == fit.trained:
        return f"{fit.ctx_size} tokens, as trained"
    return f"{fit.ctx_size} tokens of {fit.trained} trained: what the free memory holds"


def summary(steps: Steps, prepared: Prepared, seconds: float, output: str) -> dict[str, object]:
    """What is told once the server is ready; `output` is what it has printed."""
    threads = re.search(r"n_threads = (\d+)", output)
    settings = steps.request.settings
    ours = binaries.external(steps.home) is None
    return {
        "url": prepared.launch.url,
        "model": prepared.name,
        "quant": prepared.header.quant or "unknown",
        "size": size(prepared.bytes),
        "backend": steps.request.backend if ours else "that of LLAMA_SERVER_BINS_DIR",
        "device": settings.device or ("CPU" if ours else "llama-server's choice"),
        "threads": settings.threads or (int(threads[1]) if threads else "llama-server's default"),
        "context": context_text(prepared.fit, settings.ctx_size),
        "log": str(prepared.launch.log),
        "ready in": f"{seconds:.2f} s",
    }
