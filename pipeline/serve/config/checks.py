"""All errors of a configuration, before any work."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path

from pipeline.core.errors import did_you_mean, doitw
from pipeline.core.text import is_digits
from pipeline.serve.flags import Flag
from pipeline.serve.server import LLAMA_CPP, VLLM

from . import api_keys, llama, messages, options, vllm
from .configuration import Configuration, InstanceSpec
from .instances import aliases, log_file, program, resolve
from .options import Address, ResolvedOptions

HINT = f"{messages.HINT}; options that --help does not list go into extra_args"
TLS = ("ssl-cert-file", "ssl-key-file", "ssl-certfile", "ssl-keyfile")  # llama-server's, vLLM's
# Values that llama-server alone can judge.
ASKED = {"device", "spec-draft-device", "mmproj-device"}
ASKED |= {"override-tensor", "spec-draft-override-tensor", "json-schema", "json-schema-file"}
ASKED |= {"chat-template", "chat-template-file"}


def check(
    configuration: Configuration,
    *,
    server: Path | None,
    flags: Mapping[str, Flag] | None,
    environ: Mapping[str, str],
    cards: int | None = None,
    installed: vllm.VllmOptions | None = None,
    note: Callable[[str], None] = lambda _: None,
    is_there: Callable[[Path], bool] = Path.is_file,
) -> None:
    """Find every error, those that reading left in the configuration among them.

    `server` is the llama-server where the file names none, `flags` its options, `cards` the number
    of graphics cards, `installed` the options of the installed vLLM; None means not known. `note`
    is called with each warning, `is_there` tells whether a model file exists. Raises UsageError
    that names every error.
    """
    errors = [*configuration.errors]
    enabled = [resolve(spec, flags, installed) for spec in configuration.enabled]
    engines = {resolved.spec.engine for resolved in enabled}
    if LLAMA_CPP in engines:
        errors += _program(configuration, program(configuration, server))
    for resolved in enabled:
        errors += _errors(configuration, resolved, cards, is_there)
    errors += _gateway(configuration, [resolve(spec, flags) for spec in configuration.specs])
    errors += _clashes(configuration, enabled)
    messages.require_none(errors, HINT)
    notes = [*configuration.notes, *chain.from_iterable(map(warnings, enabled))]
    for resolved in enabled:
        if resolved.spec.engine == VLLM:
            notes += vllm.sleep_warnings(resolved, environ)
    if VLLM in engines:
        notes += vllm.warnings(configuration, environ)
    for warning in notes:
        note(warning)


def _program(configuration: Configuration, path: Path | None) -> Iterator[str]:
    """What is wrong with the llama-server."""
    named = configuration.master.llama_cpp_path
    place = f"{configuration.label}: master.llama_cpp_path"
    if path is None:
        yield f"{place}: there is no llama-server; name one, or run {doitw('build_bins')}"
    elif named and path.is_dir():
        yield f"{place} = {named}: {path} is a folder; name the llama-server in it"
    elif named and not path.is_file():
        yield f"{place} = {named}: {path} is not a file"
    elif named and not os.access(path, os.X_OK):
        yield f"{place} = {named}: {path} may not be executed"


def of_server(
    resolved: ResolvedOptions, folder: Path, is_there: Callable[[Path], bool] = Path.is_file
) -> Iterator[str]:
    """What is wrong with the options of one server; relative paths start at `folder`."""
    yield from options.errors(resolved)
    if resolved.spec.engine == LLAMA_CPP:
        yield from llama.errors(resolved, folder, is_there)
    else:
        yield from vllm.errors(resolved, folder, is_there)
    yield from api_keys.errors(resolved, folder)
    if resolved.text(*TLS):
        from . import tls

        yield from tls.errors(resolved, folder)


def refused(
    resolved: ResolvedOptions, program: Path, folder: Path, environ: Mapping[str, str]
) -> Iterator[str]:
    """The errors of values that `program`, a llama-server, itself refuses on this machine."""
    if resolved.has(*ASKED):
        from . import asked

        yield from asked.errors(resolved, ASKED, program, folder, environ)


def _errors(
    configuration: Configuration,
    resolved: ResolvedOptions,
    cards: int | None,
    is_there: Callable[[Path], bool],
) -> Iterator[str]:
    """What is wrong with one instance."""
    spec = resolved.spec
    yield from of_server(resolved, configuration.folder, is_there)
    yield from _unloading(configuration, spec)
    ids = (spec.control.gpu_ids or "").split(",")
    absent = [card for card in ids if cards is not None and is_digits(card) and int(card) >= cards]
    if absent:
        there = f"there are {cards}, from 0" if cards else "none"
        why = f" = {','.join(ids)}: there is no card {', '.join(absent)} ({there})"
        yield spec.line("control.gpu_ids", why)


def _unloading(configuration: Configuration, spec: InstanceSpec) -> Iterator[str]:
    """What is wrong with `idle_timeout` of one instance."""
    control = spec.control
    if control.idle_timeout and control.pinned:
        why = f" = {control.idle_timeout:g}: a pinned instance is never unloaded; leave one out"
        yield spec.line("control.idle_timeout", why)
    elif control.idle_timeout and not configuration.gateway.enable:
        why = f" = {control.idle_timeout:g}: the gateway counts the requests; enable it"
        yield spec.line("control.idle_timeout", f"{why}: [gateway] enable = true")


def _gateway(configuration: Configuration, instances: list[ResolvedOptions]) -> Iterator[str]:
    """What is wrong with the gateway's table."""
    gateway = configuration.gateway
    yield from api_keys.gateway_errors(configuration)
    names = [resolved.spec.name for resolved in instances]
    names += chain.from_iterable(map(aliases, instances))
    folded = {name.casefold() for name in names}
    for pattern, name in gateway.models.items():
        if name.casefold() not in folded:
            key = messages.dotted(("models", pattern))
            why = f"is neither an instance nor an alias{did_you_mean(name, names)}"
            yield f"{configuration.label}: gateway.{key} = {messages.shown(name)}: {why}"


