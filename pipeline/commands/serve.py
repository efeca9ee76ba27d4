"""`serve`: one server in the foreground; and what is decided about any server before its start."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from msgspec import Struct

from pipeline.core import capacity, log
from pipeline.core.errors import PipelineError, UsageError
from pipeline.core.paths import Home, user_folder
from pipeline.core.store import stat_cache
from pipeline.core.text import size, table
from pipeline.models import chat_template, contents, gguf, memory, resolve
from pipeline.models import projector as projectors
from pipeline.models.chain import Chain
from pipeline.models.memory import Fit, Memory
from pipeline.serve import flags, health, sandbox, served, supervise
from pipeline.serve.config import checks, instances, messages
from pipeline.serve.config.configuration import InstanceSpec
from pipeline.serve.config.llama import PreparedModel
from pipeline.serve.config.options import ResolvedOptions
from pipeline.serve.flags import Flag
from pipeline.serve.keys import is_loopback
from pipeline.serve.server import LLAMA_CPP, Server
from pipeline.serve.supervisor import environment, state

from . import beside, estimate, leftovers, server_options, summary, tuned
from .estimate import MemoryEstimate
from .model import Model
from .programs import Programs

CHAT = "chat"  # a server's kind
# Options of a server that name a file beside its model.
MORE_FILES = ("--mmproj", "--lora", "--control-vector", "--spec-draft-model", "--model-draft")
HINT = "llama-server --help lists its options"


class Planned(Struct, frozen=True, kw_only=True):
    """A server, and what is known about the model that it will serve."""

    server: Server
    warnings: tuple[str, ...]
    fit: Fit


def known_flags(programs: Programs) -> dict[str, Flag]:
    """The options of the llama-server that will run. Raises PipelineError."""
    binaries = programs.binaries
    return flags.read(
        binaries.program("llama-server"),
        binaries.sha256("llama-server"),
        programs.home.run / "flags",
    )


def check_start(programs: Programs) -> None:
    """Raise PipelineError where the port is taken, or the backend has no device here."""
    if programs.are_chosen:
        programs.selection.require_device()
    health.require_free(programs.request.host, programs.request.port)


def check_flags(model: Model) -> None:
    """Raise UsageError where llama-server would refuse an option."""
    checked_options(model, model.spec)


def checked_options(model: Model, spec: InstanceSpec) -> ResolvedOptions:
    """The options of `spec`. Raises UsageError where llama-server would refuse one."""
    options = instances.resolve(spec, known_flags(model.programs))
    program, folder = model.programs.binaries.program("llama-server"), user_folder()
    errors = [
        *checks.of_server(options, folder),
        *checks.refused(options, program, folder, os.environ),
    ]
    messages.require_none(errors, HINT)
    return options


def fit_context(model: Model, ahead: MemoryEstimate, room: int | None = None) -> Fit:
    """The context to serve with, and the memory that it takes, with its projector, its adapters and
    its draft. `room` is the memory for it in bytes; None: all that is free."""
    requested = ResolvedOptions(model.spec, {}).number("ctx-size") or None
    free = capacity.memory() if room is None else room
    return memory.fit(ahead.trained, requested, free, measured(model, ahead))


def measured(model: Model, ahead: MemoryEstimate) -> Callable[[int], Memory | None]:
    """A function from a context in tokens to what the model takes, with its projector, its adapters
    and its draft."""
    more = projector_bytes(model) + sum(map(beside.adapter_bytes, model.adapters))
    draft = beside.draft_estimate(model)

    def at(ctx_size: int) -> Memory | None:
        need = ahead.at(ctx_size)
        need = need and memory.grown(need, more)
        drafting = draft and draft.at(ctx_size)  # its cache has as many tokens
        return memory.added(need, drafting) if need and drafting else need

    return at


def projector(model: Model) -> Path | None:
    """The projector that the model is served with."""
    if model.request.mmproj:
        return model.request.mmproj
    if made := model.require_chain().projector:
        return made.target
    resolved = model.require_resolved()
    return resolved.folder / resolved.mmproj if resolved.mmproj else None


def projector_bytes(model: Model) -> int:
    """Its size, whether or not it is there yet."""
    if model.request.mmproj:
        return model.request.mmproj.stat().st_size
    if made := model.require_chain().projector:
        return made.target.stat().st_size if made.target.is_file() else made.need
    resolved = model.require_resolved()
    return sum(file.size for file in resolved.files if file.name == resolved.mmproj)


def prepared_model(
    model: Model, chain: Chain, ahead: MemoryEstimate, ctx_size: int
) -> PreparedModel:
    """The model as its server gets it; `ctx_size` is its context where no option names one."""
    return PreparedModel(
        path=chain.final,
        mmproj=projector(model),
        draft=model.draft.require_chain().final if model.draft else None,
        spec_type=model.request.spec_type or (beside.SIMPLE if model.draft else ""),
        adapters=beside.served_adapters(model),
        pooling=ahead.header.pooling if ahead.header else "none",
        ctx_size=ahead.trained,
        fitted=ctx_size,
        tuned=tuned_options(model, chain.final),
    )


def tuned_options(model: Model, file: Path) -> Mapping[str, str]:
    """llama-server's options that `tune` found for the GGUF `file`; none where it never ran."""
    if not may_be_tuned(model):
        return {}
    return tuned.options(model, file, typed_options(model))


