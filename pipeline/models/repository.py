"""What of a repository is meant: a GGUF with its parts and its projector, or safetensors with what
the converter reads beside them. Nothing here asks the network but through what is handed in."""

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
from .choice import FileFilter, Option
from .gguf import Header
from .hub import Listing, shown
from .projector import NONE, pair
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
    wish: FileFilter,
    asked: str,
    home: Home,
    *,
    fits: Callable[[Option], bool],
    read: Read,
    read_header: ReadHeader,
    read_dtypes: ReadDtypes,
) -> Resolved:
    """The files that are meant, and why. Raises PipelineError; UsageError lists what there is."""
    source = {"type": "hf", "ref": listing.repo, "revision": listing.commit}
    found = choice.options(listing.files)
    safetensors = [n for n in listing.files if fnmatch(n, "*.safetensors") and "/" not in n]
    if takes_gguf(found, safetensors, wish, asked):
        option, why = choice.choose(found, wish, asked, fits)
        files = list(option.files)
        projector, its_why = pair(listing.files, option, wish.mmproj, asked, read_header)
        files += [projector] if projector else []
        return of_files(
            source,
            "gguf",
            files,
            home,
            precision=option.label,
            mmproj=projector.name if projector else "",
            why=f"{option.label or option.name}: {why}{its_why}",
        )
    if not safetensors:
        raise nothing(listing)
    if wish.filename or wish.pattern:
        raise UsageError(
            f"{asked}: filename and pattern choose a GGUF, and the repository has none",
            "leave it out",
        )
    if wish.mmproj not in ("", NONE):
        raise UsageError(
            f"{asked}: mmproj={wish.mmproj} is of no use: the model is converted from "
            "safetensors, and its repository's projectors are looked at for a GGUF alone",
            "give the path of a projector",
        )
    names = weights(listing, read)
    if "config.json" not in listing.files:
        raise PipelineError(
            f"{listing.repo}: has weights and no config.json, without which nothing converts them",
            "look for the model in the Transformers layout, or for a GGUF of it",
        )
    config = listing.files["config.json"]
    if config.size > MAX_CONFIG:
        raise PipelineError(f"{listing.repo}: config.json is too large to be one")
    why = f"no GGUF with {wish.quant} is there: converted from safetensors" if found else ""
    beside = [
        name
        for name in listing.files
        if not HIDDEN.search(name) and any(matches(name, pattern) for pattern in SIDE_FILES)
    ]
    chosen = sorted({*names, *beside})
    require_safe(chosen, listing.repo)  # before one of them is read
    told, where = read(config), f"{listing.repo}: config.json"
    staging.require_plausible(told, sum(listing.files[name].size for name in names), where)
    return of_files(
        source,
        "safetensors",
        [listing.files[name] for name in chosen],
        home,
        # Of a split model the first part stands for all where the hub has not counted.
        precision=own_precision(
            Counter(listing.parameters) or read_dtypes(listing.files[names[0]])
        ),
        architecture=architecture(told, where),
        why=why,
    )


def matches(name: str, pattern: str) -> bool:
    """As a glob has it: folder by folder."""
    parts, patterns = name.split("/"), pattern.split("/")
    return len(parts) == len(patterns) and all(map(fnmatch, parts, patterns))


def takes_gguf(
    found: Sequence[Option], safetensors: Sequence[str], wish: FileFilter, asked: str
) -> bool:
    """Whether a GGUF is meant. With safetensors beside it, only where the quant is there."""
    if not found:
        return False
    if not safetensors or wish.filename or wish.pattern or wish.quant in ("", quants.AUTO):
        return True
    return (
        bool(choice.by_quant(found, wish.quant)) or quants.canonical(wish.quant) not in quants.TYPES
    )


