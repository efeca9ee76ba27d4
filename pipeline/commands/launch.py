"""The servers that a file asks for as they are started: with their models and contexts."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from msgspec.structs import replace

from pipeline.core import capacity, paths
from pipeline.core.errors import PipelineError
from pipeline.core.store.locks import only_one
from pipeline.core.store.publish import disk_errors, publish_same
from pipeline.core.text import byte_count
from pipeline.models import gguf
from pipeline.serve import sandbox, served
from pipeline.serve.config.configuration import InstanceSpec, projector_of
from pipeline.serve.config.llama import PreparedModel
from pipeline.serve.guard import port
from pipeline.serve.placing import TOTAL
from pipeline.serve.server import BOOT, LLAMA_CPP, Server
from pipeline.serve.supervisor import slots, state

from . import beside, estimate, needs, serve
from .model import Model
from .servers import Servers

OF_LLAMA_SERVER = ("sandbox", "origins", "hosts")  # variables that win over a file or a profile


def servers_of(file: Servers) -> tuple[Server, ...]:
    """What will be started. Raises PipelineError where a model is not known yet.

    A fitted context stays while nothing else of its server changes: free memory differs from run to
    run, and a server that runs is part of what is used.
    """
    desired = state.read_wanted(file.at)
    before = state.servers_of(desired)
    contexts = {
        name: int(context)
        for name, server in before.items()
        if (context := server.argument("--ctx-size")).isdecimal()
    }
    free = _free(file)
    servers = _servers(file, contexts, free)
    same = {server.name for server in servers if server == before.get(server.name)}
    if contexts.keys() - same:
        servers = _servers(file, {name: contexts[name] for name in contexts.keys() & same}, free)
    for server in servers:
        sandbox.require(server, f"{server.name}: sandbox")
    return servers


def _servers(file: Servers, contexts: Mapping[str, int], free: int) -> tuple[Server, ...]:
    """The servers; `contexts` are to be kept by those that have no other, by name."""
    models = {
        spec.name: _model(file, spec, contexts.get(spec.name), free)
        for spec in file.configuration.enabled
        if spec.model
    }
    servers = file.as_started(file.configuration, models)
    if file.requested.background is not None:
        servers = tuple(replace(s, background=file.requested.background) for s in servers)
    typed = {n: getattr(file.request, n) for n in OF_LLAMA_SERVER if n in file.variables}
    servers = tuple(replace(s, **typed) if s.engine == LLAMA_CPP else s for s in servers)
    if (wanted := file.request.guard) is not None:
        servers = tuple(replace(s, guard=wanted and port.can_guard(s)) for s in servers)
    if byte_count(file.configuration.master.saved_slots):
        servers = tuple(slots.saving(server, file.at) for server in servers)
    return tuple(replace(server, contents=served.contents(server)) for server in servers)


def _model(file: Servers, spec: InstanceSpec, context: int | None, free: int) -> PreparedModel:
    """The model of `spec`. `context` is used where the file names none; None: one that fits."""
    model = file.model_of(spec).served_by(spec)
    chain = model.require_chain()
    ahead = estimate.outlook(model, chain)
    if context is None:
        room = _room(file, spec, free) + _weights(model)
        context = serve.fit_context(model, ahead, room).ctx_size
    prepared = serve.prepared_model(model, chain, ahead, context)
    installed = installed_files(model, spec)
    mmproj = prepared.mmproj and installed.get(Path(prepared.mmproj), prepared.mmproj)
    return replace(prepared, path=installed.get(chain.final, chain.final), mmproj=mmproj)


def _free(file: Servers) -> int:
    """The memory in bytes that the models of a file may have together, as far as it is free."""
    if file.configuration.master.memory == "auto":
        return capacity.memory()
    allowed = needs.budget(file)
    return min(capacity.memory(), allowed.get("ram", sys.maxsize), allowed.get(TOTAL, sys.maxsize))


def _room(file: Servers, spec: InstanceSpec, free: int) -> int:
    """The memory in bytes that the model of `spec`, whose context is fitted, may have beside its
    weights. Those that are loaded together share what all their weights leave."""
    fitted, weights = 0, 0
    for other in file.configuration.enabled:
        together = other.control.pinned or other.control.start == spec.control.start == BOOT
        if other.model and (together or other is spec):
            model = file.model_of(other)
            weights += _weights(model)
            fitted += not file.names_context(other.name)
    return (free - weights) // max(1, fitted)


def _weights(model: Model) -> int:
    """The bytes of a model, its draft and its adapters."""
    draft = beside.draft_estimate(model)
    own = estimate.outlook(model, model.require_chain()).bytes
    return own + sum(map(beside.adapter_bytes, model.adapters)) + (draft.bytes if draft else 0)


def warnings(file: Servers, servers: Sequence[Server]) -> list[str]:
    """Warnings about gaps in the metadata of the models of `servers`."""
    prepared = {
        s.name: file.model_of(s).served_by(s) for s in file.configuration.enabled if s.model
    }
    lines = []
    for server in servers:
        path, header = serve.model_file(server), None
        if path:
            header = gguf.read_cached(path, file.home.run)
        elif server.name in prepared:
            model = prepared[server.name]
            header = estimate.outlook(model, model.require_chain()).header
        named = prepared.get(server.name)
        texts = []
        if named:
            final = named.require_chain().final
            texts = [*beside.adapter_warnings(named), *serve.tuned_warnings(named, final)]
        lines += [f"{server.name}: {x}" for x in (*texts, *serve.model_warnings(header, server))]
    return lines


def not_started(file: Servers, servers: Sequence[Server]) -> list[str]:
    """What the file asks for beside `servers`, and why it is left out."""
    started, reasons = {server.name for server in servers}, []
    for spec in file.configuration.specs:
        if spec.name in started:
            continue
        if not file.configuration.master.enable:
            reason = "master.enable = false"
        elif not spec.control.enabled:
            reason = f"{spec.at('control.enabled')} = false"
        else:
            reason = "not among name="
        reasons.append(f"{spec.name} ({reason})")
    return reasons


# A profile names where its model is to be: `model_root` and `hf_filename`


def install_models(file: Servers) -> None:
    """Have the prepared files where a profile wants them. Raises PipelineError."""
    for spec in file.configuration.enabled:
        if spec.download_to is not None:
            install(file.model_of(spec), spec, spec.download_to)


def require_writable(specs: Iterable[InstanceSpec]) -> None:
    """Raise PipelineError where a prepared file could not be put where it is wanted."""
    for spec in specs:
        if spec.download_to is None:
            continue
        try:
            paths.require_writable(spec.download_to.parent)
        except PipelineError as error:
            hint = "let this user write there (of a container: --user), or download it yourself"
            raise PipelineError(error.message, hint) from None


def install(model: Model, spec: InstanceSpec, target: Path) -> None:
    """Have the prepared files where they are wanted. The model itself, or its first part, comes
    last: it says that all is there. Raises PipelineError."""
    first, *parts = gguf.shards(model.require_chain().final)
    files = installed_files(model, spec)
    files |= {part: target.with_name(part.name) for part in parts}
    with disk_errors(target.parent, "llamacpp.model_root"), only_one(target):
        for file in [*(file for file in files if file != first), first]:
            if not files[file].exists():
                publish_same(file, files[file])


def installed_files(model: Model, spec: InstanceSpec) -> dict[Path, Path]:
    """Where a profile wants the model, by its first part, and its projector."""
    if spec.download_to is None:
        return {}
    first, target = model.require_chain().final, spec.download_to
    # llama.cpp finds the parts of a split model by their names
    target = target.with_name(first.name) if gguf.SHARD.fullmatch(first.name) else target
    projector = None if model.request.mmproj else serve.projector(model)
    return {first: target} | ({projector: projector_of(target)} if projector else {})
