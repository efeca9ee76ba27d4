"""Measured figures, each with its error."""

from __future__ import annotations

from msgspec import Struct


class Estimate(Struct, frozen=True):
    """A mean and its standard error, both in the figure's own unit."""

    value: float
    error: float = 0.0


class Quality(Struct, frozen=True, kw_only=True):
    """What a quant lost against the unquantized model. What does not apply to the kind of model
    is None: the first three are of language models, `cosine` of embedders, `rank` of rerankers."""

    quant: str
    bytes: int
    bits_per_weight: float
    kld: Estimate | None = None  # mean Kullback-Leibler divergence, in nats a token
    ppl_ratio: Estimate | None = None  # perplexity over that of the unquantized model
    same_top: Estimate | None = None  # how often the most probable token is the same, 0 to 1
    cosine: Estimate | None = None  # mean cosine similarity of embeddings
    rank: Estimate | None = None  # rank correlation of scores (Spearman), -1 to 1
    samples: int = 0  # tokens, or texts, that were compared


class Speed(Struct, frozen=True, kw_only=True):
    """How fast a model runs here, in tokens a second."""

    prompt: Estimate
    decode: Estimate | None = None  # None: the model only embeds

    @property
    def main(self) -> Estimate:
        """The one that a user waits for."""
        return self.decode or self.prompt
