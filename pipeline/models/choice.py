"""Choose a GGUF of a repository by the names and sizes of its files alone, and always with a
reason."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import PurePosixPath

from msgspec import Struct

from pipeline.core.errors import UsageError
from pipeline.core.text import plural
from pipeline.core.text import size as shown_size

from . import quants
from .gguf import SHARD
from .reference import PROJECTOR, FileFilter
from .resolve import ModelFile, short_name

# Without quant=…: about the size of Q4_K_M, then larger ones, then smaller ones. The first that
# fits the memory wins.
PREFERENCE = (
    *("Q4_K_M", "UD-Q4_K_XL", "MXFP4_MOE", "MXFP4", "Q4_K_S", "IQ4_XS", "IQ4_NL", "Q4_K", "Q4_0"),
    *("Q5_K_M", "Q5_K_S", "Q6_K", "Q8_0", "Q3_K_M", "IQ3_M", "Q3_K_S", "Q2_K", "IQ2_M"),
)
MOST_LISTED = 60
BY_NAME = "pick one: filename=… or pattern=…"
NO_MODEL = re.compile(r"imatrix|^ggml-vocab-", re.IGNORECASE)  # unless the name has a quant too


class NoSuchQuant(UsageError):
    """A repository of GGUF files has not the requested quant."""


class Option(Struct, frozen=True, kw_only=True):
    """One model among a repository's GGUF files: its parts in order, and what its name says."""

    label: str  # the quant as its name has it, in capitals; empty where it has none
    files: tuple[ModelFile, ...]
    missing: tuple[str, ...] = ()  # parts that the repository lacks

    @property
    def name(self) -> str:
        return self.files[0].name

    @property
    def bytes(self) -> int:
        return sum(file.size for file in self.files)


def label(name: str) -> str:
    """The quant in a file's name, else in its folder's; in capitals, empty for none."""
    path = PurePosixPath(name)
    shard = SHARD.fullmatch(path.name)
    for text in (shard["stem"] if shard else path.stem, *reversed(path.parent.parts)):
        matches = [*quants.LABEL.finditer(text)]
        if matches:
            *before, last = matches
            # Q6_K-f16, with some tensors in 16 bits, is not F16, nor the plain Q6_K
            is_mixed = before and before[-1].end() == last.start() - 1
            if is_mixed and not _is_plain(before[-1]) and _is_plain(last):
                found = text[before[-1].start() : last.end()]
            else:
                found = last[0]
            match = re.sub(r"^UD_", "UD-", quants.capitals(found))
            return re.sub(r"(?<!^UD)[-.]", "_", match)
    return ""


def _is_plain(match: re.Match[str]) -> bool:
    """Whether a quant in a name is none: 16 or 32 bits."""
    return quants.capitals(match[0]) in quants.UNQUANTIZED


def stem(option: Option) -> str:
    """What the names of one model's quants share: the name without quant and marks."""
    name = short_name(PurePosixPath(option.name).name)
    return re.sub(r"[^a-z0-9]+", "-", name.casefold())


def spelling(quant: str) -> str:
    """A quant without what differs between spellings of it."""
    return re.sub(r"[^A-Z0-9]", "", quants.capitals(quant))


def options(files: Mapping[str, ModelFile]) -> list[Option]:
    """All models among the GGUF files, split ones put together; projectors are not models."""
    models: dict[tuple[str, int], dict[int, ModelFile]] = defaultdict(dict)
    for name, file in files.items():
        path = PurePosixPath(name)
        if path.suffix.lower() != ".gguf" or PROJECTOR.search(path.name):
            continue
        if NO_MODEL.search(path.name) and not quants.LABEL.search(path.name):
            continue
        match = SHARD.fullmatch(path.name)
        if match and int(match["count"]):
            stem = (path.parent / match["stem"]).as_posix()
            models[stem, int(match["count"])][int(match["number"])] = file
        else:
            models[name, 0][0] = file
    options = []
    for (stem, count), parts in models.items():
        numbers = range(1, count + 1) if count else range(1)
        present = tuple(parts[n] for n in numbers if n in parts)
        missing = tuple(f"{stem}-{n:05d}-of-{count:05d}.gguf" for n in numbers if n not in parts)
        if present:
            options.append(Option(label=label(present[0].name), files=present, missing=missing))
    return sorted(options, key=lambda option: option.name)


def listing(options: Iterable[Option]) -> str:
    """The options with their sizes, one a line."""
    lines = []
    for option in sorted(options, key=lambda option: option.bytes):
        others = len(option.files) - 1
        parts = f" and {plural(others, 'part')}" if others else ""
        if option.missing:
            parts = f" (parts missing: {len(option.missing)})"
        size = shown_size(option.bytes)
        lines.append(f"  {option.label or '?':<12} {size:>9}  {option.name}{parts}")
    hidden = len(lines) - MOST_LISTED
    return "\n".join([*lines[:MOST_LISTED], *([f"  and {hidden} more"] if hidden > 0 else [])])


def named(files: Iterable[str], name: str) -> list[str]:
    """The files whose path is `name`, else those of that name in any folder."""
    files = list(files)
    return [f for f in files if f == name] or [f for f in files if PurePosixPath(f).name == name]


