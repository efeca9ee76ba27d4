"""The projector (mmproj) that belongs to a multimodal GGUF, by their metadata."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from pathlib import PurePosixPath

from pipeline.core.errors import UsageError

from . import quants
from .choice import Option, label, named
from .gguf import Header, whole
from .kinds import is_projector
from .reference import NO_PROJECTOR, PROJECTOR
from .resolve import ModelFile

# An encoder loses little at 16 bits, and not every backend has BF16.
ORDER = ("F16", "BF16", "F32", "Q8_0")
DIMENSIONS = ("clip.vision.projection_dim", "clip.audio.projection_dim", "clip.projection_dim")


def fits(projector: Header, model: Header) -> bool:
    """Whether the projector's output has the width of the model's input.

    Older converters write 0 or another width as the dimension; then the tensors' widths count.
    """
    width = whole(model.values, f"{model.architecture}.embedding_length", 0)
    made = {whole(projector.values, key, 0) for key in DIMENSIONS} | {*projector.widths}
    return is_projector(projector) and width in made - {0}


def pair(
    files: Mapping[str, ModelFile],
    model: Option,
    requested: str,
    reference: str,
    read_header: Callable[[Sequence[ModelFile]], Header],
) -> tuple[ModelFile | None, str]:
    """The projector for `model` among a repository's files, and why, as the end of a sentence.

    `requested` is a file's name, `none`, or empty for the one that fits. Raises UsageError.
    """
    names = candidates(files)
    if requested == NO_PROJECTOR:
        return None, "; without its projector, as asked for" if names else ""
    if requested:
        matches = named(files, requested)
        if len(matches) != 1:
            raise UsageError(
                f"mmproj={requested}: {reference} has {len(matches) or 'no'} files of that name; "
                f"its projectors: {', '.join(names) or 'none'}",
                "pass one of them, a path, or none",
            )
        names = matches
    if not names:
        return None, ""
    header = read_header(model.files)
    for name in sorted(names, key=lambda name: rank(name, model.name)):
        projector = read_header([files[name]])
        if requested:
            require(projector, header, requested)
        if fits(projector, header):
            return files[name], f"; with the projector {name}, whose metadata fits"
    return None, f"; none of its projectors fits ({', '.join(names)}), so it gets none"


def candidates(files: Mapping[str, ModelFile]) -> list[str]:
    """The files that may be projectors, by their names."""
    return sorted(
        name
        for name in files
        if name.lower().endswith(".gguf") and PROJECTOR.search(PurePosixPath(name).name)
    )


def likely_bytes(files: Mapping[str, ModelFile], model: str, requested: str) -> int:
    """About how much the projector will take, before a header is read; 0 without one."""
    if requested == NO_PROJECTOR:
        return 0
    names = candidates(files)
    names = named(names, requested) if requested else names
    best = min(names, key=lambda name: rank(name, model), default="")
    return files[best].size if best else 0


def rank(name: str, model: str) -> tuple[int, int, int, str]:
    """Lower is better: nearer to the model by folder, then by name, then by precision."""
    folders, model_folders = PurePosixPath(name).parent.parts, PurePosixPath(model).parent.parts
    distance = len(folders) + len(model_folders) - 2 * alike(folders, model_folders)
    # without the quant: `q` of `q8_0` is no likeness to a model in `q4_k_m`
    stem = quants.LABEL.sub("", PROJECTOR.sub("", PurePosixPath(name).stem)).strip("-_.").casefold()
    shared = alike(stem, PurePosixPath(model).name.casefold())
    quant = label(name)
    return distance, -shared, ORDER.index(quant) if quant in ORDER else len(ORDER), name


def alike(first: Sequence[str], second: Sequence[str]) -> int:
    """The length of the common start of two paths or names."""
    return sum(
        1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
    )


def require(header: Header, model: Header, where: str) -> None:
    """Raise UsageError unless the projector at `where` is one for `model`."""
    if not fits(header, model):
        what = "does not fit this model" if is_projector(header) else "is not a projector"
        raise UsageError(f"mmproj={where}: {what}, by its metadata", "mmproj=none leaves it out")
