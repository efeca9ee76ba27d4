"""The files that a reference means: their names, sizes and sha256, and what they hold."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.core.errors import PipelineError, UsageError, did_you_mean
from pipeline.core.paths import Home
from pipeline.core.pins import pins
from pipeline.core.store import json_file, stat_cache
from pipeline.core.store.locks import only_one

from . import gguf, safetensors, staging
from .reference import Reference

# What the converter reads beside the weights. No program code is ever among it.
SIDE_FILES = (
    "*.json",
    "tokenizer.model",
    "*.txt",
    "*.tiktoken",
    "*.jinja",
    "*/config.json",
    "additional_chat_templates/*.jinja",
)
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class ModelFile:
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """A reference with nothing left open.

    `slug` names its folders; `folder` holds its files, now or after `fetch`; `local` says that
    they are the user's own and stay in their place. `precision` is the source's own type.
    `mmproj` names the projector among the files, and `why` says how they were chosen.
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
    why: str = ""

    @property
    def bytes(self) -> int:
        return sum(file.size for file in self.files)

    def recipe(self) -> dict[str, str]:
        """These inputs in a recipe."""
        return {file.name: file.identity for file in self.files}

    def fetch_recipe(self, file: ModelFile) -> dict[str, Any]:
        """The recipe of one of its files, for models that are fetched."""
        return {"step": "fetch", "file": file.identity, **self.source}


def slug(text: str) -> str:
    """`text` as a name that every file system takes."""
    name = re.sub(r"[^\w.-]+", "-", text.replace("/", "__"))
    # Cut to 80 bytes, at a letter; what is named by a slug has a hash in its name too.
    return name.encode("utf-8", "replace")[:80].decode("utf-8", "ignore").strip("-.") or "model"


def is_plain(name: str) -> bool:
    """Whether `name` is a plain file name on every system: no folder, no drive."""
    return name not in ("", ".", "..") and not re.search(r"[/\\:\0]", name)


def local_slug(path: Path) -> str:
    """A name for the artifacts of a local path: the path's own name and a hash of it all."""
    digest = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:8]
    return f"local__{slug(path.stem if path.is_file() else path.name)}__{digest}"


def demo(home: Home) -> Resolved:
    """The demonstration model, from the pins."""
    files = tuple(ModelFile(name, f.size, f.sha256) for name, f in pins().demo_files.items())
    archive = pins().demo_archive
    return Resolved(
        kind="safetensors",
        name=pins().demo_name,
        slug=f"demo__{pins().demo_name}__{archive.sha256[:12]}",
        folder=home.models / "source" / f"demo__{pins().demo_name}__{archive.sha256[:12]}",
        local=False,
        source={"type": "package", "ref": f"{archive.package}=={archive.version}"},
        files=files,
        precision="F32",
    )


def gguf_path(path: Path, home: Home) -> Resolved:
    """A GGUF that is used in place, whole or its first part. Reads its header only.

    The sha256 of its files stay empty: nothing is made from them.
    Raises PipelineError.
    """
    cache = home.run / "gguf.json"
    paths = gguf.shards(path)
    headers = [gguf.read_cached(part, cache) for part in paths]
    if headers[0].shards != len(paths):
        raise PipelineError(
            f"{path}: is one of {headers[0].shards} parts, by its header",
            "keep the original names of the parts: …-00001-of-0000N.gguf",
        )
    return Resolved(
        kind="gguf",
        name=headers[0].name or path.stem,
        slug=local_slug(path),
        folder=path.parent,
        local=True,
        source={"type": "file", "ref": str(path)},
        files=tuple(ModelFile(part.name, part.stat().st_size, "") for part in paths),
        precision=headers[0].quant,
    )


def check_folder(folder: Path, architectures: frozenset[str]) -> tuple[list[Path], str]:
    """A folder's weight files and its own precision, from headers alone.

    `architectures` are those that the converter knows; empty means not known yet.
    Raises PipelineError.
    """
    config = folder / "config.json"
    weights = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    if not config.is_file():
        raise PipelineError(
            f"{folder}: has no config.json",
            "a model folder holds config.json, *.safetensors and the tokenizer's files",
        )
    if not weights and not (folder / INDEX).is_file():
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        if pickled:
            raise PipelineError(
                f"{folder}: has only pickled weights ({', '.join(pickled[:3])}), which run code "
                "when they are loaded; they are not used",
                "get the model's safetensors, or convert the weights where you trust them",
            )
        raise PipelineError(f"{folder}: has no *.safetensors")
    config_bytes = config.read_bytes()
    require_known(architecture(config_bytes, str(config)), architectures, str(config))
    if (folder / INDEX).is_file():
        weights = _indexed(folder)
    dtypes: Counter[str] = Counter()
    for path in weights:
        dtypes += safetensors.dtypes(path)
    staging.require_plausible(
        config_bytes, sum(path.stat().st_size for path in weights), str(config)
    )
    return weights, safetensors.own_precision(dtypes)