def weights(listing: Listing, read: Read) -> list[str]:
    """The weight files: those that the index names, and no second copy in another layout.

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
                "ask its owner, or take another revision",
            )
        return names
    if all(name.startswith("adapter") for name in top):
        raise PipelineError(
            f"{listing.repo}: holds an adapter (LoRA), not a model",
            "name the model that it was trained on; convert the adapter with llama.cpp's "
            "convert_lora_to_gguf.py and give it as server.lora=PATH",
        )
    if "model.safetensors" in top:
        return ["model.safetensors"]
    ours = [name for name in top if name.startswith("model")]
    if not ours:
        raise PipelineError(
            f"{listing.repo}: its weights are {', '.join(top[:3])}; llama.cpp's converter reads "
            "model*.safetensors",
            "look for the model in the Transformers layout, or for a GGUF of it",
        )
    split = [SHARD.fullmatch(name) for name in ours]
    counts = {int(part["count"]) for part in split if part}
    if len(ours) > 1 and (None in split or counts != {len(ours)}):
        raise PipelineError(
            f"{listing.repo}: has {', '.join(ours[:3])}, and no {INDEX} tells which of them are "
            "one model, or some are missing",
            "ask its owner, or download what is meant into a folder",
        )
    return ours


def nothing(listing: Listing) -> PipelineError:
    """Why a repository without a usable model is of no use."""
    real = {n: f for n, f in listing.files.items() if not PurePosixPath(n).name.startswith(".")}
    if not [name for name in real if not name.lower().endswith((".md", ".txt"))]:
        return PipelineError(
            f"{listing.repo}: is empty at {listing.commit[:12]}", "name another revision=…"
        )
    if any(choice.PROJECTOR.search(n) for n in real if n.endswith(".gguf")):
        return PipelineError(
            f"{listing.repo}: has projectors (mmproj) alone, no model",
            "name the model's repository",
        )
    inside = sorted(name for name in real if name.endswith(".safetensors"))
    if inside:
        return PipelineError(
            f"{listing.repo}: has weights in folders only ({', '.join(inside[:3])}), which are "
            "parts of something else than a language model",
        )
    pickled = sorted(name for name in real if name.lower().endswith(PICKLED))
    if pickled:
        return PipelineError(
            f"{listing.repo}: has only pickled weights ({', '.join(pickled[:3])}), which run code "
            "when they are read; they are not used",
            "look for a conversion of the model to safetensors or GGUF",
        )
    return PipelineError(
        f"{listing.repo}: has neither GGUF nor safetensors files; it holds {shown(real)}"
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
    """The model that these files of a commit are. Raises PipelineError where one is not safe."""
    repo, commit = str(source["ref"]), str(source["revision"])
    require_safe([file.name for file in files], repo)
    for file in files:
        if not (SHA256.fullmatch(file.sha256) or (SHA1.fullmatch(file.blob) and not file.sha256)):
            raise PipelineError(f"{repo}: nothing tells what {file.name} must be: it has no hash")
        if type(file.size) is not int or file.size < 0:
            raise PipelineError(f"{repo}: nothing tells how large {file.name} is")
    if mmproj and mmproj not in [file.name for file in files]:
        raise PipelineError(f"{repo}: its projector {mmproj} is not among its files")
    named = f"{slug(repo)}__{slug(commit[:12])}"
    return Resolved(
        kind=kind,
        name=repo.split("/")[-1],
        slug=named,
        folder=home.models / ("gguf" if kind == "gguf" else "source") / named,
        local=False,
        source=source,
        files=tuple(files),
        precision=precision,
        mmproj=mmproj,
        architecture=architecture,
        why=why,
    )


def require_safe(names: Sequence[str], repo: str) -> None:
    """Refuse names that could be written anywhere but below the model's folder, or that some
    system takes for another name. Raises PipelineError."""
    seen: dict[str, str] = {}
    for name in names:
        parts = name.split("/")
        # a leading dot is how the pipeline's own files beside the model are named
        odd = any(not p or p.startswith((".", " ")) or p.endswith((".", " ")) for p in parts)
        if (
            odd
            or not name.isprintable()
            or any(sign in name for sign in '\\:*?"<>|')
            or any(RESERVED.fullmatch(part) for part in parts)
            or any(len(part.encode()) > 200 for part in parts)
        ):
            raise PipelineError(f"{repo}: has a file named {name!r}, which is not safe to write")
        folded = unicodedata.normalize("NFC", name).casefold()
        if folded in seen:
            raise PipelineError(
                f"{repo}: has the files {seen[folded]!r} and {name!r}, "
                "which are one file on some disks"
            )
        seen[folded] = name
