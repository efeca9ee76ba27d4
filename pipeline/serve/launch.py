"""The command line and the environment of one llama-server. Nothing here has an effect."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from pipeline.core.environment import INHERITED

OURS = ("LLAMA_SERVER_BINS_DIR",)

# Options for which llama-server needs the network (common/arg.cpp of the pinned llama.cpp): models
# by repository or address, and its own presets. With a projector it also fetches images that a
# request names by address.
MODEL = {"-m", "--model"}
DOWNLOADS = re.compile(
    r"-hf\w*|-mu|-mmu|-mm|-dr|--hf-(repo|file)(-draft)?|--spec-draft-hf|--docker-repo|--mmproj"
    r"|--(model|mmproj|lora)-url|--models-preset|--(embd|fim|gpt-oss|vision)-[\w.-]+"
)


def endpoint_options(pooling: str) -> list[str]:
    """Embedding models and rerankers get their endpoint, as their own metadata asks for it."""
    if pooling == "none":
        return []
    return ["--reranking" if pooling == "rank" else "--embeddings", "--pooling", pooling]


def batch_options(pooling: str, ctx_size: int, batch_size: int | None) -> list[str]:
    """Models that pool read a whole text in one batch, so it is as long as the context."""
    if pooling == "none":
        return ["--batch-size", str(batch_size)] if batch_size else []
    batch = str(batch_size or ctx_size)
    return ["--batch-size", batch, "--ubatch-size", batch]


def inherited(environ: Mapping[str, str]) -> list[str]:
    """The inherited variables that would silently change a launch."""
    return sorted(name for name in environ if name.startswith(INHERITED) and name not in OURS)


def downloads(arguments: Iterable[str]) -> bool:
    """Whether llama-server may need the network when started with these arguments. Without a model
    it is a router, which fetches models on request."""
    options = {word.replace("_", "-") for word in arguments}
    return not options & MODEL or any(map(DOWNLOADS.fullmatch, options))
