"""How much memory a model takes, computed from its header or config.json.

For where llama.cpp is not built yet; once it is, `memory` asks it, and `served` corrects for what
llama-server does differently. Compared with llama-fit-params the estimate is within a tenth for
dense, grouped-query and mixture-of-experts models.
Layers with a sliding window are counted as if they kept the whole context: too much, never too
little. The states of recurrent layers, which are small, are left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from . import quants
from .gguf import Header
from .gguf_format import padded
from .memory import STEP, UNKNOWN, Device, Memory

UBATCH = 512  # llama.cpp's default for --ubatch-size
MOST = 1 << 40  # a limit for whatever a header claims
F16, F32 = 2, 4  # bytes of an element of the cache, and of an intermediate result

# Bits for each weight, of the layers and of the tables that grow with the vocabulary. Fitted to
# llama-quantize's dry runs on four Llama-like models of 1.5, 6.7, 8 and 71 billion weights with
# vocabularies of 32,000 and 128,256, and within 1.6 % of each.
BITS = {
    **{"Q1_0": (1.13, 3.85), "Q2_0": (2.25, 5.53), "TQ1_0": (1.69, 5.53), "TQ2_0": (2.06, 5.53)},
    **{"IQ1_S": (1.70, 4.05), "IQ1_M": (1.85, 4.06), "IQ2_XXS": (2.12, 4.08)},
    **{"IQ2_XS": (2.35, 4.10), "IQ2_S": (2.50, 4.42), "IQ2_M": (2.71, 4.43)},
    **{"Q2_K": (2.94, 4.59), "Q2_K_S": (2.70, 4.65), "IQ3_XXS": (3.05, 4.53)},
    **{"IQ3_XS": (3.26, 5.02), "IQ3_S": (3.45, 5.02), "IQ3_M": (3.61, 4.91)},
    **{"Q3_K_S": (3.45, 4.98), "Q3_K_M": (3.86, 4.97), "Q3_K_L": (4.21, 4.95)},
    **{"IQ4_XS": (4.30, 5.45), "IQ4_NL": (4.54, 5.57), "Q4_0": (4.50, 5.53), "Q4_1": (5.0, 5.78)},
    **{"Q4_K_S": (4.54, 5.53), "Q4_K_M": (4.81, 5.52), "Q5_0": (5.50, 6.03), "Q5_1": (6.0, 6.28)},
    **{"Q5_K_S": (5.50, 6.03), "Q5_K_M": (5.66, 6.03), "Q6_K": (6.56, 6.56)},
    **{"MXFP4_MOE": (8.5, 8.5), "Q8_0": (8.5, 8.5), "F16": (16, 16), "BF16": (16, 16)},
    "F32": (32, 32),
}


class Shape(Struct, frozen=True, kw_only=True):
    """What decides a transformer's memory. `weights` in bytes; `cache` is how many elements one
    token adds to the cache in all layers; the others are widths in elements."""

    weights: int
    cache: int
    embedding: int
    feed_forward: int  # of one layer, for as many experts as one token uses
    vocabulary: int  # 0 where no next word is predicted


def memory(shape: Shape, ctx_size: int, ubatch: int = UBATCH) -> Memory:
    """The estimate of llama-fit-params' figures at a context in tokens.

    The compute buffer is as large as the widest moment: in a layer, or the scores of all words.
    """
    tokens = padded(ctx_size, STEP)
    scores = ubatch * (shape.vocabulary + 2 * shape.embedding) * F32
    compute = max(_layer(shape, tokens, ubatch), scores)
    device = Device(UNKNOWN, shape.weights, tokens * shape.cache * F16, compute)
    return Memory((device,), estimate=True)


def served(memory: Memory, shape: Shape, ctx_size: int, ubatch: int = UBATCH) -> Memory:
    """What llama-server takes, from llama-fit-params' figures or an estimate.

    The tool reserves the scores of all words for each token of a batch. The server does so for
    models that pool, but otherwise computes them for one token of each slot.
    """
    scores, layer = ubatch * shape.vocabulary * F32, _layer(shape, ctx_size, ubatch)

    def lower(compute: int) -> int:
        return max(compute - scores, min(compute, layer)) if compute >= scores else compute

    devices = [replace(device, compute=lower(device.compute)) for device in memory.devices]
    return replace(memory, devices=tuple(devices))


def _layer(shape: Shape, tokens: int, ubatch: int) -> int:
    """Bytes of a layer's widest moment: its feed-forward part, with the attention's mask."""
    return ubatch * ((3 * shape.feed_forward + 4 * shape.embedding) * F32 + tokens * F16)


def of_header(header: Header, weights: int | None = None) -> Shape:
    """From a GGUF's header. `weights` are the bytes of all its tensors where it is split."""
    start = f"{header.architecture}."
    own = {k.removeprefix(start): v for k, v in header.values.items() if k.startswith(start)}
    layers = _number(own, "block_count")
    embedding = _number(own, "embedding_length")
    heads = _number(own, "attention.head_count")
    width = embedding // heads if heads else 0
    of_layers = own.get("attention.head_count_kv", heads)
    kv_heads = (
        sum(_whole(count) for count in of_layers)
        if isinstance(of_layers, list)
        else layers * _whole(of_layers)
    )
    lengths = (f"attention.{name}_length" for name in ("key", "value"))
    cache = kv_heads * sum(_number(own, name, default=width) for name in lengths)
    encodes = own.get("attention.causal") is False  # it reads a text in one pass: no cache
    return Shape(
        weights=header.size - header.data if weights is None else weights,
        cache=0 if encodes else cache // max(1, _number(own, "full_attention_interval")),
        embedding=embedding,
        feed_forward=max(
            _number(own, "feed_forward_length") if not _number(own, "expert_count") else 0,
            _number(own, "expert_feed_forward_length", "feed_forward_length")
            * _number(own, "expert_used_count"),
        ),
        vocabulary=0 if encodes else header.vocabulary or _number(own, "vocab_size"),
    )


