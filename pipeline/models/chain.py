"""The steps from a resolved reference to the GGUF that is served, and which of them are due.
Nothing here changes anything on disk."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from pipeline.core.errors import UsageError
from pipeline.core.paths import Home
from pipeline.core.store import receipts
from pipeline.core.store.receipts import Recipe, Status

from . import convert, quantize, quants
from .resolve import Resolved, slug

PROJECTOR_TYPE = "F16"  # an encoder loses little, and not every backend has BF16


class Chain(Struct, frozen=True, kw_only=True):
    """The steps of one model. `final` is the file that is served."""

    resolved: Resolved
    final: Path
    conversion: convert.Conversion | None = None
    quantization: quantize.Quantization | None = None
    projector: convert.Conversion | None = None

    @property
    def quant(self) -> str:
        """The type that is made; empty where a GGUF is served as it is."""
        if self.quantization:
            return self.quantization.quant
        return self.conversion.outtype if self.conversion else ""


class Needs(Struct, frozen=True, kw_only=True):
    """Which steps are due, each with the reason; empty: up to date."""

    fetch: str = ""
    convert: str = ""
    quantize: str = ""
    projector: str = ""


def chain(
    resolved: Resolved,
    requested: quants.QuantRequest,
    home: Home,
    script: Path,
    llama_cpp: Recipe,
    *,
    projector: bool = False,
) -> Chain:
    """The steps that `requested` takes. `script` is the converter, `llama_cpp` the recipe of its
    tree; `projector`: the model's projector is converted too. Raises UsageError."""
    made = _model_chain(resolved, requested, home, script, llama_cpp)
    if not (projector and made.conversion):
        return made
    conversion = replace(
        made.conversion,
        target=made.final.with_name("mmproj.f16.gguf"),
        outtype=PROJECTOR_TYPE,
        keep=True,
        projector=True,
    )
    return replace(made, projector=conversion)


def _model_chain(
    resolved: Resolved, requested: quants.QuantRequest, home: Home, script: Path, llama_cpp: Recipe
) -> Chain:
    """The steps that end in the model itself. Raises UsageError."""
    folder = home.models / "gguf" / resolved.slug
    quant = requested.quant or quants.DEFAULT
    target = folder / f"model.{quant.lower()}.gguf"
    conversion = None
    if resolved.kind == "gguf":
        file = resolved.folder / resolved.files[0].name
        is_chosen = resolved.source["type"] == "hf"  # with this quant, among those that are there
        if is_chosen or requested.quant in ("", resolved.precision):
            _require_no_options(requested, ": the GGUF is served as it is")
            return Chain(resolved=resolved, final=file)
        if resolved.precision not in quants.UNQUANTIZED:
            raise UsageError(
                f"{file}: is {resolved.precision or 'of unknown type'}: quantizing it again "
                f"(quant={quant.lower()}) would cost quality",
                "leave quant out to serve the file as it is, or pass the unquantized model",
            )
        quants.require_makeable(requested)
    else:
        quants.require_makeable(requested)
        if quant == quants.FIT:
            precision = resolved.precision or "of unknown type"
            raise UsageError(
                f"quant=fit: {resolved.name} is {precision}: a mix is made of an unquantized model",
                "pass quant=auto, or the unquantized model",
            )
        is_direct = quant in quants.DIRECT
        if is_direct:
            _require_no_options(requested, f" for quant={quant.lower()}: it is converted directly")
        outtype = quant if is_direct else resolved.precision
        conversion = convert.Conversion(
            resolved=resolved,
            target=folder / f"model.{outtype.lower()}.gguf",
            outtype=outtype,
            script=script,
            llama_cpp=llama_cpp,
            keep=is_direct or requested.keep_f16,
        )
        if is_direct:
            return Chain(resolved=resolved, final=target, conversion=conversion)
        file = conversion.target
    quantization = quantize.Quantization(
        resolved=resolved,
        target=target,
        input=file,
        conversion=conversion,
        quant=quant,
        imatrix=requested.imatrix,
        types=requested.types,
    )
    return Chain(resolved=resolved, final=target, conversion=conversion, quantization=quantization)


def _require_no_options(requested: quants.QuantRequest, why: str) -> None:
    """Raise UsageError for options of a quantization where there is none."""
    for name, value in (("imatrix", requested.imatrix), ("keep_f16", requested.keep_f16)):
        if value:
            raise UsageError(f"{name}: not used{why}", "leave it out")


