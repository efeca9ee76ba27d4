"""Which files of a repository are meant: a GGUF with its parts and its projector, or safetensors
with what the converter reads beside them. The network is used only by the functions passed in."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import PurePosixPath
from typing import Any, Literal

from pipeline.core.errors import PipelineError, UsageError
from pipeline.core.paths import Home

from . import choice, quantized, quants, staging
from . import weights as weight_files
from .choice import Option
from .gguf import Header
from .hub import Listing
from .projector import pair
from .reference import NO_PROJECTOR, FileFilter
from .resolve import SIDE_FILES, ModelFile, Resolved, architecture, document, slug
from .safetensors import Head, own_precision
from .weights import INDEX

MAX_INDEX = 64 * 1024 * 1024  # bytes; that of a 1,000-tensor model has 100 thousand
MAX_CONFIG = 16 * 1024 * 1024  # bytes; most have one thousand
HIDDEN = re.compile(r"(?:^|/)\.[^./]")  # not `..`, which is refused
SHA256, SHA1 = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")
RESERVED = re.compile(
    r"(con|prn|aux|nul|conin\$|conout\$|com[0-9¹²³]|lpt[0-9¹²³]) *(\..*)?", re.IGNORECASE
)

Read = Callable[[ModelFile], bytes]
ReadHeader = Callable[[Sequence[ModelFile]], Header]
ReadHead = Callable[[ModelFile], Head]


def resolve(
    listing: Listing,
    file_filter: FileFilter,
    reference: str,
    home: Home,
    *,
    fits: Callable[[Option], bool],
    read: Read,
    read_header: ReadHeader,
    read_head: ReadHead,
) -> Resolved:
    """The files that are meant, and why. Raises PipelineError; UsageError lists the files."""
    source = {"type": "hf", "ref": listing.repo, "revision": listing.commit}
    options = choice.options(listing.files)
    safetensors = [n for n in listing.files if fnmatch(n, "*.safetensors") and "/" not in n]
    if takes_gguf(options, safetensors, file_filter, reference):
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
    try:
        names = weights(listing, read)
    except PipelineError:
        config_file = listing.files.get("config.json")
        if config_file and config_file.size <= MAX_CONFIG:  # EXL2 has weights of another name
            where = f"{listing.repo}: config.json"
            config = document(read(config_file), where)
            quantized.require_readable(config, {}, (), {}, listing.repo)
        raise
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
    if "config.json" not in listing.files:
        raise PipelineError(
            f"{listing.repo}: has weights but no config.json, which the converter needs",
            "look for the model in the Transformers layout, or for a GGUF of it",
        )
    for name in ("config.json", quantized.MODELOPT_FILE):
        if name in listing.files and listing.files[name].size > MAX_CONFIG:
            raise PipelineError(f"{listing.repo}: {name} is too large to be one")
    why = f"it has no GGUF with {file_filter.quant}: converted from safetensors" if options else ""
    side_files = [
        name
        for name in listing.files
        if not HIDDEN.search(name) and any(matches(name, pattern) for pattern in SIDE_FILES)
    ]
    chosen = sorted({*names, *side_files})
    require_safe(chosen, listing.repo)  # before one of them is read
    where = f"{listing.repo}: config.json"
    config_bytes = read(listing.files["config.json"])
    config = document(config_bytes, where)
    known = architecture(config, where)
    staging.require_plausible(config_bytes, sum(listing.files[name].size for name in names), where)
    head = read_head(listing.files[names[0]])  # of a split model the first part stands for all
    modelopt = listing.files.get(quantized.MODELOPT_FILE)
    quantized.require_readable(
        config,
        document(read(modelopt), f"{listing.repo}: {modelopt.name}") if modelopt else {},
        head.names,
        head.dtypes,
        listing.repo,
    )
    return of_files(
        source,
        "safetensors",
        [listing.files[name] for name in chosen],
        home,
        precision=own_precision(Counter(listing.parameters) or head.dtypes),
        architecture=known,
        why=why,
    )


def matches(name: str, pattern: str) -> bool:
    """Whether a glob matches, folder by folder."""
    parts, patterns = name.split("/"), pattern.split("/")
    return len(parts) == len(patterns) and all(map(fnmatch, parts, patterns))


def takes_gguf(
    options: Sequence[Option], safetensors: Sequence[str], file_filter: FileFilter, reference: str
) -> bool:
    """Whether a GGUF is meant: beside safetensors only one with the requested quant."""
    if not options:
        return False
    if (
        not safetensors
        or file_filter.filename
        or file_filter.pattern
        or file_filter.quant in ("", quants.AUTO)
    ):
        return True
    return (
        bool(choice.by_quant(options, file_filter.quant))
        or quants.canonical(file_filter.quant) not in quants.TYPES
    )


def weights(listing: Listing, read: Read) -> list[str]:
    """The names of the weight files. Raises PipelineError."""

    def read_index() -> bytes:
        if listing.files[INDEX].size > MAX_INDEX:
            raise PipelineError(f"{listing.repo}: {INDEX} is too large to be an index")
        return read(listing.files[INDEX])

    visible = {n: f for n, f in listing.files.items() if not PurePosixPath(n).name.startswith(".")}
    if not [name for name in visible if not name.lower().endswith((".md", ".txt"))]:
        raise PipelineError(
            f"{listing.repo}: is empty at {listing.commit[:12]}", "use another revision=…"
        )
    sizes = {name: file.size for name, file in visible.items()}
    return weight_files.choose(sizes, read_index, listing.repo)


def of_files(
    source: Mapping[str, Any],
    kind: Literal["gguf", "safetensors"],
    files: Sequence[ModelFile],
    home: Home,
    *,
    precision: str,
    mmproj: str = "",
    architecture: str = "",
    why: str = "",
) -> Resolved:
    """The model of these files of a commit. Raises PipelineError where one is not safe."""
    repo, commit = str(source["ref"]), str(source["revision"])
    require_safe([file.name for file in files], repo)
    for file in files:
        if not (SHA256.fullmatch(file.sha256) or (SHA1.fullmatch(file.blob) and not file.sha256)):
            raise PipelineError(f"{repo}: {file.name} has no hash, so it could not be checked")
        if type(file.size) is not int or file.size < 0:
            raise PipelineError(f"{repo}: the size of {file.name} is not known")
    if mmproj and mmproj not in [file.name for file in files]:
        raise PipelineError(f"{repo}: its projector {mmproj} is not among its files")
    name = f"{slug(repo)}__{slug(commit[:12])}"
    return Resolved(
        kind=kind,
        name=repo.split("/")[-1],
        slug=name,
        folder=home.models / ("gguf" if kind == "gguf" else "source") / name,
        local=False,
        source=source,
        files=tuple(files),
        precision=precision,
        mmproj=mmproj,
        architecture=architecture,
        why=why,
    )


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
            or any(RESERVED.fullmatch(part) for part in parts)
            or any(len(part.encode()) > 200 for part in parts)
        ):
            raise PipelineError(f"{repo}: has a file named {name!r}, which is not safe to write")
        folded = unicodedata.normalize("NFC", name).casefold()
        if folded in known:
            raise PipelineError(
                f"{repo}: has the files {known[folded]!r} and {name!r}, "
                "which are the same file on some disks"
            )
        known[folded] = name
