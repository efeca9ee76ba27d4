"""`lock` and `frozen=1`: what a model is made of, recorded, and compared with what is here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.bins import binaries
from pipeline.core import log
from pipeline.core.errors import UsageError
from pipeline.core.store import receipts, stat_cache
from pipeline.core.store.receipts import Status
from pipeline.models import chain as chains
from pipeline.models import converter, fetch, lockfile

from . import resolve
from .model import Model

if TYPE_CHECKING:
    from pipeline.models.quantize import Quantization
    from pipeline.models.resolve import ModelFile, Resolved

PROGRAM = "llama_quantize_sha256"  # of programs that were not made here


def lock(models: Iterable[Model]) -> None:
    """Write the entries of prepared models into pipeline.lock. Raises PipelineError."""
    for model in models:
        target = model.lock_file
        lockfile.write(target, entry(model))
        log.info(f"{target}: {model.require_chain().resolved.name} is locked")


def require(model: Model, *, before: bool = False) -> None:
    """Raise UsageError where what is here, as far as it is known, differs from what is locked.

    `before` the work a changed folder is hashed, and a result that force=1 will make again is not
    compared.
    """
    if not model.request.frozen:
        return
    locked, reference = model.require_locked(), model.require_reference()
    resolved = lockfile.resolved(locked, model.home)  # reports now what is unusable in it
    if reference.kind == "hub" and resolved is None:
        raise UsageError(f"{model.lock_file}: an entry's source.type must be hf", "lock again")
    if before and reference.path and model.known() is None:
        resolve.read_local(model, reference.path)
    if model.chain() is not None:
        here = entry(model)
        if is_of_same_source(model) and not pins_programs(locked):
            here["llama_cpp"].pop(PROGRAM, None)
        if before and model.request.force:
            here.pop("result", None)
        lockfile.require_same(model.lock_file, locked, here)


def entry(model: Model) -> lockfile.LockedModel:
    """All that the model is made of, and the result once it exists. Raises PipelineError."""
    chain = model.require_chain()
    resolved = chain.resolved
    origin = _origin(model, resolved)
    files = origin.pop("files")
    locked: lockfile.LockedModel = {
        "asked": model.request.model_words,
        **origin,
        "llama_cpp": llama_cpp(model),
        "files": files,
    }
    if resolved.base:  # the config files that an adapter is converted with
        locked |= {"base_name": resolved.base_name, "base": _origin(model, resolved.base)}
    if resolved.encoder:
        locked["encoder"] = resolved.encoder
    if resolved.mmproj:
        locked["mmproj"] = resolved.mmproj
    if model.request.mmproj:
        locked["mmproj_sha256"] = _sha256(model, model.request.mmproj)
    if not chain.quant:
        return locked
    if chain.conversion:
        locked["converter"] = {"requirements_sha256": converter.requirements_sha256()}
    locked["quantization"] = {"type": chain.quant}
    if chain.quantization and chain.quantization.budget:
        types = _types(model, chain.quantization)
        locked["quantization"] |= {"types": dict(types)} if types else {}
    if chain.quantization and chain.quantization.imatrix:
        locked["quantization"]["imatrix_sha256"] = _sha256(model, chain.quantization.imatrix)
    if chains.final_status(chain, model.home, model.programs.tool) is Status.CURRENT:
        made = receipts.load(chain.final.parent)[chain.final.name]
        locked["result"] = {"name": chain.final.name, "sha256": made.sha256}
    return locked


def _types(model: Model, made: Quantization) -> Mapping[str, str] | None:
    """The types of a mix by tensor, as pinned or once they are chosen."""
    if made.types is not None:  # its input need not be here, nor ever have been
        return made.types
    tool, digest = model.programs.tool, made.input_identity(model.home)
    return made.chosen(model.home, tool, digest) if tool and digest else None


def _origin(model: Model, resolved: Resolved) -> dict[str, Any]:
    """Where files come from, and each with its hash."""
    return {
        "name": resolved.name,
        "kind": resolved.kind,
        "precision": resolved.precision,
        "source": {k: v for k, v in resolved.source.items() if k != "ref" or not resolved.local},
        "files": [_file(model, resolved, file) for file in resolved.files],
    }


def llama_cpp(model: Model) -> dict[str, str]:
    """The llama.cpp that converts, quantizes and serves."""
    identity = {"commit": model.programs.llama_cpp.commit, "tree": model.programs.llama_cpp.tree}
    if binaries.external(model.home) and model.binaries.has("llama-quantize"):
        identity[PROGRAM] = model.binaries.sha256("llama-quantize")
    return identity


def is_of_same_source(model: Model) -> bool:
    """Whether somebody else's programs, such as an image's, are a package of this llama.cpp: then
    they are what a checkout makes, whose lock pins the source alone."""
    own = binaries.external(model.home)
    tree = model.programs.llama_cpp.tree
    return own is not None and binaries.packed(own.folder, "tree") == tree


def pins_programs(locked: lockfile.LockedModel) -> bool:
    known = locked.get("llama_cpp")
    return isinstance(known, dict) and PROGRAM in known


def _file(model: Model, resolved: Resolved, file: ModelFile) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": file.name, "size": file.size}
    path = resolved.folder / file.name
    if file.blob and not file.sha256:  # a small file, of which the hub knows git's hash only
        known = receipts.of(path)
        sha256 = {"sha256": known.sha256} if known and fetch.is_here(resolved, file) else {}
        return {**entry, "blob": file.blob, **sha256}
    return {**entry, "sha256": file.sha256 or _sha256(model, path)}


def _sha256(model: Model, path: Path) -> str:
    """The hash of a user's own file, cached."""
    return stat_cache.identity(model.home.digests, path)
