"""The files that a reference means: their names, sizes and sha256, and what they hold."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from msgspec import Struct, convert, to_builtins

from pipeline.core.errors import PipelineError
from pipeline.core.paths import Home
from pipeline.core.pins import pins
from pipeline.core.store import json_file, stat_cache
from pipeline.core.store.locks import only_one

from . import checkpoint, contents, gguf, kinds, quants, safetensors, staging
from .reference import Reference

# What the converter reads beside the weights. No program code is ever among it.
SIDE_FILES = (
    "*.json",
    "tokenizer.model",
    "sentencepiece.bpe.model",  # of XLM-RoBERTa, as many rerankers are
    "spiece.model",  # of T5
    "tokenizer.jsonl",  # of PLaMo
    "*.txt",
    "*.tiktoken",
    "*.jinja",
    "*/config.json",
    "additional_chat_templates/*.jinja",
)
# One of these has the words, and is in a folder of its own where none is beside the weights.
WORDS = re.compile(
    r"((tokenizer|tekken|vocab|spiece|.*\.bpe)\.(jsonl?|model|txt)|.*\.tiktoken)", re.I
)
# For quant=auto, best first. None needs an importance matrix, and more bits than Q8_0's make hardly
# any difference.
CANDIDATES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K")
MARK = re.compile(r"[-_.](i1|imat|imatrix|gguf)$", re.IGNORECASE)  # of conversions
MOST_NESTED = 1000  # files of folders in a folder, which only an error message names


class ModelFile(Struct, frozen=True):
    """One file of a model, its name relative to the model's folder. Size in bytes.

    `blob` is git's SHA-1, the only hash that the hub has of small files.
    """

    name: str
    size: int
    sha256: str
    blob: str = ""

    @property
    def identity(self) -> str:
        return f"sha256:{self.sha256}" if self.sha256 else f"git:{self.blob}"


class Resolved(Struct, frozen=True, kw_only=True):
    """A model whose files are known by name, size and hash.

    `slug` names its folders; `folder` holds its files, now or after `fetch`; `local` says that
    they are the user's own and stay in their place. `precision` is the source's own type.
    `mmproj` names the projector among the files, and `why` says how they were chosen.
    Of an adapter in safetensors, `base` holds the config files of the model that it is converted
    for, and `base_name` is how its own config names that model.
    """

    kind: Literal["gguf", "safetensors"]
    name: str
    slug: str
    folder: Path
    local: bool
    source: Mapping[str, Any]
    files: tuple[ModelFile, ...]
    precision: str
    mmproj: str = ""
    architecture: str = ""  # as config.json has it
    encoder: str = ""  # the architecture of its encoder of images or sound
    why: str = ""
    base: Resolved | None = None
    base_name: str = ""

    @property
    def bytes(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def fetched(self) -> list[Resolved]:
        """The models whose files are downloaded: this one, and its base."""
        return [each for each in (self, self.base) if each and not each.local]

    def recipe(self) -> dict[str, str]:
        """The files by name and identity, as an input of a recipe."""
        return {file.name: file.identity for file in self.files}

    def fetch_recipe(self, file: ModelFile) -> dict[str, Any]:
        """The recipe of one of its files, for models that are fetched."""
        return {"step": "fetch", "file": file.identity, **self.source}


def short_name(*names: str) -> str:
    """A model's name in the API: that of its repository or file, without its quant and what
    conversions add, in letters that need no quotes. Of several the first that leaves something."""
    for text in names:
        shard = gguf.SHARD.fullmatch(text)
        name = quants.LABEL.sub("", shard["stem"] if shard else text.removesuffix(".gguf"))
        name = re.sub(r"[^\w.-]+", "-", name)
        name = re.sub(r"(?<=[-_.])[-_.]+", "", name).strip("-_.")
        while MARK.search(name):
            name = MARK.sub("", name)
        if name:
            return name
    return "model"


def folder_name(path: Path) -> str:
    """A folder's name; in a cache of huggingface_hub, where it is a commit's hash, its
    repository's."""
    repository = path.parent.parent.name
    is_cached = path.parent.name == "snapshots" and repository.startswith("models--")
    return repository.rpartition("--")[2] if is_cached else path.name


def slug(text: str) -> str:
    """`text` as a name that every file system takes."""
    name = re.sub(r"[^\w.-]+", "-", text.replace("/", "__"))
    # Cut to 80 bytes, at a letter; what is named by a slug has a hash in its name too.
    return name.encode("utf-8", "replace")[:80].decode("utf-8", "ignore").strip("-.") or "model"


def local_slug(path: Path) -> str:
    """A name for the artifacts of a local path: the path's own name and a hash of it all."""
    digest = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:8]
    return f"local__{slug(path.stem if path.is_file() else path.name)}__{digest}"


