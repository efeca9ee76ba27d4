"""Which GGUF of a repository is meant: a pure choice, by what the files are called and how large
they are, and always with its reason."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import PurePosixPath

from pipeline.core.errors import UsageError
from pipeline.core.text import plural
from pipeline.core.text import size as shown_size

from . import quants
from .gguf import SHARD
from .resolve import ModelFile

# What is taken where nobody asked for a quant: about the size of Q4_K_M, then upwards, then what
# is smaller. The first that fits the memory wins.
PREFERENCE = (
    *("Q4_K_M", "UD-Q4_K_XL", "MXFP4_MOE", "MXFP4", "Q4_K_S", "IQ4_XS", "IQ4_NL", "Q4_K", "Q4_0"),
    *("Q5_K_M", "Q5_K_S", "Q6_K", "Q8_0", "Q3_K_M", "IQ3_M", "Q3_K_S", "Q2_K", "IQ2_M"),
)
PROJECTOR = re.compile(r"mmproj|projector", re.IGNORECASE)  # by name; metadata has the last word
MOST_LISTED = 60
MARKS = ("", "i1", "imat", "imatrix", "gguf")
NO_MODEL = re.compile(r"imatrix|^ggml-vocab-", re.IGNORECASE)  # unless the name tells a quant too


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
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


@dataclass(frozen=True, slots=True, kw_only=True)
class FileFilter:
    """What was asked for of a repository; empty means nothing was said."""

    quant: str = ""
    filename: str = ""
    pattern: str = ""
    mmproj: str = ""


def label(name: str) -> str:
    """The quant that a file's name tells, else its folder's; in capitals, empty for none."""
    path = PurePosixPath(name)
    shard = SHARD.fullmatch(path.name)
    for text in (shard["stem"] if shard else path.stem, *reversed(path.parent.parts)):
        found = quants.LABEL.findall(text)
        if found:
            word = found[-1].upper().replace("FP16", "F16").replace("FP32", "F32")
            return str(re.sub(r"^UD_", "UD-", word))
    return ""


def stem(option: Option) -> str:
    """What the names of one model's quants share: the name without the quant and marks of it."""
    path = PurePosixPath(option.name)
    shard = SHARD.fullmatch(path.name)
    text = quants.LABEL.sub("", shard["stem"] if shard else path.stem).casefold()
    return "-".join(word for word in re.split(r"[^a-z0-9]+", text) if word not in MARKS)


def spelling(quant: str) -> str:
    """What two spellings of one quant share."""
    word = re.sub(r"[^A-Z0-9]", "", quant.upper())
    return {"FP16": "F16", "FP32": "F32"}.get(word, word)


def options(files: Mapping[str, ModelFile]) -> list[Option]:
    """All models among the GGUF files, parts put together; projectors are none."""
    split: dict[tuple[str, int], dict[int, ModelFile]] = defaultdict(dict)
    whole = []
    for name, file in sorted(files.items()):
        path = PurePosixPath(name)
        if path.suffix.lower() != ".gguf" or PROJECTOR.search(path.name):
            continue
        if NO_MODEL.search(path.name) and not quants.LABEL.search(path.name):
            continue
        part = SHARD.fullmatch(path.name)
        if part and int(part["count"]):
            stem = (path.parent / part["stem"]).as_posix()
            split[stem, int(part["count"])][int(part["number"])] = file
        else:
            whole.append(Option(label=label(name), files=(file,)))
    for (stem, count), parts in split.items():
        wanted = range(1, count + 1)
        present = tuple(parts[n] for n in wanted if n in parts)
        if present:
            lacking = tuple(f"{stem}-{n:05d}-of-{count:05d}.gguf" for n in wanted if n not in parts)
            whole.append(Option(label=label(present[0].name), files=present, missing=lacking))
    return sorted(whole, key=lambda option: option.name)


def listing(found: Iterable[Option]) -> str:
    """The options with their sizes, one a line."""
    rows = [
        (option.label or "?", shown_size(option.bytes), f"{option.name}{parts(option)}")
        for option in sorted(found, key=lambda option: option.bytes)
    ]
    lines = [f"  {quant:<12} {size:>9}  {name}" for quant, size, name in rows]
    more = len(lines) - MOST_LISTED
    return "\n".join([*lines[:MOST_LISTED], *([f"  and {more} more"] if more > 0 else [])])


def parts(option: Option) -> str:
    """What a list says of a split model's parts."""
    if option.missing:
        return f" (parts missing: {len(option.missing)})"
    more = len(option.files) - 1
    return f" and {plural(more, 'part')}" if more else ""