def of_config(config: Mapping[str, Any], elements: int, quant: str) -> Shape:
    """From a model's config.json and the count of its weights, as it will be quantized."""
    own = dict(config)
    for name in ("text_config", "llm_config"):  # of models that see or hear too
        if isinstance(config.get(name), dict):
            own |= config[name]
    layers = _number(own, "num_hidden_layers", "n_layer", "n_layers")
    embedding = _number(own, "hidden_size", "n_embd", "d_model")
    heads = _number(own, "num_attention_heads", "n_head", "n_heads")
    width = _number(own, "head_dim", default=embedding // heads if heads else 0)
    cache = 2 * width * layers * _number(own, "num_key_value_heads", default=heads)
    if _number(own, "kv_lora_rank"):  # multi-head latent attention keeps one vector a layer
        cache = layers * (_number(own, "kv_lora_rank") + _number(own, "qk_rope_head_dim"))
    encodes = re.search(r"bert|roberta", str(own.get("model_type", ""))) is not None
    vocabulary = _number(own, "vocab_size")
    tables = vocabulary * embedding * (1 if encodes or own.get("tie_word_embeddings") else 2)
    experts = _number(own, "num_experts_per_tok", "moe_topk")
    return Shape(
        weights=weight_bytes(elements, tables, quant),
        cache=0 if encodes else cache // max(1, _number(own, "full_attention_interval")),
        embedding=embedding,
        feed_forward=_number(own, "moe_intermediate_size", "intermediate_size") * experts
        if experts
        else _number(own, "intermediate_size", "n_inner", default=4 * embedding),
        vocabulary=0 if encodes else vocabulary,
    )


def weight_bytes(elements: int, tables: int, quant: str) -> int:
    """Bytes of `elements` weights, of which `tables` belong to the vocabulary."""
    if size := quants.budget(quant):
        return size.bytes or int(elements * size.bits / 8)
    layers, words = BITS[quant]
    tables = min(elements, tables)
    return int(((elements - tables) * layers + tables * words) / 8)


def _number(values: Mapping[str, Any], *names: str, default: int = 0) -> int:
    """The first of `names` that is a number; the largest where there is one for each layer."""
    for name in names:
        value = values.get(name)
        number = (
            max(map(_whole, value), default=0) if isinstance(value, Sequence) else _whole(value)
        )
        if number:
            return number
    return default


def _whole(value: object) -> int:
    return min(value, MOST) if isinstance(value, int) and value > 0 else 0
