"""How the quality of a model's quants is measured: with which program, on which text."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from pipeline.bins.compile import source
from pipeline.core.errors import UsageError
from pipeline.core.paths import Home
from pipeline.core.pins import pins
from pipeline.core.store import stat_cache
from pipeline.core.text import decoded
from pipeline.models import divergence, text_length, texts
from pipeline.models.gguf import Header
from pipeline.models.imatrix import is_text
from pipeline.report import quality, quality_similarity
from pipeline.report.quality import Setup
from pipeline.report.quality_similarity import Serving

from .programs import Programs
from .request import Request

PROGRAMS: dict[quality.Kind, str] = {
    "language": "llama-perplexity",
    "embedding": "llama-server",
    "rerank": "llama-server",
}


def setup(
    request: Request,
    programs: Programs,
    header: Header,
    *,
    ctx_size: int | None = None,
    serving: Serving | None = None,
) -> Setup:
    """How a model with this header is measured. `ctx_size` are the tokens of a chunk, `serving`
    starts a llama-server: both are for measuring, not for what was measured before. Raises
    PipelineError where the program is missing, or the user's text is too short, or no text can be
    read."""
    if not header.vocabulary:
        raise UsageError(
            "the model has no tokenizer, so its quality cannot be measured on a text",
            "leave it unmeasured (compare takes measure=speed), or pass a model with a tokenizer",
        )
    kind = quality.kind_of(header)
    name, binaries = PROGRAMS[kind], programs.binaries
    program, perplexity = binaries.program(name), None
    if kind == "language":
        wanted = {"--threads": request.threads, "--gpu-layers": request.gpu_layers}
        wanted["--device"] = request.device
        size = ctx_size or divergence.CTX_SIZE
        if not divergence.scored(size):
            raise UsageError(
                f"ctx_size={size}: a chunk has so few tokens that none of them is compared",
                "leave it out, or pass 3 at least; usual are 512 to 4096",
            )
        perplexity = divergence.Perplexity(
            program=program,
            logs=programs.home.logs,
            ctx_size=min(size, header.context_length or size),
            options=tuple(
                word for option, value in wanted.items() if value for word in (option, str(value))
            ),
        )
        if own := request.sample_text:
            text_length.require_bytes(own, "text", perplexity.ctx_size)
    made = Setup(
        home=programs.home,
        kind=kind,
        program_digest=binaries.sha256(name),
        text=lambda: text(request, programs.home),
        text_digest=text_digest(request, programs.home, kind),
        text_name=text_name(request),
        perplexity=perplexity,
        serving=serving,
    )
    if (own := request.sample_text) and not perplexity:
        quality_similarity.require_enough(own_text(own), made.text_name, made.documents)
    return made


def require_long_enough(request: Request, setup: Setup, source: Path) -> None:
    """Raise UsageError where the user's text is too short for the model whose GGUF, or skeleton of
    one, is `source`."""
    if (own := request.sample_text) and (tool := setup.perplexity):
        text_length.require(tool.program, source, own, "text", tool.ctx_size)


def text(request: Request, home: Home) -> str:
    """The user's text, or the one that llama.cpp's pinned tree brings, which is fetched where it is
    not on disk. Raises PipelineError."""
    if own := request.sample_text:
        return own_text(own)
    return texts.read(tree(home, offline=request.offline), "test")


def own_text(path: Path) -> str:
    """A text of the user's. Raises UsageError where it is none, or cannot be read."""
    if not is_text(path):  # before all of something else is read
        raise UsageError(f"text={path}: is not text", "pass a text in UTF-8")
    try:
        read = decoded(path.read_bytes())
    except (ValueError, OSError) as error:
        raise UsageError(f"text={path}: {error}", "pass a text in UTF-8") from None
    if not read.strip():
        raise UsageError(f"text={path}: is empty", "pass a text in UTF-8")
    return read


def tree(home: Home, *, offline: bool) -> Path:
    """llama.cpp's pinned tree. Raises PipelineError."""
    pinned = source.pinned(home)
    source.fetch(pinned, home, offline=offline)
    return pinned.folder


def text_digest(request: Request, home: Home, kind: quality.Kind) -> str:
    """The identity of the text, which need not be on disk where it is not the user's; or that of
    its passages, where models of this kind read these."""
    if own := request.sample_text:
        if kind == "language":
            return stat_cache.identity(home.digests, own)
        passages = json.dumps(quality_similarity.passages(own_text(own)))
        return hashlib.sha256(passages.encode()).hexdigest()
    documents = json.dumps([texts.VERSION, pins().llama_cpp_texts["test"]])
    return hashlib.sha256(documents.encode()).hexdigest()


def text_name(request: Request) -> str:
    """The text, for messages."""
    own = request.sample_text
    return f"text={own}" if own else f"{texts.NAMES['test']} ({texts.ORIGIN})"