def narrow(found: Sequence[Option], wish: FileFilter, asked: str) -> list[Option]:
    """The options that `filename=` or `pattern=` leave. Raises UsageError where that is none."""
    if wish.filename:
        named = [o for o in found if wish.filename in (file.name for file in o.files)] or [
            o for o in found if wish.filename in (PurePosixPath(f.name).name for f in o.files)
        ]
        what = f"filename={wish.filename}"
    elif wish.pattern:
        folded = wish.pattern.casefold()
        named = [
            o
            for o in found
            if fnmatch(o.name.casefold(), folded)
            or fnmatch(PurePosixPath(o.name).name.casefold(), folded)
        ]
        what = f"pattern={wish.pattern}"
    else:
        return list(found)
    if not named:
        raise UsageError(f"{asked}: no GGUF matches {what}; there are:\n{listing(found)}")
    return named


def by_quant(found: Sequence[Option], quant: str) -> list[Option]:
    """The options whose name tells `quant`, in any spelling."""
    exact = [option for option in found if spelling(option.label) == spelling(quant)]
    alias = quants.ALIASES.get(quant.upper(), "")
    return exact or [option for option in found if alias and option.label == alias]


def choose(
    found: Sequence[Option], wish: FileFilter, asked: str, fits: Callable[[Option], bool]
) -> tuple[Option, str]:
    """The one option that is meant, and why.

    `fits` tells whether an option would fit this host's memory; it is asked only where somebody
    has to decide. Raises UsageError that lists what there is.
    """
    left = narrow(found, wish, asked)
    if wish.quant not in ("", quants.AUTO):
        named = by_quant(left, wish.quant)
        if not named and wish.filename and not left[0].label:
            named = left  # a name that tells no quant contradicts none
        if not named:
            raise UsageError(
                f"{asked}: has no GGUF with the quant {wish.quant}; there are:\n{listing(left)}",
                "name one of them: quant=…",
            )
        option = whole(one(named, wish.quant, asked), asked)
        return option, f"{option.label or 'it'} was asked for"
    if wish.filename or len(left) == 1:
        why = "it was named" if wish.filename or wish.pattern else "it is the only one"
        return whole(one(left, wish.filename, asked), asked), why
    if len({stem(option) for option in left}) > 1:  # a draft model, another size
        raise UsageError(
            f"{asked}: which one? There are:\n{listing(left)}", "name it: filename=… or pattern=…"
        )
    ready = [option for option in left if not option.missing] or [whole(left[0], asked)]
    if not wish.quant:
        order = [option for quant in PREFERENCE for option in ready if option.label == quant]
        for option in order:
            if fits(option):
                what = "no quant was asked for"
                if option.label != order[0].label:
                    what = f"{order[0].label} does not fit the memory"
                one([o for o in ready if o.label == option.label], option.label, asked)
                return whole(
                    option, asked
                ), f"{what}: the first of the order of preference that fits"
    return largest(ready, asked, fits)


def largest(
    found: Sequence[Option], asked: str, fits: Callable[[Option], bool]
) -> tuple[Option, str]:
    """The best quant that fits the memory, which is the largest; else the smallest there is.

    Unquantized ones, which are slower and hardly better, only where there is nothing else.
    """
    if any(not option.label for option in found):
        raise UsageError(
            f"{asked}: which one? There are:\n{listing(found)}", "name it: filename=… or pattern=…"
        )
    quantized = [option for option in found if option.label not in quants.UNQUANTIZED]
    by_size = sorted(quantized or found, key=lambda option: option.bytes, reverse=True)
    best = next((option for option in by_size if fits(option)), None)
    why = "the best that fits the memory" if best else "none fits the memory: the smallest there is"
    best = best or by_size[-1]
    return whole(one([o for o in found if o.label == best.label], best.label, asked), asked), why


def one(found: Sequence[Option], what: str, asked: str) -> Option:
    """The only option. Raises UsageError where there are several."""
    if len(found) > 1:
        raise UsageError(
            f"{asked}: {len(found)} GGUF models match {what}:\n{listing(found)}",
            "name one: filename=… or pattern=…",
        )
    return found[0]


def whole(option: Option, asked: str) -> Option:
    """The option, unless the repository lacks parts of it. Raises UsageError."""
    if option.missing:
        count = len(option.files) + len(option.missing)
        raise UsageError(
            f"{asked}: the repository lacks {len(option.missing)} of the {count} parts of "
            f"{option.name}: {', '.join(option.missing[:3])}",
            "ask its owner, or take another quant",
        )
    return option