def tuned_warnings(model: Model, file: Path) -> list[str]:
    """Why settings that `tune` found for the GGUF `file` are not used."""
    if not may_be_tuned(model):
        return []
    return tuned.warnings(model, file, typed_options(model))


def may_be_tuned(model: Model) -> bool:
    """Whether results of `tune` are here, and wanted."""
    is_wanted = model.request.tuned and (model.home.run / "tuned").is_dir()
    return is_wanted and model.binaries.has("llama-server")


def typed_options(model: Model) -> ResolvedOptions:
    """The user's options for the server of a model, under any of their names."""
    return instances.resolve(model.spec, known_flags(model.programs))


def planned(model: Model, chain: Chain, ahead: MemoryEstimate) -> Planned:
    """The server of the command line's model, which need not be there yet. Raises PipelineError."""
    home, port, key_file = model.home, model.request.port, model.request.api_key_file
    log_file = home.logs / f"serve-{port}.log"
    spec = server_options.spec(model.request, chain.resolved.name, str(log_file))
    options = checked_options(model, spec)
    fit = fit_context(model, ahead)
    server = instances.llama_server(
        options,
        model.binaries.program("llama-server"),
        prepared_model(model, chain, ahead, fit.ctx_size),
        key=Path(key_file) if key_file else None,
        folder=user_folder(),
        log=log_file,
        xdg=home.run / "xdg",
    )
    sandbox.require(server, "sandbox")
    require_fitting(home, server)
    warnings = [*checks.warnings(options)]
    if not server.api_key_file and not is_loopback(server.host):
        warnings.append(f"{server.host} can be reached by others, and no api_key_file is given")
    return Planned(server=server, warnings=tuple(warnings), fit=fit)


def model_file(server: Server) -> Path | None:
    """The GGUF of `server`, where it is here."""
    named = server.argument("--model") if server.engine == LLAMA_CPP else ""
    path = Path(server.folder, named)
    return path if named and path.is_file() else None


def require_model(home: Home, server: Server) -> None:
    """Raise PipelineError where the file of `server` is here and is not a model that it can serve,
    or something else stands in the place of another file that it reads."""
    path = model_file(server)
    try:
        for file in (Path(server.folder, server.argument(name) or "/") for name in MORE_FILES):
            if file.is_file():
                contents.require_real(file)
        if path is None:
            return
        resolve.gguf_path(path, home)
    except PipelineError as error:
        raise PipelineError(f"{server.name}: {error.message}", error.hint) from None
    header = gguf.read_cached(path, home.run)
    if header.is_encoder and server.kind == CHAT:
        raise UsageError(
            f"{server.name}: {path} is an embedding model ({header.architecture}), and would be "
            "started as a chat model",
            f'add embeddings = true and pooling = "{header.pooling}" to its options, or name it '
            "in its model table",
        )


