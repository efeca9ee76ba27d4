"""What the receipts know of a file: a statement of its provenance, without hashing or network."""

from __future__ import annotations

import json
import tarfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct, ValidationError, convert

from pipeline.bins.package.manifest import MANIFEST
from pipeline.core.errors import PipelineError, doitw
from pipeline.core.paths import Home, project_version
from pipeline.core.pins import pins
from pipeline.core.statement import (
    BuildDefinition,
    Builder,
    Descriptor,
    Statement,
    of_llama_cpp,
    purl,
    statement,
)
from pipeline.core.store import receipts
from pipeline.core.store.hashing import sha256
from pipeline.core.store.receipts import Entry, Recipe
from pipeline.core.text import printable
from pipeline.models import gguf

OWN_MACHINE = "urn:llama-pipeline:builder"  # the builder, where nobody names another
# How a file was made: docs/provenance.md describes each.
DOWNLOAD = "urn:llama-pipeline:build:download:v1"
GGUF = "urn:llama-pipeline:build:gguf:v1"
PACKAGE = "urn:llama-pipeline:build:package:v1"
# Dependencies that the receipts of one machine know, and another's may not.
ARCHIVE, WHEEL = "llama.cpp archive", "package archive"
HEX = frozenset("0123456789abcdef")


class DownloadParameters(Struct, forbid_unknown_fields=True):
    """External parameters of a download."""

    model: str
    files: list[str]
    revision: str = ""


class GgufParameters(Struct, forbid_unknown_fields=True):
    """External parameters of a GGUF that was converted or quantized."""

    model: str
    quant: str
    revision: str = ""
    imatrix: bool = False
    projector: bool = False
    adapter: bool = False


class PackageParameters(Struct, forbid_unknown_fields=True):
    """External parameters of a package of programs."""

    platform: str
    backend: str
    portable: bool


PARAMETERS = {DOWNLOAD: DownloadParameters, GGUF: GgufParameters, PACKAGE: PackageParameters}


def require_known(given: Statement) -> None:
    """Raise ValueError for a type of build, or a parameter, that is not one of these."""
    form = PARAMETERS.get(given.build.build_type)
    if form is None:
        raise ValueError(f"its buildType is {given.build.build_type!r}, of {', '.join(PARAMETERS)}")
    try:
        convert(dict(given.build.external_parameters), form)
    except ValidationError as error:
        raise ValueError(f"its externalParameters: {error}") from None


def has_receipt(file: Path, home: Home) -> bool:
    """Whether the pipeline made or fetched a file, in this home."""
    if not any(file.is_relative_to(top) for top in (home.models, home.bins)):
        return False
    entry = receipts.of(file)
    return entry is not None and entry.mtime_ns is not None


def of_file(file: Path, home: Home, builder: str = "") -> Statement:
    """The statement about a GGUF, all its parts, or a package. Raises PipelineError where the
    pipeline did not make it, or it has changed since."""
    parts = gguf.shards(file)
    entries = [_entry(part) for part in parts]
    step = str(entries[0].recipe.get("step", ""))
    if step == "package":
        build, byproducts = _package(file, entries[0], home), list[Descriptor]()
    elif step == "fetch":
        build, byproducts = _download(parts, entries, home), []
    elif step in ("convert", "quantize"):
        build, byproducts = _gguf(file, entries[0], home)
    else:
        raise PipelineError(f"{file}: is of the step {step}, of which there is no statement")
    return statement(
        [_subject(part, entry) for part, entry in zip(parts, entries, strict=True)],
        build,
        Builder(id=builder or OWN_MACHINE, version={"llama-pipeline": project_version()}),
        finished=max(entry.made_at for entry in entries),
        byproducts=byproducts,
    )


def _entry(file: Path) -> Entry:
    """The receipt of a file that is as it says."""
    entry = receipts.of(file)
    if entry is None or entry.mtime_ns is None:
        raise PipelineError(
            f"{file}: has no receipt: the pipeline neither made nor fetched it",
            f"sign it as it is: {doitw('sign model=… key=KEY.pem')}, of a package pkg=…",
        )
    if (receipts.known_sha256(file) or sha256(file)) != entry.sha256:
        raise PipelineError(f"{file}: has changed since it was made", "make it again with force=1")
    return entry


def _subject(file: Path, entry: Entry) -> Descriptor:
    is_model = file.suffix.lower() == ".gguf"
    license = printable(str(gguf.read(file).values.get("general.license", ""))) if is_model else ""
    notes = {"license": license} if license else {}
    return Descriptor(name=file.name, digest={"sha256": entry.sha256}, annotations=notes)


# Models


def _origin(entry: Entry, name: str = "") -> dict[str, str]:
    """`model` and `revision` of the parameters. The path of a user's own model stays here."""
    source = entry.source or {}
    ref, kind = str(source.get("ref", "")), source.get("type")
    if kind in ("hf", "package"):
        revision = str(source.get("revision", ""))
        return {"model": ref, **({"revision": revision} if revision else {})}
    return {"model": name or Path(ref).name}


