"""The projector (mmproj) that belongs to a multimodal GGUF, told by metadata."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from pathlib import PurePosixPath

from pipeline.core.errors import UsageError

from . import quants
from .choice import PROJECTOR, Option, label
from .gguf import Header, whole
from .resolve import ModelFile

# An encoder loses little at 16 bits, and not every backend has BF16.
ORDER = ("F16", "BF16", "F32", "Q8_0")
DIMENSIONS = ("clip.vision.projection_dim", "clip.audio.projection_dim", "clip.projection_dim")
NONE = "none"


def is_projector(header: Header) -> bool:
    """Whether a GGUF is a projector, by its own word."""
    kind = header.values.get("general.type")
    return header.architecture == "clip" or kind in ("mmproj", "clip-vision")


def fits(projector: Header, model: Header) -> bool:
    """Whether what the projector makes has the width that the model takes.

    Older converters write 0 or another width as the dimension; the tensors themselves tell then.
    """
    width = whole(model.values, f"{model.architecture}.embedding_length", 0)
    made = {whole(projector.values, key, 0) for key in DIMENSIONS} | {*projector.widths}
    return is_projector(projector) and width in made - {0}


def pair(
    files: Mapping[str, ModelFile],
    model: Option,
    asked: str,
    reference: str,
    read_header: Callable[[Sequence[ModelFile]], Header],
) -> tuple[ModelFile | None, str]:
    """The projector for `model` among a repository's files, and why, as the end of a sentence.

    `asked` is a file's name, `none`, or empty: the one that fits. Raises UsageError.
    """
    found = candidates(files)
    if asked == NONE:
        return None, "; without its projector, as asked for" if found else ""
    if asked:
        named = [n for n in files if n == asked] or [
            n for n in files if PurePosixPath(n).name == asked
        ]
        if len(named) != 1:
            raise UsageError(
                f"mmproj={asked}: {reference} has {len(named) or 'no'} files of that name; its "
                f"projectors: {', '.join(found) or 'none'}",
                "give one of them, a path, or none",
            )
        found = named
    if not found:
        return None, ""
    header = read_header(model.files)
    for name in sorted(found, key=lambda name: rank(name, model.name)):
        its = read_header([files[name]])
        if asked:
            require(its, header, asked)
        if fits(its, header):
            return files[name], f"; with the projector {name}, whose metadata fits"
    return None, f"; none of its projectors fits ({', '.join(found)}), so it gets none"


def candidates(files: Mapping[str, ModelFile]) -> list[str]:
    """What may be projectors, by their names."""
    return sorted(
        name
        for name in files
        if name.lower().endswith(".gguf") and PROJECTOR.search(PurePosixPath(name).name)
    )


def likely_bytes(files: Mapping[str, ModelFile], model: str, asked: str) -> int:
    """About how much the projector will take, before any header was read; 0 without one."""
    if asked == NONE:
        return 0
    named = [name for name in candidates(files) if asked in ("", name, PurePosixPath(name).name)]
    best = min(named, key=lambda name: rank(name, model), default="")
    return files[best].size if best else 0


def rank(name: str, model: str) -> tuple[int, int, int, str]:
    """Lower is better: nearer to the model by folder, then by name, then by precision."""
    own, its = PurePosixPath(name).parent.parts, PurePosixPath(model).parent.parts
    far = len(own) + len(its) - 2 * alike(own, its)
    # without the quant: `q` of `q8_0` is no likeness to a model in `q4_k_m`
    stem = quants.LABEL.sub("", PROJECTOR.sub("", PurePosixPath(name).stem)).strip("-_.").casefold()
    shared = alike(stem, PurePosixPath(model).name.casefold())
    quant = label(name)
    return far, -shared, ORDER.index(quant) if quant in ORDER else len(ORDER), name


def alike(one: Sequence[str], other: Sequence[str]) -> int:
    """How many folders, or letters, two begin with in common."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def require(header: Header, model: Header, where: str) -> None:
    """Raise UsageError unless the projector at `where` is one for `model`."""
    if not fits(header, model):
        what = "does not fit this model" if is_projector(header) else "is no projector"
        raise UsageError(f"mmproj={where}: {what}, by its metadata", "mmproj=none leaves it out")
