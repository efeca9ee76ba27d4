"""From a resolved reference to the GGUF that is served: which steps lie between, and which of
them have something to do. Nothing here changes anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.errors import UsageError, did_you_mean
from pipeline.core.paths import Home
from pipeline.core.store import receipts
from pipeline.core.store.receipts import Status

from . import converter, quants
from .convert import Conversion
from .quantize import Quantization
from .resolve import Resolved

DEFAULT_QUANT = "Q4_K_M"


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantRequest:
    """What is wanted of a model; `quant` is empty where nobody asked."""

    quant: str = ""
    keep_f16: bool = False
    imatrix: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """The steps of one model. `final` is the file that is served."""

    resolved: Resolved
    final: Path
    conversion: Conversion | None = None
    quantization: Quantization | None = None

    @property
    def fetches(self) -> bool:
        return not self.resolved.local

    @property
    def quant(self) -> str:
        """The type that is made; empty where a GGUF is taken as it is."""
        if self.quantization:
            return self.quantization.quant
        return self.conversion.outtype if self.conversion else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """Which steps have something to do, each with the reason; empty: up to date."""

    fetch: str = ""
    convert: str = ""
    quantize: str = ""


def require_makeable(wanted: QuantRequest) -> None:
    """Raise UsageError where llama-quantize cannot make what is wanted."""
    if wanted.quant and wanted.quant not in (*quants.TYPES, quants.AUTO, quants.ALL):
        raise UsageError(
            f"quant={wanted.quant.lower()}: is no type of llama-quantize"
            f"{did_you_mean(wanted.quant, quants.TYPES)}",
            "such names are for GGUF files that a repository already has",
        )
    if wanted.quant in quants.NEED_IMATRIX and not wanted.imatrix:
        raise UsageError(
            f"quant={wanted.quant.lower()}: needs an importance matrix",
            "give one: imatrix=PATH, or take a type that needs none, such as q4_k_m",
        )


def chain(
    resolved: Resolved, wanted: QuantRequest, home: Home, script: Path, source: Mapping[str, Any]
) -> Chain:
    """The steps that `wanted` takes. `script` is the converter, `source` names llama.cpp's tree.

    Raises UsageError.
    """
    made = home.models / "gguf" / resolved.slug
    if resolved.kind == "gguf":
        first = resolved.folder / resolved.files[0].name
        if not resolved.local or wanted.quant in ("", resolved.precision):
            if wanted.imatrix:
                raise UsageError("imatrix: is not used, the GGUF is taken as it is", "leave it out")
            if wanted.keep_f16:
                raise UsageError("keep_f16: the GGUF is taken as it is", "leave it out")
            return Chain(resolved=resolved, final=first)
        if resolved.precision not in quants.UNQUANTIZED:
            raise UsageError(
                f"{first}: is {resolved.precision or 'of unknown type'}, and quant="
                f"{wanted.quant.lower()} was asked for: quantizing twice costs quality",
                "leave quant out to serve the file as it is, or give the unquantized model",
            )
        require_makeable(wanted)
        target = made / f"model.{wanted.quant.lower()}.gguf"
        return Chain(
            resolved=resolved,
            final=target,
            quantization=Quantization(
                resolved=resolved,
                target=target,
                input=first,
                conversion=None,
                quant=wanted.quant,
                imatrix=wanted.imatrix,
            ),
        )

    require_makeable(wanted)
    quant = wanted.quant or DEFAULT_QUANT
    if wanted.imatrix and quant in quants.DIRECT:
        raise UsageError(f"imatrix: is not used for quant={quant.lower()}", "leave it out")
    if wanted.keep_f16 and quant in quants.DIRECT:
        raise UsageError(
            f"keep_f16: quant={quant.lower()} is written without a file between", "leave it out"
        )

    def conversion(outtype: str, keep: bool) -> Conversion:
        return Conversion(
            resolved=resolved,
            target=made / f"model.{outtype.lower()}.gguf",
            outtype=outtype,
            script=script,
            recipe={
                "step": "convert",
                "files": resolved.recipe(),
                "name": resolved.name,
                "outtype": outtype,
                "converter": {**source, "requirements": converter.requirements_sha256()},
            },
            keep=keep,
        )

    if quant in quants.DIRECT:
        direct = conversion(quant, keep=True)
        return Chain(resolved=resolved, final=direct.target, conversion=direct)
    first_step = conversion(resolved.precision, keep=wanted.keep_f16)
    target = made / f"model.{quant.lower()}.gguf"
    return Chain(
        resolved=resolved,
        final=target,
        conversion=first_step,
        quantization=Quantization(
            resolved=resolved,
            target=target,
            input=first_step.target,
            conversion=first_step,
            quant=quant,
            imatrix=wanted.imatrix,
        ),
    )


def final_status(chain: Chain, home: Home, tool: Mapping[str, Any] | None) -> Status:
    """How the served file stands to what made it; `tool` None: llama-quantize is not built."""
    if chain.quantization:
        known = chain.quantization.input_identity(home)
        recipe = chain.quantization.recipe(home, tool, known) if tool is not None else None
        if recipe is None:
            return Status.DIRTY if chain.final.exists() else Status.MISSING
        return receipts.status(chain.final, recipe)
    if chain.conversion:
        return receipts.status(chain.final, chain.conversion.recipe)
    return Status.CURRENT if not _unfetched(chain.resolved) else Status.DIRTY


def needs(
    chain: Chain, home: Home, tool: Mapping[str, Any] | None, *, force: bool = False
) -> Needs:
    """What each step has to do, from receipts and stamps alone."""
    final = Status.FORCED if force else final_status(chain, home, tool)
    fetch = _unfetched(chain.resolved) if chain.fetches else ""
    if not chain.conversion:
        quantize = final.value if chain.quantization and final is not Status.CURRENT else ""
        return Needs(fetch=fetch, quantize=quantize)
    if final is Status.CURRENT:
        return Needs(quantize="a step on the way is left over" if leftover(chain) else "")
    if not chain.quantization:
        return Needs(fetch=fetch, convert=final.value)
    between = (
        Status.FORCED
        if force
        else receipts.status(chain.conversion.target, chain.conversion.recipe)
    )
    if between is Status.CURRENT:
        return Needs(quantize=final.value)
    return Needs(fetch=fetch, convert=between.value, quantize=final.value)


def moved(chain: Chain, home: Home, tool: Mapping[str, Any] | None) -> Path | None:
    """A file that was copied or restored and that decides which steps have something to do."""
    final = final_status(chain, home, tool)
    if final is Status.MOVED:
        return chain.final
    between = chain.conversion if chain.quantization else None
    if between is None or final is Status.CURRENT:
        return None
    copied = receipts.status(between.target, between.recipe) is Status.MOVED
    return between.target if copied else None


def needs_keep_mark(chain: Chain) -> bool:
    """Whether the converted file is wanted for keeps, and recorded as a step on the way."""
    made = chain.conversion
    entry = made and receipts.load(made.target.parent).get(made.target.name)
    return bool(made and made.keep and entry and not entry.keep and made.target.exists())


def leftover(chain: Chain) -> bool:
    """Whether an intermediate file that nobody wanted kept is still there."""
    if not (chain.conversion and chain.quantization) or chain.conversion.keep:
        return False
    entry = receipts.load(chain.conversion.target.parent).get(chain.conversion.target.name)
    return entry is not None and not entry.keep and chain.conversion.target.exists()


def _unfetched(resolved: Resolved) -> str:
    """Why the model's files are not all there; empty: they are."""
    if resolved.local:
        return ""
    for file in resolved.files:
        found = receipts.status(resolved.folder / file.name, resolved.fetch_recipe(file))
        if found is not Status.CURRENT:
            return f"{file.name} is {found.value}"
    return ""
