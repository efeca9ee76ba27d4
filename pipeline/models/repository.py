"""The files that a request means in a repository: a GGUF with its parts and its projector, or
safetensors with what the converter reads beside them. The network is used only by the functions
passed in."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from fnmatch import fnmatch
from typing import Any, Literal

from msgspec.structs import replace

from pipeline.core.errors import PipelineError, UsageError
from pipeline.core.paths import Home, is_windows_device

from . import checkpoint, choice, contents, quants
from .gguf import Header
from .hub import Listing
from .projector import pair
from .reference import NO_PROJECTOR, FileFilter
from .resolve import ModelFile, Resolved, short_name, side_patterns, slug
from .safetensors import Head, own_precision

OTHER = "use another revision=…, or another repository"
HIDDEN = re.compile(r"(?:^|/)\.[^./]")  # not `..`, which is refused
SHA256, SHA1 = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")

Read = Callable[[ModelFile], bytes]
ReadHeader = Callable[[Sequence[ModelFile]], Header]
ReadHead = Callable[[ModelFile], Head]


def resolve(
    listing: Listing,
    file_filter: FileFilter,
    reference: str,
    home: Home,
    *,
    fits: Callable[[choice.Option], bool],
    read: Read,
    read_header: ReadHeader,
    read_head: ReadHead,
) -> Resolved:
    """The files that the request means, and why. Raises PipelineError; UsageError lists the
    files."""
    source = {"type": "hf", "ref": listing.repo, "revision": listing.commit}
    options = choice.options(listing.files)
    safetensors = [n for n in listing.files if fnmatch(n, "*.safetensors") and "/" not in n]
    if takes_gguf(options, safetensors, file_filter):
        option, why = choice.choose(options, file_filter, reference, fits)
        files = list(option.files)
        projector, projector_why = pair(
            listing.files, option, file_filter.mmproj, reference, read_header
        )
        files += [projector] if projector else []
        return of_files(
            source,
            "gguf",
            files,
            home,
            precision=option.label,
            mmproj=projector.name if projector else "",
            why=f"{option.label or option.name}: {why}{projector_why}",
        )
    if all(HIDDEN.search(n) or n.lower().endswith((".md", ".txt")) for n in listing.files):
        raise PipelineError(f"{listing.repo}: is empty at {listing.commit[:12]}", OTHER)

    def read_json(name: str) -> bytes:
        file = listing.files[name]
        contents.require_small(f"{listing.repo}: {name}", file.size, checkpoint.MAX_DOCUMENT)
        return read(file)

    model = checkpoint.check(
        listing.repo,
        {name: file.size for name, file in listing.files.items()},
        read_json,
        lambda names: [read_head(listing.files[names[0]])],  # the first part stands for all
    )
    if file_filter.filename or file_filter.pattern:
        raise UsageError(
            f"{reference}: filename and pattern choose a GGUF, and the repository has none",
            "leave it out",
        )
    if file_filter.mmproj not in ("", NO_PROJECTOR):
        raise UsageError(
            f"{reference}: mmproj={file_filter.mmproj}: not used: the model is converted from "
            "safetensors, and only with a GGUF a projector of the repository is used",
            "pass the path of a projector",
        )
    return of_files(
        source,
        "safetensors",
        [listing.files[name] for name in sorted({*model.weights, *side_files(listing.files)})],
        home,
        precision=own_precision(Counter(listing.parameters) or model.dtypes),
        architecture=model.architecture,
        encoder=model.encoder,
        why=f"it has no GGUF with {file_filter.quant}: converted from safetensors"
        if options
        else "",
    )


def side_files(names: Collection[str]) -> list[str]:
    """What the converter reads beside the weights, among the `names` of a repository's files."""
    patterns = side_patterns(names)
    return [
        name
        for name in names
        if not HIDDEN.search(name) and any(matches(name, pattern) for pattern in patterns)
    ]


def matches(name: str, pattern: str) -> bool:
    """Whether a glob matches, folder by folder."""
    parts, patterns = name.split("/"), pattern.split("/")
    return len(parts) == len(patterns) and all(map(fnmatch, parts, patterns))


def takes_gguf(
    options: Sequence[choice.Option], safetensors: Sequence[str], file_filter: FileFilter
) -> bool:
    """Whether to take a GGUF: beside safetensors only one with the requested quant."""
    if not (options and safetensors):
        return bool(options)
    quant = file_filter.quant
    if file_filter.filename or file_filter.pattern or quant in ("", quants.AUTO):
        return True
    is_made = quants.canonical(quant) in quants.TYPES or quants.is_mix(quant)
    return not is_made or bool(choice.by_quant(options, quant))


def of_files(
    source: Mapping[str, Any],
    kind: Literal["gguf", "safetensors"],
    files: Sequence[ModelFile],
    home: Home,
    *,
    precision: str,
    mmproj: str = "",
    **details: str,
) -> Resolved:
    """The model of these files of a commit; `details` are further fields of it. Raises
    PipelineError where a file is not safe."""
    repo, commit = str(source["ref"]), str(source["revision"])
    require_safe([file.name for file in files], repo)
    for file in files:
        if not (SHA256.fullmatch(file.sha256) or (SHA1.fullmatch(file.blob) and not file.sha256)):
            raise PipelineError(
                f"{repo}: {file.name} has no hash, so it could not be checked", OTHER
            )
        if type(file.size) is not int or file.size < 0:
            raise PipelineError(f"{repo}: the size of {file.name} is not known", OTHER)
    if mmproj and mmproj not in [file.name for file in files]:
        raise PipelineError(f"{repo}: its projector {mmproj} is not among its files")
    name = f"{slug(repo)}__{slug(commit[:12])}"
    resolved = Resolved(
        kind=kind,
        name=short_name(repo.split("/")[-1]),
        slug=name,
        folder=home.models / ("gguf" if kind == "gguf" else "source") / name,
        local=False,
        source=source,
        files=tuple(files),
        precision=precision,
        mmproj=mmproj,
    )
    return replace(resolved, **details)


def require_safe(names: Sequence[str], repo: str) -> None:
    """Refuse names that could lead out of the model's folder, or that some system takes for another
    name. Raises PipelineError."""
    known: dict[str, str] = {}
    for name in names:
        parts = name.split("/")
        # the pipeline's own files beside the model begin with a dot
        is_hidden = any(not p or p.startswith((".", " ")) or p.endswith((".", " ")) for p in parts)
        if (
            is_hidden
            or not name.isprintable()
            or any(sign in name for sign in '\\:*?"<>|')
            or any(map(is_windows_device, parts))
            or any(len(part.encode()) > 200 for part in parts)
        ):
            raise PipelineError(
                f"{repo}: has a file named {name!r}, which is not safe to write", OTHER
            )
        folded = unicodedata.normalize("NFC", name).casefold()
        if folded in known:
            raise PipelineError(
                f"{repo}: has the files {known[folded]!r} and {name!r}, "
                "which are the same file on some disks",
                OTHER,
            )
        known[folded] = name
