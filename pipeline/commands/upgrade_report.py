"""What another llama.cpp would change here: options, defaults, architectures, models, speed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from msgspec import Struct, field

from pipeline.core import capacity, log
from pipeline.core.errors import PipelineError
from pipeline.core.store.receipts import Entry
from pipeline.core.text import plural, table
from pipeline.models import converter, gguf, kinds, memory
from pipeline.report import bench
from pipeline.serve.config import instances, options
from pipeline.serve.config.configuration import InstanceSpec
from pipeline.serve.flags import Flag
from pipeline.serve.server import LLAMA_CPP

from . import serve, server_options, verify
from .model import Model
from .programs import Programs
from .session import Session

DEFAULT = re.compile(r"\(default:\s*'?([^'),;]*)")
SHOWN = 12  # names in a line
ROUNDS = 3
PROMPT, GENERATED = 256, 32  # tokens that are read and written to measure


class SpeedChange(Struct, frozen=True, kw_only=True):
    """Tokens per second of both, the best of some rounds each."""

    what: str
    before: float
    after: float


class Comparison(Struct, frozen=True, kw_only=True):
    """What is different. Names of options are without dashes."""

    before: str
    after: str
    refused: list[str] = field(default_factory=list)  # lines of the user's files
    gone: list[str] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)
    added: list[str] = field(default_factory=list)
    defaults: dict[str, tuple[str, str]] = field(default_factory=dict)
    architectures_lost: list[str] = field(default_factory=list)
    architectures_gained: list[str] = field(default_factory=list)
    models_loading: list[str] = field(default_factory=list)
    models_failing: dict[str, str] = field(default_factory=dict)  # and why
    made_again: list[str] = field(default_factory=list)
    speed: list[SpeedChange] = field(default_factory=list)


def compare(session: Session, before: Programs, after: Programs) -> Comparison:
    """Compare the present programs, which need not be there, with others. Raises PipelineError."""
    old, new = options_of(before), options_of(after)
    known = [converter.architectures(each.llama_cpp.folder) for each in (before, after)]
    gone, renamed = lost(old, new)
    files = models_here(session)
    log.info(f"trying {plural(len(files), 'model')} with the new programs")
    failing = {str(path): why for path in files if (why := problem(path, before, after))}
    loading = [path for path in files if str(path) not in failing]
    program = after.binaries.find("llama-bench")
    smallest = min(filter(fits, loading), key=gguf.file_bytes, default=None)
    # A model that loads need not run.
    if program and smallest and (why := bench.trial(program, smallest)):
        failing[str(smallest)] = why
        loading.remove(smallest)
    return Comparison(
        before=str(before.llama_cpp.revision),
        after=str(after.llama_cpp.revision),
        refused=list(refused(session, old, new)),
        gone=gone,
        renamed=renamed,
        added=sorted({flag.name[2:] for flag in new.values()} - old.keys()) if old else [],
        defaults=dict(moved(old, new)),
        # programs may be here whose source was removed
        architectures_lost=sorted(known[0] - known[1]) if all(known) else [],
        architectures_gained=sorted(known[1] - known[0]) if all(known) else [],
        models_loading=[str(path) for path in loading],
        models_failing=failing,
        made_again=list(made_again(session, before)),
        speed=speeds(session, before, after, loading) if session.request.bench else [],
    )


# Options


def options_of(programs: Programs) -> Mapping[str, Flag]:
    """The options of their llama-server; none where it is not there."""
    return serve.known_flags(programs) if programs.binaries.has("llama-server") else {}


def lost(old: Mapping[str, Flag], new: Mapping[str, Flag]) -> tuple[list[str], dict[str, str]]:
    """The long names that are gone, and those whose option has another name now: one with the same
    short name or the same description."""
    gone, renamed = [], {}
    fresh = {flag.name: flag for name, flag in new.items() if name not in old}
    for name, flag in old.items():
        if name in new:
            continue
        short = {each for each in flag.names if not each.startswith("--")}
        same = (
            other.name
            for other in fresh.values()
            if short & {*other.names} or (flag.help and flag.help == other.help)
        )
        if match := next(same, "") or next((n for n in flag.names if n[2:] in new), ""):
            renamed[name] = match.removeprefix("--")
        else:
            gone.append(name)
    return gone, renamed


def moved(
    old: Mapping[str, Flag], new: Mapping[str, Flag]
) -> Iterator[tuple[str, tuple[str, str]]]:
    """The options whose default is another one."""
    for name in dict.fromkeys(flag.name[2:] for flag in old.values()):
        texts = [DEFAULT.search(each[name].help) for each in (old, new) if name in each]
        before, after = (texts[0], texts[-1]) if len(texts) == 2 else (None, None)
        if before and after and before[1].strip() != after[1].strip():
            yield name, (before[1].strip(), after[1].strip())


def refused(session: Session, old: Mapping[str, Flag], new: Mapping[str, Flag]) -> Iterator[str]:
    """What the new llama-server refuses, and the present one does not, of the options that the user
    gave: in files, and on the command line."""
    for spec in specs(session):
        present = [*wrong(spec, old)] if old else []
        yield from (line for line in wrong(spec, new) if line not in present)


def specs(session: Session) -> list[InstanceSpec]:
    """The servers that the user's files and command line ask for, and that run our programs."""
    listed = []
    servers = session.servers
    if servers and servers.own:
        log.info(f"{servers.configuration.label} uses {servers.own}, which stays as it is")
    elif servers:
        listed = [spec for spec in servers.configuration.enabled if spec.engine == LLAMA_CPP]
    typed = session.request.server
    return [*listed, *([server_options.spec(session.request)] if typed else [])]


