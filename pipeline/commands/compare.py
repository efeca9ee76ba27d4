"""`compare`: the quants of a model side by side, on one page with pictures.

What is measured is kept, the quality by `quality` and the speeds here, so that a second run draws
the same page at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from shlex import quote

import msgspec

from pipeline.bins.build_options import AUTO
from pipeline.bins.hardware import nvidia
from pipeline.core import capacity
from pipeline.core.errors import UsageError, doitw
from pipeline.core.paths import absolute, require_writable
from pipeline.core.store.publish import disk_errors, publish_beside
from pipeline.core.text import table
from pipeline.models import gguf, memory, quants
from pipeline.models.memory import Memory
from pipeline.report import comparison
from pipeline.report.candidates import Candidate, MemoryUse
from pipeline.report.comparison import QuantReport
from pipeline.report.figures import Quality, Speed

from . import compare_speed, doctor, estimate, make, quality
from .model import Model
from .session import Session
from .variables import QUALITY, SPEED

HOME = "$LLAMA_PIPELINE_HOME"  # as `doctor.hider` writes it
CPU = "cpu"  # the backend that uses no cards
NO_QUALITY = "The quality is not measured"
NO_SPEED = "The speed is not measured"
ESTIMATED = "The memory is estimated by a formula: these programs have no llama-fit-params."


def compare(session: Session) -> None:
    """Measure what is not known yet, write the page and its pictures, and print the figures: as a
    table, or as JSON. Raises PipelineError."""
    # force=1 is for the speed: the quants are as good as they were
    model = Model(session.request.replace(force=False), session.programs)
    names, folder = requested(model), place(model)
    require_ours(folder)
    report = measured(model, names, again=session.request.force)
    made = comparison.files(report)
    write(folder, made)
    if session.request.json:
        document = {"files": [str(folder / name) for name in made], "report": report}
        print(msgspec.json.format(msgspec.json.encode(document), indent=1).decode())
        return
    heads, rows = comparison.table(report)
    print(table([heads, *rows]))
    print(*("", *report.notes, folder / comparison.PAGE), sep="\n")


def requested(model: Model) -> tuple[str, ...]:
    """The quants to compare; of a quantized `.gguf` itself alone. Raises UsageError."""
    resolved = model.require_resolved()
    if not is_final(model):
        return quality.available(model, quality.requested(model))
    if model.request.quants:
        raise UsageError(
            f"quants=: {resolved.name} is {resolved.precision or 'of unknown type'} already",
            "leave quants= out, or pass the model that it was made from",
        )
    return (resolved.precision or resolved.name,)


def is_final(model: Model) -> bool:
    """Whether the model is a GGUF of the user's own that no other quant is made of."""
    resolved = model.require_resolved()
    is_own = resolved.kind == "gguf" and resolved.source["type"] != "hf"
    return is_own and resolved.precision not in quants.UNQUANTIZED


def measured(model: Model, names: Sequence[str], *, again: bool = False) -> QuantReport:
    """All figures of these quants, each made or downloaded where it is not there. `again`: speeds
    that are kept do not count. Raises PipelineError."""
    request, notes = model.request, list[str]()
    qualities: Mapping[str, Quality] = {}
    if QUALITY not in request.measure:
        notes.append(f"{NO_QUALITY}: measure= leaves it out.")
    elif is_final(model):
        notes.append(f"{NO_QUALITY}: there is no unquantized model to compare this file with.")
    else:
        try:
            qualities = qualities_of(model, names)
        except quality.NoReference as error:
            notes.append(f"{NO_QUALITY}: {error.message}.")
    models = prepared(model, names)
    files = {name: each.require_chain().final for name, each in models.items()}
    speeds: Mapping[str, Speed] = {}
    if SPEED in request.measure:
        speeds, problems = compare_speed.speeds(model, files, again=again)
        notes += [f"{NO_SPEED}: {problem}." for problem in problems]
    else:
        notes.append(f"{NO_SPEED}: measure= leaves it out.")
    ctx_size, room = context(model, files), memory_room(model)
    hide = doctor.hider(model.home.root)
    rows = []
    for name, each in models.items():
        needed = estimate.of_made(each, files[name]).at(ctx_size)
        if needed and needed.estimate and ESTIMATED not in notes:
            notes.append(ESTIMATED)
        rows.append(
            Candidate(
                quant=name,
                bytes=gguf.file_bytes(files[name]),
                quality=qualities.get(name),
                speed=speeds.get(name),
                memory=use_of(needed, room) if needed else None,
            )
        )
    return QuantReport(
        model=hide(model.require_resolved().name),
        ctx_size=ctx_size,
        room=room,
        candidates=tuple(sorted(rows, key=lambda row: (row.bytes, row.quant))),
        machine=tuple((title, hide(text)) for title, text in compare_speed.machine(model)),
        commands=tuple(commands(model, files, hide)),
        notes=tuple(map(hide, notes)),
    )


