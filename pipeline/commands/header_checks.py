"""What the header of a model shows before its weights are downloaded or converted: that no mix has
the requested size, that a limit of quality is for another kind of model, that a text is too short,
or an importance matrix of another model."""

from __future__ import annotations

from msgspec.structs import replace

from pipeline.models import gguf, imatrix, quantize, text_length
from pipeline.report import quality

from . import headers, quality_gate, quality_setup
from .model import Model


def are_due(model: Model) -> bool:
    """Whether there is something that the header decides."""
    chain = model.chain()
    made = chain and chain.quantization
    is_chosen = bool(made and made.budget and made.types is None)
    matrix = made and made.imatrix
    is_read = bool(matrix and (not imatrix.is_text(matrix) or text_length.may_be_short(matrix)))
    return chain is not None and (is_chosen or is_read or model.request.has_limit)


def require(model: Model) -> None:
    """Raise PipelineError where the mix of the request cannot be made, its limit cannot be
    measured, or a text of the user's is too short. Nothing is checked where the header cannot be
    read yet."""
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
        quality_setup.require_long_enough(request, setup, source)
        quality.require_room(setup, header, quality.verdict_wants(bound, request.chunks))
    made = chain.quantization
    if made and made.imatrix and not imatrix.is_text(made.imatrix):
        imatrix.require_of(made.imatrix, source)
    elif made and made.imatrix and (reader := model.binaries.find("llama-perplexity")):
        text_length.require(reader, source, made.imatrix, "imatrix")
    if made and made.types is None and model.binaries.has("llama-quantize"):
        quantize.require_possible(made, source, model.binaries.program("llama-quantize"))