def wrong(spec: InstanceSpec, known: Mapping[str, Flag]) -> Iterator[str]:
    """What a llama-server with these options would refuse."""
    yield from options.errors(instances.resolve(spec, known))
    for word in spec.extra_args:
        name = options.normalized(word.partition("=")[0])
        if name.startswith("--") and name[2:] not in known:
            yield spec.line("extra_args", f": llama-server has no {name}")


# Models


def models_here(session: Session) -> list[Path]:
    """The GGUF models that were made here or that the user's files name, by their first parts."""
    own = session.request.reference
    named = [own.path] if own and own.path and own.kind == "gguf" else []
    named += [
        session.servers.configuration.path(str(spec.server["model"]))
        for spec in specs(session)
        if session.servers and "model" in spec.server
    ]
    paths = dict.fromkeys([*made_here(session), *named])
    return [path for path in paths if path.is_file() and is_model(path)]


def made_here(session: Session) -> dict[Path, Entry | None]:
    """Every GGUF that was made or downloaded here, with its receipt."""
    whole = Model(session.request.replace(reference=None), session.programs)
    return {path: entry for path, entry in verify.artifacts(whole) if path.suffix == ".gguf"}


def fits(path: Path) -> bool:
    """Whether it leaves half of the free memory to others."""
    return gguf.file_bytes(path) <= capacity.memory() // 2


def is_model(path: Path) -> bool:
    """Whether it is the first file of a model, and no projector, adapter or matrix; what cannot be
    read counts, so that it is reported."""
    part = gguf.SHARD.fullmatch(path.name)
    if part and int(part["number"]) != 1:
        return False
    try:
        header = gguf.read(path)
    except PipelineError:
        return True
    return not ({str(header.values.get("general.type")), header.architecture} & kinds.KINDS.keys())


def problem(path: Path, before: Programs, after: Programs) -> str:
    """Why the new programs cannot load a model; empty where they can, as far as that is known."""
    try:
        gguf.read(path)
        present, new = (each.binaries.find("llama-fit-params") for each in (before, after))
        why = memory.refusal(new, path) if new else ""
        if why and present and memory.refusal(present, path):
            why += " (nor can the present ones)"
        return why
    except PipelineError as error:
        return error.message


def made_again(session: Session, before: Programs) -> Iterator[str]:
    """The models whose receipts name the present llama.cpp: they are made again on next use."""
    for path, entry in made_here(session).items():
        if entry and before.llama_cpp.commit in json.dumps(entry.recipe):
            yield str(path)


# Speed


def speeds(
    session: Session, before: Programs, after: Programs, loading: list[Path]
) -> list[SpeedChange]:
    """The speed of both with the requested model, else the largest of half the free memory."""
    pair = [each.binaries.find("llama-bench") for each in (before, after)]
    if None in pair:
        log.info("bench=1: one of the two has no llama-bench")
        return []
    chain = session.model.chain() if session.request.reference else None
    path = max(filter(fits, loading), key=gguf.file_bytes, default=None)
    if chain and chain.final.is_file():
        path = chain.final
    if path is None:
        log.info("bench=1: there is no model to measure with; make one first")
        return []
    log.info(f"measuring with {path.name}, {ROUNDS} rounds each")
    rounds: list[list[bench.Samples]] = [[], []]
    for _ in range(ROUNDS):  # in turns, since a machine is never quite at rest
        for results, program in zip(rounds, filter(None, pair), strict=True):
            results.append(
                bench.samples(program, path, prompt=PROMPT, generated=GENERATED, repetitions=1)
            )
    old, new = (
        {"reading": max(each.prompt[0] for each in results)}
        | ({"writing": max(each.decode[0] for each in results)} if results[0].decode else {})
        for results in rounds
    )
    return [
        SpeedChange(what=f"{path.name}, {what}", before=old[what], after=new[what]) for what in old
    ]


# As text


def text(comparison: Comparison) -> str:
    """As people read it."""
    c = comparison
    rows = [
        ["llama.cpp", f"{c.before} -> {c.after}"],
        *(["refused", line] for line in c.refused),
        ["options gone", listed([f"--{name}" for name in c.gone])],
        ["renamed", listed([f"--{old} -> --{new}" for old, new in c.renamed.items()])],
        ["new", listed([f"--{name}" for name in c.added])],
        ["defaults", listed([f"--{n} {a} -> {b}" for n, (a, b) in c.defaults.items()])],
        ["converter lost", listed(c.architectures_lost)],
        ["converter gained", listed(c.architectures_gained)],
        ["models that load", str(len(c.models_loading))],
        *(["does not load", f"{path}: {why}"] for path, why in c.models_failing.items()),
        *(["made again on use", path] for path in c.made_again),
    ]
    for speed in c.speed:
        change = 100 * (speed.after / speed.before - 1) if speed.before else 0.0
        numbers = f"{speed.before:.1f} -> {speed.after:.1f} tokens/s ({change:+.0f} %)"
        rows.append([speed.what, numbers])
    return table(rows)


def listed(names: list[str]) -> str:
    """The first of them, and how many more there are."""
    more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more or "none"