def require_fitting(home: Home, server: Server) -> None:
    """Raise PipelineError where the model of `server` is here and is none, or what its options name
    beside it belongs to another model."""
    require_model(home, server)
    path = model_file(server)
    if path is None:
        return
    beside.require_served(server, path, home)
    mmproj = Path(server.folder, server.argument("--mmproj"))
    if mmproj.is_file():
        header = gguf.read_cached(path, home.run)
        try:
            projectors.require(gguf.read_cached(mmproj, home.run), header, str(mmproj))
        except UsageError as error:
            hint = "use the one made for this model, or leave it out"
            raise UsageError(f"{server.name}: {error.message}", hint) from None


def require_servable(home: Home, server: Server, options: Mapping[str, Flag]) -> None:
    """Raise PipelineError where the model of `server` is here and cannot be served: it does not fit
    what is beside it, or its chat template runs on."""
    require_fitting(home, server)
    path = model_file(server)
    if path and not chat_template.is_overridden(server.command):
        program = Path(server.executable)
        build = stat_cache.identity(home.digests, program)
        chat_template.require_ends(program, build, options, path, home.run)


def checked_server(model: Model) -> Server:
    """The server of the prepared model, checked as it is before a start; what may be wrong and need
    not be is printed. Raises PipelineError."""
    chain = model.require_chain()
    ahead = estimate.of_made(model, chain.final)
    plan = planned(model, chain, ahead)
    require_servable(model.home, plan.server, known_flags(model.programs))
    warnings = [*model.programs.warnings(), *plan.warnings, *memory_warnings(plan.fit)]
    warnings += [*beside.adapter_warnings(model), *tuned_warnings(model, chain.final)]
    for warning in [*warnings, *model_warnings(ahead.header, plan.server)]:
        log.info(f"warning: {warning}")
    return plan.server


def serve(model: Model) -> None:
    """Serve the model in the foreground until asked to stop. Raises PipelineError."""
    run(model.programs, checked_server(model), model.request.ctx_size is not None)


def run(
    programs: Programs, server: Server, names_context: bool, not_started: Sequence[str] = ()
) -> None:
    """One server in the foreground, with its summary once it is ready. Raises PipelineError."""
    run = programs.home.run

    def ready(seconds: float, output: str) -> None:
        served.record(run, server)
        rows = summary.summary(programs, server, output, names_context, not_started)
        rows["ready in"] = f"{seconds:.2f} s"
        if programs.request.json:
            print(json.dumps(rows), flush=True)
        else:
            print(table(list((rows | {"url": server.shown_url}).items())))
            print("Ctrl-C stops it.", flush=True)

    leftovers.begin(programs.home, served.files(server))
    at = state.folder(programs.home, f"serve-{server.port}")
    supervise.foreground(server, env=environment.environment(server, at), ready=ready)


@contextmanager
def temporary(home: Home, server: Server) -> Iterator[Callable[[], None]]:
    """A server of our own while the block runs, and a function that raises PipelineError once it
    has ended. Its log stays where something went wrong."""
    log_file = Path(server.log_file)
    at = state.folder(home, log_file.stem)
    with supervise.beside(server, env=environment.environment(server, at)) as require_running:
        yield require_running
    log_file.unlink(missing_ok=True)


def free_port() -> int:
    """A port of the loopback address that is free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def memory_warnings(fit: Fit) -> list[str]:
    """A warning where the memory is too small."""
    if fit.memory is None or fit.fits:
        return []
    return [
        f"{size(fit.memory.total)} are needed at a context of {fit.ctx_size}, "
        f"{size(fit.available)} are free: expect it to be slow, or to fail"
    ]


def model_warnings(header: gguf.Header | None, server: Server | None) -> list[str]:
    """Warnings about gaps in a model's metadata; `server`, where it is known, serves it."""
    if header is None:
        return []
    if header.lacks_pooling and (not server or server.argument("--pooling") == header.pooling):
        return [
            f"the model does not say how it pools, and is served with pooling {header.pooling}: if "
            "that is wrong, so are its embeddings (set pooling and embeddings = true)"
        ]
    is_chat = header.pooling == "none" and (not server or server.kind == CHAT)
    is_overridden = server is not None and chat_template.is_overridden(server.command)
    if is_chat and not header.has_chat_template and not is_overridden:
        return [
            "the model brings no chat template, so it may be no chat model; llama-server assumes "
            "ChatML (chat_template or chat_template_file names another)"
        ]
    return []
