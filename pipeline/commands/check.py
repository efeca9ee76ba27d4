"""Checks before any work: the home is writable, local files are sound, what will be needed is
there, and the file of servers has no errors."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING

from msgspec.structs import replace

from pipeline import models
from pipeline.bins import binaries
from pipeline.bins.hardware import nvidia
from pipeline.core import log, paths
from pipeline.core.errors import PipelineError, UsageError
from pipeline.core.paths import Home
from pipeline.models import quants
from pipeline.serve.config import checks, instances, named, vllm
from pipeline.serve.flags import Flag
from pipeline.serve.server import LLAMA_CPP, VLLM

from . import beside, leftovers, lock, needs, quality, quality_gate, quality_setup, resolve
from .model import Model

if TYPE_CHECKING:
    from .servers import Servers
    from .session import Session


def require_writable(home: Home, *, models: bool = True) -> None:
    """Raise PipelineError where nothing can be made; without `models`, nothing but models."""
    for folder in (home.root, home.run, home.logs, home.bins, *([home.models] if models else [])):
        paths.require_writable(folder)


def is_made(model: Model) -> bool:
    """Whether the model and what is served with it are there, so that nothing is written beside
    them. Nothing is looked up for it."""
    if not (model.request.reference and model.home.models.is_dir() and model.known()):
        return False
    made = [model, *model.beside.values()]
    try:
        if model.request.measures:
            made = [quality.with_quant(model, quant) for quant in quality.requested(model)]
        return all((chain := each.chain()) and each.is_made(chain) for each in made)
    except PipelineError:
        return False  # whoever makes it says what is wrong


def check_session(session: Session) -> None:
    """Raise PipelineError where a run that makes something would fail; without a model llama.cpp's
    programs alone are checked. From here on nothing is removed that it may need."""
    named = session.models.values() or (session.model,)
    require_writable(session.home, models=not all(map(is_made, named)))
    leftovers.begin(session.home)
    for model in named:
        is_decided = model.request.wanted.quant in quants.DECIDED
        if model.request.wanted.quant == quants.ALL:
            raise UsageError("quant=all: only plan takes it", "name a quant, or pass quant=auto")
        with model.placed():
            check_request(model)
        reference = model.request.reference
        if model.request.force and reference and reference.path:
            models.resolve.forget(reference.path, model.home)  # it may be out of date
            if model.base:
                model.resolved = None  # looked at again once its model is known
            else:
                resolve.read_local(model, reference.path)
        lock.require(model, before=True)
        # A repository that is not there should not cost a build, though quant=auto or fit is
        # decided after it.
        asks = is_decided and not model.request.frozen and not model.resolve_is_done()
        if asks and reference and reference.kind == "hub":
            resolve.listing(model)


def check_limit(model: Model) -> None:
    """Raise UsageError for limits that contradict or limit nothing, or a text that is not used."""
    request, chain = model.request, model.chain()
    if request.has_limit:
        bound = quality_gate.limit(request)
        of = chain and quality_gate.reference(chain)
        if bound and chain and of and of.conversion is None:
            header = models.gguf.read_cached(of.path, model.home.run)
            quality_gate.require_kind(bound, header, chain.resolved.name)
    elif request.sample_text and not request.measures:
        raise UsageError("text=: not used without max_kld= or min_cosine=", "leave it out")
    if own := request.sample_text:
        quality_setup.own_text(own)


def check_request(model: Model) -> None:
    """As `check_session`, of one model, for runs that make nothing."""
    request, home, source = model.request, model.home, model.programs.llama_cpp
    reference, wanted = request.reference, request.wanted
    model.programs.require_device()
    external = binaries.external(home)
    quant = wanted.quant or quants.DEFAULT
    is_converted = reference is not None and reference.is_safetensors
    if external and is_converted and quant not in quants.DIRECT:
        external.program("llama-quantize")
    of_text = wanted.imatrix and models.imatrix.is_text(wanted.imatrix)
    if external and (of_text or (quants.is_mix(quant) and not wanted.imatrix)):
        external.program("llama-imatrix")
    if reference and reference.note:
        log.info(reference.note)
    if source.local:
        log.info(
            f"{source.folder} differs from the pin; used as it is, and recorded as {source.tree}"
        )
    own = request.mmproj and models.gguf.read_cached(request.mmproj, home.run)
    if reference and reference.path and reference.kind == "gguf":
        model.read_path(reference.path)
        if own and request.mmproj:
            header = models.gguf.read_cached(reference.path, home.run)
            models.projector.require(own, header, request.mmproj.name)
    elif reference and reference.path and model.base:
        models.adapter.check_folder(reference.path)
    elif reference and reference.path:
        models.resolve.check_folder(reference.path, model.architectures())
    check_limit(model)  # its chain raises what is wrong with it now
    if request.quants:
        quality.check_quants(model)
    if wanted.imatrix:
        models.imatrix.require_usable(wanted.imatrix)


def require_known(models: Collection[Model]) -> None:
    """Check models as a run would, and resolve them for this run alone. Raises PipelineError."""
    for model in models:
        with model.placed():
            check_request(model)
    for model in models:
        lock.require(model, before=True)
        if not model.resolve_is_done():
            with model.placed():
                resolve.resolve(model, store=False)
    beside.check(models)


def check_servers(servers: Servers, note: Callable[[str], None] = lambda _: None) -> None:
    """Raise UsageError with all errors of the file that can be seen now, as far as its programs are
    here; `note` is given what is worth a line."""
    configuration, requested = servers.configuration, servers.requested
    require_watchable(servers)
    if requested.besides:
        here = configuration.label
        note(f"{requested.besides} names another file, which is not read; using {here}")
    for variable in servers.unread_overrides:
        note(f"{variable} is set, and not read here; this file takes {servers.overrides}")
    errors = [
        *servers.errors,
        *servers.misplaced(has_gateway=True),
        *named.unknown_overrides(os.environ),
        *unknown_devices(servers),
    ]
    try:
        flags = servers.flags()
    except PipelineError as error:
        errors.append(error.message)
        flags = None
    errors += refused(servers, flags)
    cards = nvidia.count()
    checks.check(
        replace(configuration, errors=(*errors, *wrong_logs(servers))),
        server=servers.server,
        flags=flags,
        environ=os.environ,
        cards=cards,
        installed=installed_vllm(servers),
        note=note,
    )
    for spec in configuration.enabled:
        least, most = spec.control.replicas
        if (least, most) != (1, 1):
            text = most if least == most else f'"{least}-{most}"'
            note(f"{spec.at('control.replicas')} = {text}: for a cluster; one server runs here")
    for spec in configuration.enabled if cards is None else ():
        if spec.control.gpu_ids not in (None, "all", "none"):
            why = "there is no NVIDIA driver here, or it does not answer"
            note(f"{spec.at('control.gpu_ids')}: cannot be checked: {why}")


def unknown_devices(servers: Servers) -> Iterator[str]:
    """The error of a device in `master.memory` that this machine has not."""
    if isinstance(servers.configuration.master.memory, dict):
        try:
            needs.budget(servers)
        except UsageError as error:
            yield f"{error.message}; it has {error.hint}"


def refused(servers: Servers, known: Mapping[str, Flag] | None) -> Iterator[str]:
    """The errors of values that the llama-server that will run, whose options are `known`, refuses
    on this machine."""
    for spec in servers.configuration.enabled if known else ():
        if spec.engine == LLAMA_CPP:
            resolved = instances.resolve(spec, known)
            folder = servers.configuration.folder
            yield from checks.refused(resolved, servers.server, folder, os.environ)


def require_watchable(servers: Servers) -> None:
    """Raise UsageError for what cannot be watched."""
    requested = servers.requested
    if not requested.watch:
        return
    if not requested.config:
        raise UsageError("watch=1: follows a file of instances, and a profile has none", "leave it")
    if requested.background is False or requested.dry_run:
        other = "dry_run=1" if requested.dry_run else "background=0"
        raise UsageError(f"watch=1 and {other} contradict each other", "leave one out")
    if servers.set_overrides:
        raise UsageError(
            f"watch=1: {', '.join(servers.set_overrides)} is set, and only the file is followed",
            "write it into the file",
        )


def wrong_logs(servers: Servers) -> list[str]:
    """The logs that cannot be written."""
    from pipeline.serve import logfile

    logs, errors = servers.logs(), []
    for spec in servers.configuration.enabled:
        if why := logfile.trouble(logs[spec.name]):
            key = "log_file" if spec.control.log_file else "log_dir"
            errors.append(f"{spec.at(f'control.{key}')}: {why}")
    return errors


@cache
def installed_vllm(servers: Servers) -> vllm.VllmOptions | None:
    """The options of an installed vLLM, by its own help: slow, the first time."""
    configuration = servers.configuration
    if all(spec.engine != VLLM for spec in configuration.enabled):
        return None
    return vllm.installed(configuration, os.environ, servers.home.run / "flags")
