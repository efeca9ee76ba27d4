"""Everything that is wrong with a configuration, found before any work."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from pipeline.core.errors import did_you_mean, doitw
from pipeline.serve.flags import Flag
from pipeline.serve.server import LLAMA_CPP

from . import addresses, api_keys, llama, mistakes, options, vllm
from .addresses import Address, address
from .configuration import Configuration
from .instances import aliases, given, log_file, program
from .options import ResolvedOptions
from .vllm_installed import VllmOptions

HINT = f"{mistakes.HINT}; options that --help does not list go into extra_args"


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
    """Find every mistake, those of a patient `load` among them, before a model is prepared.

    `server` is the llama-server where the file names none, `flags` its options where they are
    known, `cards` how many cards are there, None where that is not known, `installed` the options
    of the vLLM that is here. `note` gets what is allowed and should be said, `is_there` tells
    whether there is such a model file. Raises UsageError that names every mistake.
    """
    wrong = [*configuration.mistakes]
    told = [given(draft, flags, installed) for draft in configuration.enabled]
    engines = {one.draft.engine for one in told}
    if LLAMA_CPP in engines:
        wrong += _program(configuration, program(configuration, server))
    for one in told:
        wrong += _mistakes(configuration, one, cards, flags or {}, is_there)
    wrong += _gateway(configuration, [given(draft, flags) for draft in configuration.drafts])
    wrong += _clashes(configuration, told)
    mistakes.require_none(wrong, HINT)
    for remark in (*configuration.notes, *_remarks(configuration, told, environ, flags or {})):
        note(remark)


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
    given: ResolvedOptions, folder: Path, is_there: Callable[[Path], bool] = Path.is_file
) -> Iterator[str]:
    """What is wrong with the options of one llama-server; relative paths start at `folder`."""
    yield from addresses.mistakes(given)
    yield from options.mistakes(given, _called(given))
    yield from llama.mistakes(given, folder, is_there)
    yield from api_keys.mistakes(given, folder)


def _mistakes(
    configuration: Configuration,
    given: ResolvedOptions,
    cards: int | None,
    ours: Mapping[str, Flag],
    is_there: Callable[[Path], bool],
) -> Iterator[str]:
    """What is wrong with one instance."""
    draft = given.draft
    if draft.engine == LLAMA_CPP:
        yield from of_llama_server(given, configuration.folder, is_there)
    else:
        yield from addresses.mistakes(given)
        yield from options.mistakes(given, _called(given), ours)
        yield from vllm.mistakes(configuration, given)
        yield from api_keys.mistakes(given, configuration.folder)
    ids = (draft.control.gpu_ids or "").split(",")
    absent = [one for one in ids if cards is not None and one.isdecimal() and int(one) >= cards]
    if absent:
        there = f"there are {cards}, from 0" if cards else "none"
        why = f" = {','.join(ids)}: there is no card {', '.join(absent)} ({there})"
        yield draft.tell("control.gpu_ids", why)


def _gateway(configuration: Configuration, told: list[ResolvedOptions]) -> Iterator[str]:
    """What is wrong with the gateway's table."""
    gateway = configuration.gateway
    yield from api_keys.mistakes_of_gateway(configuration)
    names = [one.draft.name for one in told]
    names += [alias for one in told for alias in aliases(one)]
    folded = {name.casefold() for name in names}
    for pattern, name in gateway.models.items():
        if name.casefold() not in folded:
            key = mistakes.dotted(("models", pattern))
            why = f"is no instance and no alias{did_you_mean(name, names)}"
            yield f"{configuration.label}: gateway.{key} = {mistakes.shown(name)}: {why}"


def _clashes(configuration: Configuration, told: list[ResolvedOptions]) -> Iterator[str]:
    """Two that listen on one port, or write one log."""
    places: list[tuple[str, Address]] = [
        (one.draft.at("server.port"), address(one))
        for one in told
        if not any(addresses.mistakes(one))
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
        path = log_file(configuration, one.draft, Path("/"))
        if path in logs:
            yield f"{one.draft.at('control.log_file')}: {path.name} is written by {logs[path]}"
        logs.setdefault(path, _inside(one.draft.place))


def _remarks(
    configuration: Configuration,
    told: list[ResolvedOptions],
    environ: Mapping[str, str],
    ours: Mapping[str, Flag],
) -> Iterator[str]:
    """What is allowed and should be said."""
    for one in told:
        yield from remarks(one, ours)
    if any(one.draft.engine != LLAMA_CPP for one in told):
        yield from vllm.remarks(configuration, environ)


def remarks(given: ResolvedOptions, ours: Mapping[str, Flag]) -> Iterator[str]:
    """What is allowed in the options of one server and should be said."""
    yield from options.remarks(given, _called(given), ours)
    yield from api_keys.remarks(given, address(given))
    if given.draft.engine == LLAMA_CPP:
        yield from llama.remarks(given)


def _called(given: ResolvedOptions) -> str:
    """The program that will serve, as it is named in messages."""
    is_llama = given.draft.engine == LLAMA_CPP
    return "llama-server" if is_llama else f"vLLM {given.installed or vllm.version()}"


def _inside(place: str) -> str:
    """A place without the file's name, which has been said."""
    return place.partition(": ")[2] or place
