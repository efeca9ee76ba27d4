"""Everything that is wrong with a configuration, found before any work."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from pipeline.serve.flags import Flag
from pipeline.serve.instance import LLAMA_CPP

from . import api_keys, llama, mistakes, options, vllm
from .addresses import Address, address
from .configuration import Configuration
from .instances import given, log_file, program
from .options import Given

HINT = "docs/instances.md lists the keys; options that --help does not list go into extra_args"


def check(
    configuration: Configuration,
    *,
    server: Path | None,
    flags: Mapping[str, Flag] | None,
    environ: Mapping[str, str],
    cards: int | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> None:
    """Find every mistake, those of a patient `load` among them, before a model is prepared.

    `server` is the llama-server where the file names none, `flags` its options where they are
    known, `cards` how many cards are there, None where that is not known. `note` gets what is
    allowed and should be said. Raises UsageError that names every mistake.
    """
    wrong = [*configuration.mistakes]
    told = [given(draft, flags) for draft in configuration.enabled]
    engines = {one.draft.engine for one in told}
    if LLAMA_CPP in engines:
        wrong += _program(configuration, program(configuration, server))
    for one in told:
        wrong += _mistakes(configuration, one, cards)
    wrong += _clashes(configuration, told)
    mistakes.require_none(wrong, HINT)
    for remark in (*configuration.notes, *_remarks(configuration, told, environ)):
        note(remark)


def _program(configuration: Configuration, found: Path | None) -> Iterator[str]:
    """What is wrong with the llama-server."""
    named = configuration.master.llama_cpp_path
    place = f"{configuration.label}: master.llama_cpp_path"
    if found is None:
        yield f"{place}: there is no llama-server; name one, or run doit build_bins"
    elif named and found.is_dir():
        yield f"{place} = {named}: {found} is a folder; name the llama-server in it"
    elif named and not found.is_file():
        yield f"{place} = {named}: {found} is no file"
    elif named and not os.access(found, os.X_OK):
        yield f"{place} = {named}: {found} may not be executed"


def _mistakes(configuration: Configuration, given: Given, cards: int | None) -> Iterator[str]:
    """What is wrong with one instance."""
    draft = given.draft
    at = address(given)
    if at.wrong:
        yield f"{draft.at('server.port')}{at.wrong}"
    if draft.engine == LLAMA_CPP:
        yield from options.mistakes(draft, given.flags, "llama-server")
        yield from llama.mistakes(given, configuration.folder)
    else:
        yield from options.mistakes(draft, given.flags, f"vLLM {vllm.version()}")
        yield from vllm.mistakes(configuration, given)
    yield from api_keys.mistakes(given, configuration.folder)
    ids = (draft.control.gpu_ids or "").split(",")
    absent = [one for one in ids if cards is not None and one.isdecimal() and int(one) >= cards]
    if absent:
        place, there = (
            draft.at("control.gpu_ids"),
            f"there are {cards}, from 0" if cards else "none",
        )
        yield f"{place} = {','.join(ids)}: there is no card {', '.join(absent)} ({there})"


def _clashes(configuration: Configuration, told: list[Given]) -> Iterator[str]:
    """Two that listen on one port, or write one log."""
    places: list[tuple[str, Address]] = [
        (one.draft.at("server.port"), at) for one in told if not (at := address(one)).wrong
    ]
    gateway = configuration.gateway
    if gateway.enable:
        place = f"{configuration.label}: gateway.port"
        places.append((place, Address(gateway.host, gateway.port)))
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
    configuration: Configuration, told: list[Given], environ: Mapping[str, str]
) -> Iterator[str]:
    """What is allowed and should be said."""
    for one in told:
        yield from options.remarks(one.draft, one.flags)
        yield from api_keys.remarks(one, address(one))
        if one.draft.engine == LLAMA_CPP:
            yield from llama.remarks(one)
    if any(one.draft.engine != LLAMA_CPP for one in told):
        yield from vllm.remarks(configuration, environ)


def _inside(place: str) -> str:
    """A place without the file's name, which has been said."""
    return place.partition(": ")[2] or place