def _download(parts: Sequence[Path], entries: Sequence[Entry], home: Home) -> BuildDefinition:
    top = home.models / "gguf" / _slug(parts[0], home)
    names = [part.relative_to(top).as_posix() for part in parts]
    files = {name: str(each.recipe["file"]) for name, each in zip(names, entries, strict=True)}
    return BuildDefinition(
        build_type=DOWNLOAD,
        external_parameters={**_origin(entries[0]), "files": names},
        internal_parameters=_noted(entries[0]),
        resolved_dependencies=_sorted(_sources(entries[0], files, home, "")),
    )


def _gguf(file: Path, entry: Entry, home: Home) -> tuple[BuildDefinition, list[Descriptor]]:
    """How a GGUF was converted and quantized, and what was made on the way."""
    recipe, internal, known = entry.recipe, _noted(entry), receipts.load(file.parent)
    dependencies, byproducts = list[Descriptor](), list[Descriptor]()
    converted: Entry | None = entry
    if recipe["step"] == "quantize":
        dependencies += _quantization(recipe, home)
        byproducts += _computed_matrices(recipe, known)
        between = _unquantized(recipe, known)
        converted = known[between] if between else None
        if converted:
            byproducts.append(_digested(between, recipe["input"]))
            internal["outtype"] = converted.recipe["outtype"]
        else:
            dependencies += _own_gguf(recipe)
    if converted:
        dependencies += _conversion(file, converted, home)
    made = converted or entry
    parameters = {
        **_origin(made, str(made.recipe.get("name", ""))),
        "quant": str(recipe.get("type") or recipe.get("outtype")),
        **{name: True for name in ("projector", "adapter") if made.recipe.get(name)},
        **({"imatrix": True} if recipe.get("imatrix") else {}),
    }
    build = BuildDefinition(
        build_type=GGUF,
        external_parameters=parameters,
        internal_parameters=internal,
        resolved_dependencies=_sorted(dependencies),
    )
    return build, byproducts


def _quantization(recipe: Recipe, home: Home) -> Iterator[Descriptor]:
    """What a quantization used, besides its input."""
    yield _program(recipe["tool"], home)
    for name in ("imatrix", "mix"):
        if recipe.get(name):
            yield _digested(name, recipe[name])


def _computed_matrices(recipe: Recipe, known: Mapping[str, Entry]) -> Iterator[Descriptor]:
    """The importance matrix that was computed for it from a text."""
    inputs = {"text": recipe.get("imatrix"), "input": recipe["input"]}
    for name, entry in known.items():
        if inputs["text"] and inputs.items() <= entry.recipe.items():
            yield _digested(name, f"sha256:{entry.sha256}")


def _unquantized(recipe: Recipe, known: Mapping[str, Entry]) -> str:
    """The name of the GGUF that was quantized, as far as it was converted here."""
    for name, entry in known.items():
        if f"sha256:{entry.sha256}" == recipe["input"] and entry.recipe.get("step") == "convert":
            return name
    return ""


def _own_gguf(recipe: Recipe) -> Iterator[Descriptor]:
    """What was quantized of the user's own, and the llama.cpp that did it."""
    parts = str(recipe["input"]).removeprefix("sha256:").split("+")
    for number, digest in enumerate(parts, start=1):
        name = "input" if len(parts) == 1 else f"input, part {number}"
        yield _digested(name, f"sha256:{digest}")
    commit = str(recipe["tool"]["commit"])
    if set(commit) <= HEX and len(commit) == 40:
        yield of_llama_cpp(commit)


def _conversion(file: Path, entry: Entry, home: Home) -> Iterator[Descriptor]:
    """What a conversion read: the model's files, the converter, and its environment."""
    recipe, slug = entry.recipe, _slug(file, home)
    yield from _sources(entry, recipe["files"], home, slug)
    for name, identity in recipe.get("base", {}).items():  # of an adapter
        yield _digested(f"base/{name}", identity)
    converter = recipe["converter"]
    yield of_llama_cpp(converter["commit"], converter["tree"])
    yield _digested("converter requirements", f"sha256:{converter['requirements']}")
    yield from _archive(converter, home)


def _sources(entry: Entry, files: Mapping[str, str], home: Home, slug: str) -> Iterator[Descriptor]:
    """A model's files, each by its digest and where it came from."""
    source = entry.source or {}
    ref, kind = str(source.get("ref", "")), source.get("type")
    package, _, version = ref.partition("==")
    for name, identity in files.items():
        uri = ""
        if kind == "hf":
            uri = purl("huggingface", ref, str(source["revision"]), name)
        elif kind == "package":
            uri = purl("pypi", package, version, name)
        fetched = home.models / "source" / slug / name
        known = receipts.of(fetched) if slug else None
        is_same = known and known.recipe.get("file") == identity
        yield _digested(name, identity, uri, known.sha256 if known and is_same else "")
    if kind == "package":
        for pinned in pins().demos.values():
            if ref == pinned.archive.requirement:
                digest = f"sha256:{pinned.archive.sha256}"
                yield _digested(WHEEL, digest, purl("pypi", package, version))


