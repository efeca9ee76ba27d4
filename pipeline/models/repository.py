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

from . import choice, quants, staging
from .choice import Option
from .gguf import Header
from .hub import Listing, shown
from .projector import pair
from .reference import NO_PROJECTOR, FileFilter
from .resolve import INDEX, SIDE_FILES, ModelFile, Resolved, architecture, indexed, slug
from .safetensors import own_precision

MAX_INDEX = 64 * 1024 * 1024  # bytes; that of a 1,000-tensor model has 100 thousand
MAX_CONFIG = 16 * 1024 * 1024  # bytes; most have one thousand
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
HIDDEN = re.compile(r"(?:^|/)\.[^./]")  # not `..`, which is refused
SHA256, SHA1 = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")
SHARD = re.compile(r".+-\d{5}-of-(?P<count>\d{5})\.safetensors")
RESERVED = re.compile(
    r"(con|prn|aux|nul|conin\$|conout\$|com[0-9¹²³]|lpt[0-9¹²³]) *(\..*)?", re.IGNORECASE
)

Read = Callable[[ModelFile], bytes]
ReadHeader = Callable[[Sequence[ModelFile]], Header]
ReadDtypes = Callable[[ModelFile], Counter[str]]  # bytes by element type


def resolve(
    listing: Listing,
    file_filter: FileFilter,
    reference: str,
    home: Home,
    *,
    fits: Callable[[Option], bool],
    read: Read,
    read_header: ReadHeader,
    read_dtypes: ReadDtypes,
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
    if not safetensors:
        raise nothing(listing)
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
    names = weights(listing, read)
    if "config.json" not in listing.files:
        raise PipelineError(
            f"{listing.repo}: has weights but no config.json, which the converter needs",
            "look for the model in the Transformers layout, or for a GGUF of it",
        )
    config = listing.files["config.json"]
    if config.size > MAX_CONFIG:
        raise PipelineError(f"{listing.repo}: config.json is too large to be one")
    why = f"it has no GGUF with {file_filter.quant}: converted from safetensors" if options else ""
    side_files = [
        name
        for name in listing.files
        if not HIDDEN.search(name) and any(matches(name, pattern) for pattern in SIDE_FILES)
    ]
    chosen = sorted({*names, *side_files})
    require_safe(chosen, listing.repo)  # before one of them is read
    config_bytes, where = read(config), f"{listing.repo}: config.json"
    staging.require_plausible(config_bytes, sum(listing.files[name].size for name in names), where)
    return of_files(
        source,
        "safetensors",
        [listing.files[name] for name in chosen],
        home,
        # Where the hub has no counts, the first part of a split model stands for all.
        precision=own_precision(
            Counter(listing.parameters) or read_dtypes(listing.files[names[0]])
        ),
        architecture=architecture(config_bytes, where),
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
    """The weight files: those that the index names, without copies in another layout.

    Raises PipelineError.
    """
    top = sorted(n for n in listing.files if fnmatch(n, "*.safetensors") and "/" not in n)
    if INDEX in listing.files:
        if listing.files[INDEX].size > MAX_INDEX:
            raise PipelineError(f"{listing.repo}: {INDEX} is too large to be an index")
        names = indexed(read(listing.files[INDEX]), f"{listing.repo}: {INDEX}")
        missing = [name for name in names if name not in listing.files]
        if missing:
            raise PipelineError(
                f"{listing.repo}: {INDEX} names {len(missing)} files that the repository lacks: "
                f"{', '.join(missing[:3])}",
                "ask its owner, or use another revision",
            )
        return names
    if all(name.startswith("adapter") for name in top):
        raise PipelineError(
            f"{listing.repo}: holds an adapter (LoRA), not a model",
            "pass the model that it was trained for; convert the adapter with llama.cpp's "
            "convert_lora_to_gguf.py and pass it as server.lora=PATH",
        )
    if "model.safetensors" in top:
        return ["model.safetensors"]
    model_files = [name for name in top if name.startswith("model")]
    if not model_files:
        raise PipelineError(
            f"{listing.repo}: its weights are {', '.join(top[:3])}; llama.cpp's converter reads "
            "model*.safetensors",
            "look for the model in the Transformers layout, or for a GGUF of it",
        )
    split = [SHARD.fullmatch(name) for name in model_files]
    counts = {int(part["count"]) for part in split if part}
    if len(model_files) > 1 and (None in split or counts != {len(model_files)}):
        raise PipelineError(
            f"{listing.repo}: has {', '.join(model_files[:3])} and no {INDEX}: "
            "which of them are one model is not known, or some are missing",
            "ask its owner, or download the right ones into a folder",
        )
    return model_files


def nothing(listing: Listing) -> PipelineError:
    """The error for a repository without a usable model."""
    visible = {n: f for n, f in listing.files.items() if not PurePosixPath(n).name.startswith(".")}
    if not [name for name in visible if not name.lower().endswith((".md", ".txt"))]:
        return PipelineError(
            f"{listing.repo}: is empty at {listing.commit[:12]}", "use another revision=…"
        )
    if any(choice.PROJECTOR.search(n) for n in visible if n.endswith(".gguf")):
        return PipelineError(
            f"{listing.repo}: has only projectors (mmproj), no model",
            "pass the model's repository",
        )
    nested = sorted(name for name in visible if name.endswith(".safetensors"))
    if nested:
        return PipelineError(
            f"{listing.repo}: has weights only in folders ({', '.join(nested[:3])}), which belong "
            "to something other than a language model",
        )
    pickled = sorted(name for name in visible if name.lower().endswith(PICKLED))
    if pickled:
        return PipelineError(
            f"{listing.repo}: has only pickled weights ({', '.join(pickled[:3])}), which run code "
            "when they are loaded; they are not used",
            "look for a conversion of the model to safetensors or GGUF",
        )
    return PipelineError(
        f"{listing.repo}: has neither GGUF nor safetensors files; it holds {shown(visible)}"
    )


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