def demo(text: str, home: Home) -> Resolved:
    """The demonstration model that `text` names, from the pins."""
    pinned = pins().demos[text]
    archive = pinned.archive
    slug = f"demo__{pinned.name}__{archive.sha256[:12]}"
    return Resolved(
        kind=pinned.kind,
        name=pinned.name,
        slug=slug,
        folder=home.models / ("gguf" if pinned.kind == "gguf" else "source") / slug,
        local=False,
        source={"type": "package", "ref": archive.requirement},
        files=tuple(ModelFile(n, f.size, f.sha256) for n, f in pinned.files.items()),
        precision=pinned.precision,
    )


def gguf_path(path: Path, home: Home) -> Resolved:
    """A GGUF that is used in place, whole or its first part. Reads its header only.

    The sha256 of its files stay empty: nothing is made from them.
    Raises PipelineError.
    """
    paths = gguf.shards(path)
    headers = [gguf.read_cached(part, home.run) for part in paths]
    if headers[0].shards != len(paths):
        raise PipelineError(
            f"{path}: is one of {headers[0].shards} parts, by its header",
            "keep the original names of the parts: …-00001-of-0000N.gguf",
        )
    for number, (part, header) in enumerate(zip(paths, headers, strict=True)):
        if (own := gguf.whole(header.values, "split.no", number)) != number:
            raise PipelineError(
                f"{part}: is part {own + 1} by its header, not part {number + 1}",
                "its name was changed, or another part copied over it: download it again",
            )
    kinds.require_model(headers, str(path))
    return in_place(paths, headers[0].quant)


def in_place(paths: Sequence[Path], quant: str) -> Resolved:
    """The GGUF of these parts, which is used where it is."""
    path = paths[0]
    return Resolved(
        kind="gguf",
        name=short_name(path.name, path.parent.name),
        slug=local_slug(path),
        folder=path.parent,
        local=True,
        source={"type": "file", "ref": str(path)},
        files=tuple(ModelFile(part.name, part.stat().st_size, "") for part in paths),
        precision=quant,
    )


def check_folder(
    folder: Path, architectures: frozenset[str]
) -> tuple[list[Path], checkpoint.Checkpoint]:
    """The files of a folder that the converter reads, and what they hold, from headers alone.

    `architectures` are those that the converter knows; empty means not known yet.
    Raises PipelineError.
    """

    def read(name: str) -> bytes:
        return contents.local(folder / name).whole()

    def read_heads(names: list[str]) -> list[safetensors.Head]:
        heads = [safetensors.read(folder / name) for name in names]
        tensors = [name for head in heads for name in head.shapes]
        if tensors and checkpoint.INDEX in sizes:
            checkpoint.require_complete(
                read(checkpoint.INDEX), tensors, f"{folder}: {checkpoint.INDEX}"
            )
        return heads

    snapshots = sorted(folder.glob("snapshots/*/*"), key=lambda path: path.lstat().st_mtime)
    if (folder / "blobs").is_dir() and snapshots:
        raise PipelineError(
            f"{folder}: is a repository in a cache of huggingface_hub",
            f"pass one of its commits: model={snapshots[-1].parent}",
        )
    files = [*folder.glob("*"), *islice(folder.glob("*/*"), MOST_NESTED)]
    sizes = {p.relative_to(folder).as_posix(): p.stat().st_size for p in files if p.is_file()}
    ggufs = [name for name in sizes if name.lower().endswith(".gguf")]
    if ggufs and not any(name.endswith(".safetensors") for name in sizes):
        raise PipelineError(
            f"{folder}: holds GGUF files: {', '.join(sorted(ggufs)[:5])}",
            f"pass the one to be served: model={folder / min(ggufs)}",
        )
    model = checkpoint.check(str(folder), sizes, read, read_heads, architectures)
    inputs = _inputs(folder, [folder / name for name in model.weights])
    for file in inputs:
        contents.require_real(file)
    return inputs, model


def are_hashed(files: Iterable[Path], home: Home) -> bool:
    """Whether the sha256 of all these files are cached."""
    return all(stat_cache.recall(home.digests, file) is not None for file in files)


def folder(path: Path, home: Home, architectures: frozenset[str]) -> Resolved:
    """A folder of safetensors. A file is hashed again when it has changed. Raises PipelineError."""
    return _checked_folder(path, home, *check_folder(path, architectures))


def known_folder(path: Path, home: Home) -> Resolved | None:
    """As `folder`; None where a file has to be hashed. Raises PipelineError."""
    inputs, model = check_folder(path, frozenset())
    return _checked_folder(path, home, inputs, model) if are_hashed(inputs, home) else None