def adapter_chain(resolved: Resolved, home: Home, script: Path, llama_cpp: Recipe) -> Chain:
    """The steps of a LoRA adapter: one in safetensors is converted without a loss, to a type that
    every backend has. `script` is the converter of adapters, `llama_cpp` the recipe of its tree."""
    base = resolved.base
    if base is None:
        return Chain(resolved=resolved, final=resolved.folder / resolved.files[0].name)
    outtype = "F16" if resolved.precision == "F16" else "F32"
    # The same adapter may be made for several models: each has a file of its own.
    digest = hashlib.sha256(json.dumps(base.recipe(), sort_keys=True).encode()).hexdigest()[:8]
    name = f"{slug(resolved.name)}-{digest}.{outtype.lower()}.gguf"
    conversion = convert.Conversion(
        resolved=resolved,
        target=home.models / "gguf" / resolved.slug / name,
        outtype=outtype,
        script=script,
        llama_cpp=llama_cpp,
        keep=True,
    )
    return Chain(resolved=resolved, final=conversion.target, conversion=conversion)


def final_status(chain: Chain, home: Home, tool: Recipe | None) -> Status:
    """The status of the served file; `tool` None: llama-quantize is not built."""
    if chain.quantization:
        digest = chain.quantization.input_identity(home)
        if tool is None or digest is None:
            return Status.DIRTY if chain.final.exists() else Status.MISSING
        return receipts.status(chain.final, chain.quantization.recipe(home, tool, digest))
    if chain.conversion:
        return chain.conversion.status
    return Status.DIRTY if unfetched(chain.resolved) else Status.CURRENT


def needs(chain: Chain, home: Home, tool: Recipe | None, *, force: bool = False) -> Needs:
    """What each step has to do, from receipts and stamps alone."""
    needs = _model_needs(chain, home, tool, force=force)
    if chain.projector is None:
        return needs
    status = chain.projector.status
    if status is Status.CURRENT and not force:
        return needs
    fetch = needs.fetch or unfetched(chain.resolved)
    return replace(needs, fetch=fetch, projector=Status.FORCED.value if force else status.value)


def _model_needs(chain: Chain, home: Home, tool: Recipe | None, *, force: bool) -> Needs:
    """What the steps that end in the model itself have to do."""
    final = Status.FORCED if force else final_status(chain, home, tool)
    fetch = final.value if force and chain.resolved.fetched else unfetched(chain.resolved)
    if not chain.conversion:
        quantize = final.value if chain.quantization and final is not Status.CURRENT else ""
        return Needs(fetch=fetch, quantize=quantize)
    if final is Status.CURRENT:
        return Needs(quantize="an intermediate file is left over" if leftover(chain) else "")
    if not chain.quantization:
        return Needs(fetch=fetch, convert=final.value)
    conversion = chain.conversion
    unquantized = final if force else conversion.status
    if unquantized is Status.CURRENT:
        return Needs(quantize=final.value)
    return Needs(fetch=fetch, convert=unquantized.value, quantize=final.value)


def moved(chain: Chain, home: Home, tool: Recipe | None) -> Path | None:
    """A file that was copied or restored, and whose hash decides which steps are due."""
    if chain.projector and chain.projector.status is Status.MOVED:
        return chain.projector.target
    final = final_status(chain, home, tool)
    if final is Status.MOVED:
        return chain.final
    conversion = chain.conversion if chain.quantization else None
    if conversion is None or final is Status.CURRENT:
        return None
    return conversion.target if conversion.status is Status.MOVED else None


def needs_keep_mark(chain: Chain) -> bool:
    """Whether the converted file must be kept, although its receipt says that it need not be."""
    conversion = chain.conversion
    return bool(conversion and conversion.keep and _is_intermediate(conversion))


def leftover(chain: Chain) -> bool:
    """Whether an intermediate file is still there that need not be kept."""
    conversion = chain.conversion if chain.quantization else None
    return bool(conversion and not conversion.keep and _is_intermediate(conversion))


def _is_intermediate(conversion: convert.Conversion) -> bool:
    """Whether the converted file exists and is recorded as one that need not be kept."""
    entry = receipts.of(conversion.target)
    return entry is not None and not entry.keep and conversion.target.exists()


def unfetched(resolved: Resolved) -> str:
    """Why the model's files are incomplete; empty where they are complete."""
    for each in resolved.fetched:
        for file in each.files:
            status = receipts.status(each.folder / file.name, each.fetch_recipe(file))
            if status is not Status.CURRENT:
                return f"{file.name} is {status.value}"
    return ""