def _clashes(configuration: Configuration, instances: list[ResolvedOptions]) -> Iterator[str]:
    """Servers that would listen on one port, or write one log."""
    places: list[tuple[str, Address]] = [
        (resolved.spec.at("server.port"), resolved.address)
        for resolved in instances
        if resolved.port
    ]
    gateway = configuration.gateway
    if gateway.enable:
        places.append((configuration.at_gateway("port"), Address(gateway.host, gateway.port)))
    for index, (place, at) in enumerate(places):
        before = next((name for name, other in places[:index] if at.clashes(other)), "")
        if before:
            yield f"{place}: {at.host}:{at.port} is taken by {_inside(before)}"
    # A log that is there is set aside at a start: these would be lost to the next one.
    read = [configuration.label, *(resolved.text("model") for resolved in instances)]
    kept = {os.path.realpath(configuration.path(text)) for text in read if text}
    logs: dict[Path, str] = {}
    for spec in [resolved.spec for resolved in instances]:
        written = log_file(configuration, spec, Path("/"))
        path = Path(os.path.realpath(written))  # one file may be named in two ways
        if str(path) in kept:
            yield f"{spec.at('control.log_file')}: {path.name} is read here; name another file"
        if path in logs:
            yield f"{spec.at('control.log_file')}: {path.name} is written by {logs[path]}"
        logs.setdefault(path, _inside(spec.place))


def warnings(resolved: ResolvedOptions) -> Iterator[str]:
    """What is allowed in the options of one server, and perhaps not meant."""
    yield from options.warnings(resolved)
    yield from api_keys.warnings(resolved)
    if resolved.spec.engine == LLAMA_CPP:
        yield from llama.warnings(resolved)


def _inside(place: str) -> str:
    """A place without the file's name, which the message has already."""
    return place.partition(": ")[2] or place
