"""A quant is measured before it is published, and refused where it does not keep to the limit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.core.store import hashing, receipts
from pipeline.models import gguf
from pipeline.models.chain import Chain
from pipeline.models.formula import BITS
from pipeline.report import quality
from pipeline.report.quality import Measured
from pipeline.serve.config import instances
from pipeline.serve.config.llama import PreparedModel
from pipeline.serve.server import Server

from . import quality_gate, quality_setup, serve, server_options
from .model import Model

CTX_SIZE = 2048  # tokens that a server reads at once: several times what a passage has
# The next step of who is refused a quant.
LARGER = ("Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")


def check(model: Model, chain: Chain, base: Path) -> Callable[[Path], None] | None:
    """A function that raises PipelineError where the GGUF at a path is not to be published as the
    quant of the chain; None where there is no limit. `base` is the unquantized GGUF. Raises
    UsageError where the limit is for another kind of model."""
    bound = quality_gate.limit(model.request)
    if bound is None:
        return None
    header, name = gguf.read(base), chain.resolved.name
    quality_gate.require_kind(bound, header, name)
    setup = quality_setup.setup(
        model.request, model.programs, header, serving=lambda path: serving(model, path)
    )
    digest = quality_gate.reference(chain).digest(model.home, hashing=True)
    wants = quality.verdict_wants(bound, model.request.chunks)
    quality_setup.require_long_enough(model.request, setup, base)
    quality.require_room(setup, header, wants)
    quant = chain.quant

    def require(made: Path) -> None:
        known = receipts.known_sha256(made) or hashing.sha256(made)
        quants = {quant: Measured(path=made, digest=known)}
        samples = quality.measure(setup, Measured(path=base, digest=digest), quants, wants)
        quality.require(bound, samples[quant], f"{name} as {quant}", larger(quant))

    return require


def larger(quant: str) -> str:
    """The next step of who is refused this quant."""
    bits = BITS.get(quant, (0.0, 0.0))[0]
    next_one = next((each for each in LARGER if BITS[each][0] > bits), "")
    if not next_one or not bits:
        return "use a larger quant" if not bits else "serve it unquantized: quant=f16"
    return f"use a larger quant, such as quant={next_one.lower()}"


@contextmanager
def serving(model: Model, path: Path) -> Iterator[Server]:
    """A llama-server on a free port of this machine with the GGUF `path`, while the block runs.
    Raises PipelineError."""
    header = gguf.read(path)
    ours: dict[str, Any] = {"port": serve.free_port(), "host": "127.0.0.1"}
    # What the user's server gets has no part in what is measured.
    ours |= dict.fromkeys(("ctx_size", "parallel", "batch_size", "alias", "draft"))
    ours |= {"api_key_file": "", "adapters": (), "server": {}}
    request = model.request.replace(**ours)
    log_file = model.home.logs / f"quality-{request.port}.log"
    options = serve.checked_options(model, server_options.spec(request, "quality", str(log_file)))
    server = instances.llama_server(
        options,
        model.binaries.program("llama-server"),
        PreparedModel(
            path=path,
            pooling=header.pooling,
            ctx_size=header.context_length,
            fitted=min(header.context_length, CTX_SIZE),
        ),
        key=None,
        folder=path.parent,
        log=log_file,
        xdg=model.home.run / "xdg",
    )
    with serve.temporary(model.home, server):
        yield server