def _checked_folder(
    path: Path, home: Home, inputs: list[Path], model: checkpoint.Checkpoint
) -> Resolved:
    precision = safetensors.own_precision(model.dtypes)
    return of_folder(path, inputs, home, precision=precision, encoder=model.encoder)


def of_folder(
    path: Path,
    files: Iterable[Path],
    home: Home,
    *,
    precision: str,
    encoder: str = "",
    base_name: str = "",
) -> Resolved:
    """The model of these files in a folder of the user's. Hashes what has changed."""
    cache = home.digests
    return Resolved(
        kind="safetensors",
        name=short_name(folder_name(path.resolve())),
        slug=local_slug(path),
        folder=path,
        local=True,
        source={"type": "folder", "ref": str(path)},
        files=tuple(
            ModelFile(
                file.relative_to(path).as_posix(),
                file.stat().st_size,
                stat_cache.identity(cache, file),
            )
            for file in files
        ),
        precision=precision,
        encoder=encoder,
        base_name=base_name,
    )


def side_patterns(names: Iterable[str]) -> tuple[str, ...]:
    """What the converter reads beside the weights of a model with files of these `names`."""
    if any(map(WORDS.fullmatch, names)):
        return SIDE_FILES
    plain = (pattern for pattern in SIDE_FILES if "/" not in pattern)
    return (*SIDE_FILES, *(f"{staging.TOKENIZER_FOLDER}{pattern}" for pattern in plain))


def _inputs(path: Path, weight_files: list[Path]) -> list[Path]:
    """The weights and what the converter reads beside them. Raises PipelineError for a link out of
    the folder: in a cloned repository it may lead to a secret, which would become part of the GGUF.
    A Hugging Face cache links to the blobs of its repository."""
    patterns = side_patterns(file.name for file in path.iterdir())
    side_files = {file for pattern in patterns for file in path.glob(pattern) if file.is_file()}
    folder = path.resolve()
    for file in sorted(side_files):
        real = file.resolve()
        if not (real.is_relative_to(folder) or real.is_relative_to(folder.parent.parent / "blobs")):
            raise PipelineError(
                f"{file}: is a link to {real}, which is not in the model's folder",
                "copy the file there if it belongs to the model",
            )
    return sorted({*weight_files, *side_files})


def forget(path: Path | None, home: Home) -> None:
    """Drop what is cached of the user's own file or folder."""
    if path is not None:
        for cache in (home.digests, home.run / gguf.CACHE, home.run / "memory.json"):
            stat_cache.forget(cache, path)


def stored(path: Path) -> Resolved | None:
    """The model that an earlier run stored at `path`; None where there is none that can be read."""
    top = path.parent.parent
    return json_file.read(
        path, lambda data: convert({**data, "folder": top / data["folder"]}, Resolved)
    )


def store(path: Path, resolved: Resolved) -> None:
    """Store what a reference to the hub was resolved to."""
    data = to_builtins(resolved, enc_hook=str)
    write(path, {**data, "folder": resolved.folder.relative_to(path.parent.parent).as_posix()})


def write(path: Path, data: Mapping[str, Any]) -> None:
    """Store an answer or a decision."""
    with only_one(path):
        json_file.write(path, data, indent=1)


def stored_path(reference: Reference, question: Sequence[object], home: Home) -> Path:
    """Where the hub's answer to this question is stored."""
    text = json.dumps([reference.repo, reference.revision, *question])
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return home.models / "resolved" / f"{slug(reference.repo)}__{digest}.json"


def auto_candidates(requested: quants.QuantRequest) -> tuple[str, ...]:
    """The quants of which quant=auto chooses one that is made here: what the converter writes
    itself has no use for an importance matrix or keep_f16."""
    if requested.imatrix or requested.keep_f16:
        return tuple(quant for quant in CANDIDATES if quant not in quants.DIRECT)
    return CANDIDATES


def decision_path(
    resolved: Resolved, requested: quants.QuantRequest, ctx_size: int | None, home: Home
) -> Path:
    """Where the decision for quant=auto or fit is stored until refresh=1. With less free memory
    another quant would be chosen, and a second run must find the same file."""
    kind = quants.FIT if requested.quant == quants.FIT else auto_candidates(requested)[0]
    key = f"{ctx_size or 'smallest'}-{kind.lower()}"
    return home.models / "resolved" / f"{resolved.slug}__auto-{key}.json"


def decided(path: Path) -> str:
    """The stored decision; empty where there is none that can be used."""
    quant = json_file.read(path, lambda decision: str(decision["quant"]))
    return quant if quant and (quant in quants.TYPES or quants.budget(quant)) else ""