def folder_is_known(path: Path, home: Home) -> bool:
    """Whether the sha256 of all files in a model's folder are known. Raises PipelineError."""
    weights, _ = check_folder(path, frozenset())
    cache = home.run / "sha256.json"
    return all(stat_cache.recall(cache, file) is not None for file in _inputs(path, weights))


def folder(path: Path, home: Home, architectures: frozenset[str]) -> Resolved:
    """A folder of safetensors. A file is hashed again when it has changed. Raises PipelineError."""
    weights, precision = check_folder(path, architectures)
    cache = home.run / "sha256.json"
    files = tuple(
        ModelFile(
            file.relative_to(path).as_posix(),
            file.stat().st_size,
            stat_cache.identity(cache, file),
        )
        for file in _inputs(path, weights)
    )
    return Resolved(
        kind="safetensors",
        name=path.resolve().name,
        slug=local_slug(path),
        folder=path,
        local=True,
        source={"type": "folder", "ref": str(path)},
        files=files,
        precision=precision,
    )


def _inputs(path: Path, weights: list[Path]) -> list[Path]:
    """The weights and what the converter reads beside them. Raises PipelineError for a link out of
    the folder: in a cloned repository it may lead to a secret, which would become part of the GGUF.
    A Hugging Face cache links to the blobs of its repository."""
    side_files = {file for pattern in SIDE_FILES for file in path.glob(pattern) if file.is_file()}
    folder = path.resolve()
    for file in sorted(side_files):
        real = file.resolve()
        if not (real.is_relative_to(folder) or real.is_relative_to(folder.parent.parent / "blobs")):
            raise PipelineError(
                f"{file}: is a link to {real}, which is not in the model's folder",
                "copy the file there if it belongs to the model",
            )
    return sorted({*weights, *side_files})


def forget(path: Path | None, home: Home) -> None:
    """Drop what is cached of the user's own file or folder."""
    if path is not None:
        for name in ("sha256.json", "gguf.json", "memory.json"):
            stat_cache.forget(home.run / name, path)


def stored(path: Path) -> Resolved | None:
    """The model that an earlier run stored at `path`; None where there is none that can be read."""

    def parse(data: Any) -> Resolved:
        files = tuple(ModelFile(**file) for file in data["files"])
        return Resolved(**{**data, "files": files, "folder": top / data["folder"]})

    top = path.parent.parent
    return json_file.read(path, parse)


def store(path: Path, resolved: Resolved) -> None:
    """Store what a reference to the hub was resolved to."""
    data = asdict(resolved)
    data["folder"] = resolved.folder.relative_to(path.parent.parent).as_posix()
    with only_one(path):
        json_file.write(path, data, indent=1)


def stored_path(reference: Reference, question: Sequence[object], home: Home) -> Path:
    """Where the hub's answer to this question is stored."""
    text = json.dumps([reference.repo, reference.revision, *question])
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return home.models / "resolved" / f"{slug(reference.repo)}__{digest}.json"


def architecture(config: bytes, where: str) -> str:
    """The architecture that a config.json names. Raises PipelineError."""
    try:
        names = json.loads(config).get("architectures")
    except (ValueError, AttributeError, RecursionError) as error:
        raise PipelineError(f"{where}: cannot be read as JSON: {error}") from None
    if not (isinstance(names, list) and names and isinstance(names[0], str)):
        raise PipelineError(f"{where}: names no architecture", 'add "architectures": ["…"]')
    return names[0]


def require_known(name: str, known: frozenset[str], where: str) -> None:
    """Raise UsageError where the converter does not know an architecture; none known: not yet."""
    if known and name not in known:
        raise UsageError(
            f"{where}: the architecture {name} is not known to this llama.cpp"
            f"{did_you_mean(name, sorted(known))}",
            "a newer llama.cpp may know it; pipeline/pins.toml says which one is used",
        )


def _indexed(folder: Path) -> list[Path]:
    """The weight files that the index names, all of which must exist."""
    try:
        data = (folder / INDEX).read_bytes()
    except OSError as error:
        raise PipelineError(f"{folder / INDEX}: cannot be read: {error.strerror}") from None
    names = indexed(data, str(folder / INDEX))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise PipelineError(
            f"{folder}: {len(missing)} of the {len(names)} files that {INDEX} names are "
            f"missing: {', '.join(missing[:3])}",
            "download them into the same folder",
        )
    return [folder / name for name in names]


def indexed(data: bytes, where: str) -> list[str]:
    """The weight files that an index names; all must lie beside it. Raises PipelineError."""
    try:
        names = sorted(set(json.loads(data)["weight_map"].values()), key=str)
        if not names:
            raise ValueError("it names no file")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PipelineError(f"{where}: cannot be read as an index: {error}") from None
    for name in names:
        if not (isinstance(name, str) and name.endswith(".safetensors") and is_plain(name)):
            raise PipelineError(f"{where}: names {name!r}, which is not a file beside it")
    return names