def use_of(needed: Memory, room: int) -> MemoryUse:
    return MemoryUse(
        weights=needed.weights,
        cache=needed.context,
        compute=needed.compute,
        fits=needed.total + memory.MARGIN <= room,
    )


def qualities_of(model: Model, names: Sequence[str]) -> dict[str, Quality]:
    """The quality by quant. Raises PipelineError."""
    # Of `quality` ctx_size= are the tokens of a chunk, here those that a server has room for.
    plain = Model(model.request.replace(ctx_size=None), model.programs)
    plain.resolved = model.resolved
    return {each.quant: each for each in quality.reported(plain, names).qualities}


def prepared(model: Model, names: Sequence[str]) -> dict[str, Model]:
    """The model in each of these quants, whose GGUF is there. Raises PipelineError."""
    if is_final(model):
        if not model.is_done("fetch"):
            make.fetch(model)
        return dict.fromkeys(names, model)
    models = {name: quality.with_quant(model, name) for name in names}
    if quality.is_of_repository(model):
        for each in models.values():
            quality.fetch(each)
    elif not all(each.is_done("convert") and each.is_done("quantize") for each in models.values()):
        with quality.unquantized(model, models.values()):
            for each in models.values():
                make.convert_or_quantize(each)
    return models


def context(model: Model, files: Mapping[str, Path]) -> int:
    """The context in tokens at which memory is compared: the requested one, else the smallest that
    a model is served with."""
    first = next(iter(files.values()))
    trained = estimate.of_made(model, first).trained or memory.SMALLEST_CONTEXT
    return model.request.ctx_size or min(trained, memory.SMALLEST_CONTEXT)


def memory_room(model: Model) -> int:
    """The memory in bytes that a model may have on this machine: that of its cards, where the
    programs use them, else main memory."""
    cards = [] if model.programs.backend == CPU else nvidia.find()
    return sum(card.total for card in cards) or capacity.total()


def commands(model: Model, files: Mapping[str, Path], hide: Callable[[str], str]) -> list[str]:
    """The commands that measure the same again, as they can be typed; `hide` removes from a word
    what identifies the machine."""
    request, resolved = model.request, model.require_resolved()
    is_of_hub = resolved.source["type"] == "hf" and not resolved.local
    words = quality.named(model, str(resolved.source["revision"]) if is_of_hub else "")
    if not is_final(model):
        words.append(f"quants={','.join(files).lower()}")
    words += [f"text={request.sample_text}"] if request.sample_text else []
    words += [f"chunks={request.chunks}"] if QUALITY in request.measure else []
    words += [f"measure={','.join(request.measure)}"] if len({*request.measure}) == 1 else []
    given = (("backend", request.bins.backend), ("device", request.device))
    numbers = ((name, getattr(request, name)) for name in ("ctx_size", "threads", "gpu_layers"))
    words += [f"{name}={value}" for name, value in (*given, *numbers) if value not in (None, AUTO)]
    lines = [doitw(typed(["compare", *words], hide))]
    if SPEED in request.measure:
        lines += [typed(compare_speed.command(model, path), hide) for path in files.values()]
    return lines


def typed(words: Sequence[str], hide: Callable[[str], str]) -> str:
    """Words as they are typed into a shell, which puts in the homes."""

    def quoted(part: str) -> str:
        home, rest = ("~/", part[2:]) if part.startswith("~/") else ("", part)
        return home + (rest and quote(rest))

    parts = (hide(word).split(HOME) for word in words)
    return " ".join(f'"{HOME}"'.join(map(quoted, each)) for each in parts)


# The files


def place(model: Model) -> Path:
    """The folder of the page: `out=`, or one in the home."""
    out = model.request.out
    return absolute(out) if out else model.home.root / "reports" / model.require_resolved().slug


def require_ours(folder: Path) -> None:
    """Raise UsageError where a file stands in the folder that this command has not written, and
    would replace; PipelineError where nothing can be written there."""
    there = next(each for each in (folder, *folder.parents) if os.path.lexists(each))
    if there.exists() and not there.is_dir():
        raise UsageError(f"out={folder}: {there} is a file", "name a folder")
    require_writable(there, "out=")
    for name in comparison.NAMES:
        file = folder / name
        if file.exists() and not (
            file.is_file() and comparison.MARK in file.read_text("utf-8", "replace")
        ):
            raise UsageError(
                f"{file}: was not written by compare, and would be replaced",
                "move it away, or name another folder: out=PATH",
            )


def write(folder: Path, files: Mapping[str, str]) -> None:
    """Write the files that differ, the page last, and remove a picture of an earlier run that has
    no figures any more. Raises PipelineError."""
    with disk_errors(folder, "out="):
        folder.mkdir(parents=True, exist_ok=True)
        for name in comparison.NAMES:
            file, data = folder / name, files.get(name, "").encode()
            if not data:
                file.unlink(missing_ok=True)
            elif not (file.is_file() and file.read_bytes() == data):
                publish_beside(file, data)
