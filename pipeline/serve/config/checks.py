"""Everything that is wrong with a configuration, found before any work."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from pipeline.core.errors import did_you_mean, doitw
from pipeline.serve.flags import Flag
from pipeline.serve.server import LLAMA_CPP

from . import addresses, api_keys, llama, messages, options, vllm
from .addresses import Address, address
from .configuration import Configuration
from .instances import aliases, log_file, program, resolve
from .options import ResolvedOptions
from .vllm_installed import VllmOptions

HINT = f"{messages.HINT}; options that --help does not list go into extra_args"


def check(
    configuration: Configuration,
    *,
    server: Path | None,
    flags: Mapping[str, Flag] | None,
    environ: Mapping[str, str],
    cards: int | None = None,
    installed: VllmOptions | None = None,
    note: Callable[[str], None] = lambda _: None,
    is_there: Callable[[Path], bool] = Path.is_file,
) -> None:
    """Find every error, those of a patient `load` among them, before a model is prepared.

    `server` is the llama-server where the file names none, `flags` its options where they are
    known, `cards` how many cards are there, None where that is not known, `installed` the options
    of the vLLM that is here. `note` gets what is allowed and should be said, `is_there` tells
    whether there is such a model file. Raises UsageError that names every error.
    """
    wrong = [*configuration.errors]
    told = [resolve(spec, flags, installed) for spec in configuration.enabled]
    engines = {one.spec.engine for one in told}
    if LLAMA_CPP in engines:
        wrong += _program(configuration, program(configuration, server))
    for one in told:
        wrong += _errors(configuration, one, cards, flags or {}, is_there)
    wrong += _gateway(configuration, [resolve(spec, flags) for spec in configuration.specs])
    wrong += _clashes(configuration, told)
    messages.require_none(wrong, HINT)
    for warning in (*configuration.notes, *_warnings(configuration, told, environ, flags or {})):
        note(warning)


def _program(configuration: Configuration, found: Path | None) -> Iterator[str]:
    """What is wrong with the llama-server."""
    named = configuration.master.llama_cpp_path
    place = f"{configuration.label}: master.llama_cpp_path"
    if found is None:
        yield f"{place}: there is no llama-server; name one, or run {doitw('build_bins')}"
    elif named and found.is_dir():
        yield f"{place} = {named}: {found} is a folder; name the llama-server in it"
    elif named and not found.is_file():
        yield f"{place} = {named}: {found} is no file"
    elif named and not os.access(found, os.X_OK):
        yield f"{place} = {named}: {found} may not be executed"


def of_llama_server(
    resolved: ResolvedOptions, folder: Path, is_there: Callable[[Path], bool] = Path.is_file
) -> Iterator[str]:
    """What is wrong with the options of one llama-server; relative paths start at `folder`."""
    yield from addresses.errors(resolved)
    yield from options.errors(resolved, _called(resolved))
    yield from llama.errors(resolved, folder, is_there)
    yield from api_keys.errors(resolved, folder)


def _errors(
    configuration: Configuration,
    resolved: ResolvedOptions,
    cards: int | None,
    ours: Mapping[str, Flag],
    is_there: Callable[[Path], bool],
) -> Iterator[str]:
    """What is wrong with one instance."""
    spec = resolved.spec
    if spec.engine == LLAMA_CPP:
        yield from of_llama_server(resolved, configuration.folder, is_there)
    else:
        yield from addresses.errors(resolved)
        yield from options.errors(resolved, _called(resolved), ours)
        yield from vllm.errors(configuration, resolved)
        yield from api_keys.errors(resolved, configuration.folder)
    ids = (spec.control.gpu_ids or "").split(",")
    absent = [one for one in ids if cards is not None and one.isdecimal() and int(one) >= cards]
    if absent:
        there = f"there are {cards}, from 0" if cards else "none"
        why = f" = {','.join(ids)}: there is no card {', '.join(absent)} ({there})"
        yield spec.tell("control.gpu_ids", why)


def _gateway(configuration: Configuration, told: list[ResolvedOptions]) -> Iterator[str]:
    """What is wrong with the gateway's table."""
    gateway = configuration.gateway
    yield from api_keys.gateway_errors(configuration)
    names = [one.spec.name for one in told]
    names += [alias for one in told for alias in aliases(one)]
    folded = {name.casefold() for name in names}
    for pattern, name in gateway.models.items():
        if name.casefold() not in folded:
            key = messages.dotted(("models", pattern))
            why = f"is no instance and no alias{did_you_mean(name, names)}"
            yield f"{configuration.label}: gateway.{key} = {messages.shown(name)}: {why}"


def _clashes(configuration: Configuration, told: list[ResolvedOptions]) -> Iterator[str]:
    """Two that listen on one port, or write one log."""
    places: list[tuple[str, Address]] = [
        (one.spec.at("server.port"), address(one)) for one in told if not any(addresses.errors(one))
    ]
    gateway = configuration.gateway
    if gateway.enable:
        places.append((configuration.at_gateway("port"), Address(gateway.host, gateway.port)))
    for index, (place, at) in enumerate(places):
        before = next((name for name, other in places[:index] if at.clashes(other)), "")
        if before:
            yield f"{place}: {at.host}:{at.port} is taken by {_inside(before)}"
    logs: dict[Path, str] = {}
    for one in told:
        path = log_file(configuration, one.spec, Path("/"))
        if path in logs:
            yield f"{one.spec.at('control.log_file')}: {path.name} is written by {logs[path]}"
        logs.setdefault(path, _inside(one.spec.place))


def _warnings(
    configuration: Configuration,
    told: list[ResolvedOptions],
    environ: Mapping[str, str],
    ours: Mapping[str, Flag],
) -> Iterator[str]:
    """What is allowed and should be said."""
    for one in told:
        yield from warnings(one, ours)
    if any(one.spec.engine != LLAMA_CPP for one in told):
        yield from vllm.warnings(configuration, environ)


def warnings(resolved: ResolvedOptions, ours: Mapping[str, Flag]) -> Iterator[str]:
    """What is allowed in the options of one server and should be said."""
    yield from options.warnings(resolved, _called(resolved), ours)
    yield from api_keys.warnings(resolved, address(resolved))
    if resolved.spec.engine == LLAMA_CPP:
        yield from llama.warnings(resolved)


def _called(resolved: ResolvedOptions) -> str:
    """The program that will serve, as it is named in messages."""
    is_llama = resolved.spec.engine == LLAMA_CPP
    return "llama-server" if is_llama else f"vLLM {resolved.installed or vllm.version()}"


def _inside(place: str) -> str:
    """A place without the file's name, which has been said."""
    return place.partition(": ")[2] or place
