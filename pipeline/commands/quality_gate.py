"""max_kld= and min_cosine=: a quant is published only if it keeps to a limit against the
unquantized model.

The quant is measured under its temporary name. What was measured is kept, so that a run that finds
the file made and measured has nothing to do.
"""

from __future__ import annotations

from msgspec.structs import replace

from pipeline.core.errors import UsageError
from pipeline.core.store import receipts
from pipeline.models import chain as chains
from pipeline.models import gguf, quants
from pipeline.models.chain import Chain, Needs
from pipeline.models.convert import Unquantized
from pipeline.models.gguf import Header
from pipeline.report.quality import Limit, kind_of
from pipeline.report.quality_statistics import Verdict

from . import quality_setup
from .programs import Programs
from .request import Request

OF_KIND = {"max_kld": "language", "min_cosine": "embedding"}
NAMES = {"language": "a language model", "embedding": "an embedding model", "rerank": "a reranker"}


def limit(request: Request) -> Limit | None:
    """The limit of the request. Raises UsageError where there are two."""
    if request.max_kld is not None and request.min_cosine is not None:
        raise UsageError(
            "max_kld= and min_cosine= contradict each other",
            "max_kld= is for language models, min_cosine= for embedding models",
        )
    if request.max_kld is not None:
        return Limit("max_kld", request.max_kld, "kld")
    if request.min_cosine is not None:
        return Limit("min_cosine", request.min_cosine, "cosine")
    return None


def require_kind(bound: Limit, header: Header, name: str) -> None:
    """Raise UsageError where the limit is for another kind of model than this one."""
    kind = kind_of(header)
    if OF_KIND[bound.name] != kind:
        other = next((each for each, of in OF_KIND.items() if of == kind), "")
        raise UsageError(
            f"{bound.name}={bound.value:g}: {name} is {NAMES[kind]} ({header.architecture})",
            f"{bound.name}= is for {OF_KIND[bound.name]} models; "
            + (f"pass {other}=" if other else "leave it out"),
        )


def is_quantized(chain: Chain) -> bool:
    """Whether the chain makes a quant, with llama-quantize or as the converter's output."""
    direct = chain.conversion
    return bool(chain.quantization or (direct and direct.outtype not in quants.UNQUANTIZED))


def reference(chain: Chain, *, keep: bool = False) -> Unquantized:
    """What the quant of the chain is compared with; `keep`: it is to stay. Raises UsageError where
    nothing is quantized."""
    if not is_quantized(chain):
        raise UsageError(
            f"{chain.resolved.name}: nothing is quantized here, so there is no loss to limit",
            "leave max_kld= or min_cosine= out, or name a quant of an unquantized model",
        )
    if made := chain.quantization:
        return Unquantized(path=made.input, conversion=made.conversion)
    resolved, direct = chain.resolved, chain.conversion
    if direct is None:
        raise ValueError("a quant is made of something")
    precision = resolved.precision
    path = direct.target.with_name(f"model.{precision.lower()}.gguf")
    return Unquantized(
        path=path, conversion=replace(direct, target=path, outtype=precision, keep=keep)
    )


def is_passed(request: Request, programs: Programs, chain: Chain) -> bool:
    """Whether the finished quant was measured, and keeps to the limit: by receipts alone."""
    bound, home = limit(request), programs.home
    if bound is None:
        return True
    base = reference(chain).digest(home)
    quant = receipts.known_sha256(chain.final)
    if not (base and quant):
        return False
    setup = quality_setup.setup(request, programs, gguf.read_cached(chain.final, home.run))
    return bound.verdict(setup.known(base, quant)) is Verdict.PASSED


def needs(request: Request, programs: Programs, chain: Chain, due: Needs) -> Needs:
    """What the steps have to do where a quant that is made was not measured: the unquantized model
    is needed once more."""
    if due.quantize or due.convert or not is_quantized(chain):
        return due
    if is_passed(request, programs, chain):
        return due
    why = "its quality is not measured"
    conversion = reference(chain).conversion
    if conversion is None:
        return replace(due, quantize=why)
    fetch = chains.unfetched(chain.resolved)
    if chain.quantization is None:
        return replace(due, fetch=fetch, convert=why)
    is_there = conversion.status is receipts.Status.CURRENT
    return replace(
        due, fetch="" if is_there else fetch, convert="" if is_there else why, quantize=why
    )