def fits_pattern(name: str, pattern: str) -> bool:
    """Whether `pattern` means the file `name`, by its path in the repository or by its name, in any
    letter case."""
    path, folded = PurePosixPath(name.casefold()), pattern.casefold()
    return fnmatch(str(path), folded) or fnmatch(path.name, folded)


def narrow(options: Sequence[Option], file_filter: FileFilter, reference: str) -> list[Option]:
    """The options that `filename=` or `pattern=` match. Raises UsageError where none does."""
    if name := file_filter.filename:
        matches = named((file.name for option in options for file in option.files), name)
        matching = [o for o in options if any(file.name in matches for file in o.files)]
        criterion = f"filename={name}"
    elif file_filter.pattern:
        matching = [option for option in options if fits_pattern(option.name, file_filter.pattern)]
        criterion = f"pattern={file_filter.pattern}"
    else:
        return list(options)
    if not matching:
        raise UsageError(
            f"{reference}: no GGUF matches {criterion}; there are:\n{listing(options)}"
        )
    return matching


def by_quant(options: Sequence[Option], quant: str) -> list[Option]:
    """The options with `quant` in their name, in any spelling."""
    exact = [option for option in options if spelling(option.label) == spelling(quant)]
    alias = quants.ALIASES.get(quant.upper(), "")
    return exact or [option for option in options if alias and option.label == alias]


def choose(
    options: Sequence[Option],
    file_filter: FileFilter,
    reference: str,
    fits: Callable[[Option], bool],
) -> tuple[Option, str]:
    """The option that the request means, and why.

    `fits` tells whether an option fits this host's memory; it is called only where that decides.
    Raises UsageError that lists the options.
    """
    matching = narrow(options, file_filter, reference)
    if file_filter.quant not in ("", quants.AUTO):
        option = _with_quant(matching, file_filter, reference)
        return option, f"{option.label or 'it'} was asked for"
    if file_filter.filename or len(matching) == 1:
        is_named = file_filter.filename or file_filter.pattern
        option = only_option(matching, file_filter.filename, reference)
        return option, "it was named" if is_named else "it is the only one"
    if len({stem(option) for option in matching}) > 1:  # a draft model, another size
        raise ambiguous(matching, reference)
    complete = [option for option in matching if not option.missing] or [
        require_complete(matching[0], reference)
    ]
    if not file_filter.quant:
        order = [option for quant in PREFERENCE for option in complete if option.label == quant]
        best = next((option for option in order if fits(option)), None)
        if best:
            why = "no quant was asked for"
            if best.label != order[0].label:
                why = f"{order[0].label} does not fit the memory"
            same_label = [option for option in complete if option.label == best.label]
            option = only_option(same_label, best.label, reference)
            return option, f"{why}: the first of the order of preference that fits"
    return largest(complete, reference, fits)


def _with_quant(options: Sequence[Option], file_filter: FileFilter, reference: str) -> Option:
    """The option with the requested quant. Raises UsageError."""
    quant = file_filter.quant
    matching, hint = by_quant(options, quant), "pick one of them: quant=…"
    if quants.is_mix(quant):
        hint = "a mix is made from an unquantized model; of a repository of GGUF files, "
        hint += "pick one: quant=…"
    elif not matching and file_filter.filename and not options[0].label:
        matching = [*options]  # a name without a quant contradicts none
    elif not any(option.label for option in options):
        hint = BY_NAME
    if not matching:
        raise NoSuchQuant(
            f"{reference}: has no GGUF with the quant {quant}; there are:\n{listing(options)}", hint
        )
    return only_option(matching, quant, reference)


def largest(
    options: Sequence[Option], reference: str, fits: Callable[[Option], bool]
) -> tuple[Option, str]:
    """The best quant that fits the memory, which is the largest; else the smallest of all.

    Unquantized ones, which are slower and hardly better, only where there are no others.
    """
    if any(not option.label for option in options):
        raise ambiguous(options, reference)
    quantized = [option for option in options if option.label not in quants.UNQUANTIZED]
    by_size = sorted(quantized or options, key=lambda option: option.bytes, reverse=True)
    best = next((option for option in by_size if fits(option)), None)
    why = "the best that fits the memory" if best else "none fits the memory: the smallest there is"
    label = (best or by_size[-1]).label
    same_label = [option for option in options if option.label == label]
    return only_option(same_label, label, reference), why


def ambiguous(options: Sequence[Option], reference: str, criterion: str = "") -> UsageError:
    """The error where the request, or one criterion of it, leaves several models."""
    what = f"{len(options)} GGUF models match {criterion}" if criterion else "several models match"
    return UsageError(f"{reference}: {what}:\n{listing(options)}", BY_NAME)


def only_option(options: Sequence[Option], criterion: str, reference: str) -> Option:
    """The only option. Raises UsageError where there are several, or parts of it are missing."""
    if len(options) > 1:
        raise ambiguous(options, reference, criterion)
    return require_complete(options[0], reference)


def require_complete(option: Option, reference: str) -> Option:
    """The option, unless the repository lacks parts of it. Raises UsageError."""
    if option.missing:
        count = len(option.files) + len(option.missing)
        raise UsageError(
            f"{reference}: the repository lacks {len(option.missing)} of the {count} parts of "
            f"{option.name}: {', '.join(option.missing[:3])}",
            "ask its owner, or use another quant",
        )
    return option