def _digested(name: str, identity: str, uri: str = "", sha256: str = "") -> Descriptor:
    """A file by its identity in a recipe: `sha256:…`, or `git:…` where the hub knows no other."""
    kind, _, value = identity.partition(":")
    digest = {"gitBlob" if kind == "git" else kind: value}
    return Descriptor(name=name, uri=uri, digest=digest | ({"sha256": sha256} if sha256 else {}))


def _program(tool: Mapping[str, Any], home: Home) -> Descriptor:
    """llama-quantize, with the recipe that it was made by where that is known: the compiler and its
    options, or the release that it comes from."""
    made = _digested("llama-quantize", str(tool["build"]))
    recipe = program_recipe(made.digest["sha256"], home)
    notes = {"commit": tool["commit"]} if tool["commit"] else {}
    return Descriptor(
        name=made.name,
        digest=made.digest,
        annotations=notes | ({"recipe": dict(recipe)} if recipe else {}),
    )


def program_recipe(digest: str, home: Home) -> Recipe | None:
    """How the program with this sha256 was made; None where no receipt knows it."""
    for pattern in ("*", "*/*"):
        for file in sorted(home.bins.glob(f"{pattern}/{receipts.FILE}")):
            for entry in receipts.load(file.parent).values():
                if entry.sha256 == digest:
                    return entry.recipe
    return None


def _archive(source: Recipe, home: Home) -> Iterator[Descriptor]:
    """The archive that llama.cpp's source was unpacked from."""
    for entry in receipts.load(home.bins / ".source").values():
        recipe, archive = entry.recipe, entry.recipe.get("archive")
        is_same = all(recipe.get(name) == source.get(name) for name in ("commit", "tree"))
        if archive and is_same:
            pinned = pins().llama_cpp_archive
            known = archive == pinned.sha256
            uri = purl("pypi", pinned.package, pinned.version) if known else ""
            yield _digested(ARCHIVE, f"sha256:{archive}", uri)


def _slug(file: Path, home: Home) -> str:
    """The name of the folder that a model's files are in. Raises PipelineError."""
    top = home.models / "gguf"
    if not file.is_relative_to(top):
        raise PipelineError(f"{file}: is not in {top}", "LLAMA_PIPELINE_HOME names another home")
    return file.relative_to(top).parts[0]


def _noted(entry: Entry) -> dict[str, Any]:
    return {"sandbox": entry.sandbox} if entry.sandbox else {}


def _sorted(descriptors: Iterable[Descriptor]) -> tuple[Descriptor, ...]:
    return tuple(sorted(descriptors, key=lambda each: each.name))


# Packages


def _package(file: Path, entry: Entry, home: Home) -> BuildDefinition:
    """How the programs in a package were made."""
    manifest = manifest_of(file)
    recipe = (entry.source or {}).get("recipe")
    if not isinstance(recipe, Mapping):
        raise PipelineError(
            f"{file}: its receipt does not say how its programs were made",
            f"pack it again: {doitw('package force=1')}",
        )
    return BuildDefinition(
        build_type=PACKAGE,
        external_parameters={name: manifest[name] for name in ("platform", "backend", "portable")},
        internal_parameters={"recipe": dict(recipe)},
        resolved_dependencies=_sorted(_packed(manifest, recipe, home)),
    )


def _packed(manifest: Mapping[str, Any], recipe: Recipe, home: Home) -> Iterator[Descriptor]:
    """What the programs of a package were made from."""
    if recipe.get("step") == "prebuilt":
        for name, identity in recipe["assets"].items():
            uri = purl("github", "ggml-org/llama.cpp", recipe["release"], name)
            yield _digested(name, identity, uri)
    elif recipe.get("step") == "install_package":
        yield _digested("package", recipe["archive"])
    else:
        yield of_llama_cpp(manifest["commit"], manifest["tree"])
        yield from _archive(recipe["source"], home)


def manifest_of(archive: Path) -> dict[str, Any]:
    """The manifest in a package of ours. Raises PipelineError."""
    try:
        if archive.suffix == ".zip":
            with zipfile.ZipFile(archive) as packed:
                data = packed.read(MANIFEST)
        else:
            with tarfile.open(archive) as tar:
                member = tar.extractfile(MANIFEST)
                data = member.read() if member else b""
        manifest: dict[str, Any] = json.loads(data)
    except (OSError, KeyError, ValueError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise PipelineError(f"{archive}: its {MANIFEST} cannot be read: {error}") from None
    return manifest
