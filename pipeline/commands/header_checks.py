"""What the header of a model shows before its weights are downloaded or converted: that no mix has
the requested size, or that a limit of quality is for another kind of model."""

from __future__ import annotations

from msgspec.structs import replace

from pipeline.models import gguf, quantize
from pipeline.report import quality

from . import headers, quality_gate, quality_setup
from .model import Model


def are_due(model: Model) -> bool:
    """Whether there is something that the header decides."""
    chain = model.chain()
    made = chain and chain.quantization
    is_chosen = bool(made and made.budget and made.types is None)
    return chain is not None and (is_chosen or model.request.has_limit)


def require(model: Model) -> None:
    """Raise PipelineError where the mix of the request cannot be made, or its limit cannot be
    measured. Nothing is checked where the header cannot be read yet."""
    if not are_due(model):
        return
    chain, request, bound = model.require_chain(), model.request, quality_gate.limit(model.request)
    if bound:  # of a quant that the converter makes, too, the unquantized GGUF is compared
        chain = replace(chain, conversion=quality_gate.reference(chain).conversion)
    source = headers.unquantized(model, chain)
    if source is None:
        return
    if bound:
        header = gguf.read(source)
        quality_gate.require_kind(bound, header, chain.resolved.name)
        setup = quality_setup.setup(request, model.programs, header)
        quality.require_room(setup, header, quality.verdict_wants(bound, request.chunks))
    made = chain.quantization
    if made and made.types is None and model.binaries.has("llama-quantize"):
        quantize.require_possible(made, source, model.binaries.program("llama-quantize"))
