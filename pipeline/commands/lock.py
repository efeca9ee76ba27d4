"""`lock` and `frozen=1`: what a model is made of, recorded, and compared with what is here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.bins import binaries
from pipeline.core import log
from pipeline.core.errors import UsageError
from pipeline.core.paths import require_writable as require_folder
from pipeline.core.store import receipts, stat_cache
from pipeline.core.store.receipts import Status
from pipeline.models import chain as chains
from pipeline.models import converter, fetch, lockfile
from pipeline.models.lockfile import LockedModel
from pipeline.models.resolve import ModelFile, Resolved

from .model import Steps


def lock(steps: Steps) -> None:
    """Write the entry of the prepared model into pipeline.lock. Raises PipelineError."""
    target = steps.lock_file
    lockfile.write(target, entry(steps))
    log.info(f"{target}: {steps.require_chain().resolved.name} is locked")


def require(steps: Steps, *, before: bool = False) -> None:
    """Raise UsageError where what is here, as far as it is known, differs from what is locked.

    `before` the work, a result that force=1 will make again is not compared.
    """
    if not steps.request.frozen:
        return
    locked, reference = steps.require_locked(), steps.require_reference()
    resolved = lockfile.resolved(locked, steps.home)  # reports now what is unusable in it
    if reference.kind == "hub" and resolved is None:
        raise UsageError(f"{steps.lock_file}: an entry's source.type must be hf", "lock again")
    if steps.chain() is not None:
        here = entry(steps)
        if before and steps.request.force:
            here.pop("result", None)
        lockfile.require_same(steps.lock_file, locked, here)


def require_writable(steps: Steps) -> None:
    """Raise PipelineError where pipeline.lock cannot be written."""
    require_folder(steps.lock_file.parent)


def entry(steps: Steps) -> LockedModel:
    """All that the model is made of, and the result once it exists. Raises PipelineError."""
    chain = steps.require_chain()
    resolved = chain.resolved
    source = {k: v for k, v in resolved.source.items() if k != "ref" or not resolved.local}
    locked: LockedModel = {
        "asked": steps.request.asked,
        "name": resolved.name,
        "kind": resolved.kind,
        "precision": resolved.precision,
        "source": source,
        "llama_cpp": llama_cpp(steps),
        "files": [_file(steps, resolved, file) for file in resolved.files],
    }
    if resolved.mmproj:
        locked["mmproj"] = resolved.mmproj
    if steps.request.mmproj:
        locked["mmproj_sha256"] = _sha256(steps, steps.request.mmproj)
    if not chain.quant:
        return locked
    if chain.conversion:
        locked["converter"] = {"requirements_sha256": converter.requirements_sha256()}
    locked["quantization"] = {"type": chain.quant}
    if chain.quantization and chain.quantization.imatrix:
        locked["quantization"]["imatrix_sha256"] = _sha256(steps, chain.quantization.imatrix)
    if chains.final_status(chain, steps.home, steps.tool) is Status.CURRENT:
        made = receipts.load(chain.final.parent)[chain.final.name]
        locked["result"] = {"name": chain.final.name, "sha256": made.sha256}
    return locked


def llama_cpp(steps: Steps) -> dict[str, str]:
    """The llama.cpp that converts, quantizes and serves."""
    identity = {"commit": steps.llama_cpp.commit, "tree": steps.llama_cpp.tree}
    if binaries.external(steps.home) and steps.binaries.has("llama-quantize"):
        identity["llama_quantize_sha256"] = steps.binaries.sha256("llama-quantize")
    return identity


def _file(steps: Steps, resolved: Resolved, file: ModelFile) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": file.name, "size": file.size}
    path = resolved.folder / file.name
    if file.blob and not file.sha256:  # a small file, of which the hub knows git's hash only
        known = receipts.load(path.parent).get(path.name)
        sha256 = {"sha256": known.sha256} if known and fetch.is_here(resolved, file) else {}
        return {**entry, "blob": file.blob, **sha256}
    return {**entry, "sha256": file.sha256 or _sha256(steps, path)}


def _sha256(steps: Steps, path: Path) -> str:
    """The hash of a user's own file, cached."""
    return stat_cache.identity(steps.home.run / "sha256.json", path)
