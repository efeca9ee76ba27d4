"""The estimate where nothing is built: close to what llama-fit-params tells, and safe to make from
whatever a stranger wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes import large_llama
from fakes.large_llama import Size
from twins import DENSE, GROUPED, Twin, conversion, skeleton_of

from pipeline.core.paths import Home
from pipeline.models import formula, gguf, memory, quantize, quants
from pipeline.models.formula import Shape, of_config, of_header, served
from pipeline.models.gguf import Header
from pipeline.models.memory import MIB, Device, Memory

SIZES = {
    "dense 7B": Size(layers=32, hidden=4096, feed_forward=11008, heads=32, kv_heads=32),
    "grouped 1B": Size(
        layers=16, hidden=2048, feed_forward=8192, heads=32, kv_heads=8, vocabulary=128256
    ),
    "experts 47B": Size(
        layers=32, hidden=4096, feed_forward=14336, heads=32, kv_heads=8, experts=8
    ),
}


@pytest.mark.build
@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_within_a_tenth_of_what_llama_cpp_tells(
    name: str, converter: Path, script: Path, program: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    elements = large_llama.make(folder, SIZES[name])
    made = conversion(folder, "BF16", Home(tmp_path / "home"), script)
    skeleton = skeleton_of(made, converter, tmp_path / "home" / "s.gguf")
    header = gguf.read(skeleton)
    config = json.loads((folder / "config.json").read_text())
    fit = program("llama-fit-params")
    for ctx_size in (4096, 32768, 131072):
        real = memory.measure(fit, "b", skeleton, [], ctx_size, tmp_path / "book")
        assert real and not real.estimate
        for shape in (of_header(header), of_config(config, elements, "BF16")):
            estimate = formula.memory(shape, ctx_size)
            assert estimate.estimate
            for part in ("total", "weights", "context", "compute"):
                assert getattr(estimate, part) == pytest.approx(getattr(real, part), rel=0.1), part
    some = ("Q4_K_M", "Q8_0", "IQ2_XXS", "Q2_K", "Q5_K_M", "F32")
    if not SIZES[name].experts:  # more bits go to some of their tensors
        some = tuple(formula.BITS)
    sizes = quantize.quant_sizes(program("llama-quantize"), skeleton, some)
    for quant in some:
        weights = of_config(config, elements, quant).weights
        assert weights == pytest.approx(sizes[quant], rel=0.1 if SIZES[name].experts else 0.03), (
            quant
        )


@pytest.mark.build
@pytest.mark.parametrize("size", [DENSE, GROUPED], ids=["dense", "grouped"])
def test_small_ones_too(
    size: Size, large: Callable[[Size], Twin], program: Callable[[str], Path], tmp_path: Path
) -> None:
    made = large(size)
    shape = of_header(gguf.read(made.real))
    for options in ([], ["--batch-size", "128"], ["--batch-size", "1024", "--ubatch-size", "1024"]):
        ubatch = int(options[-1]) if options else 512
        real = memory.measure(
            program("llama-fit-params"), "b", made.skeleton, options, 4096, tmp_path / "book"
        )
        assert real
        assert formula.memory(shape, 4096, ubatch).total == pytest.approx(real.total, rel=0.1)


def test_every_type_has_its_bits() -> None:
    assert set(formula.BITS) == set(quants.TYPES)


def test_a_value_for_each_layer() -> None:
    """Some models have another number of heads in each layer, and none in some."""
    values = {
        "general.architecture": "x",
        "x.block_count": 4,
        "x.embedding_length": 1024,
        "x.attention.head_count": [16, 16, 8, 16],
        "x.attention.head_count_kv": [4, 0, 2, 4],
        "x.attention.key_length": 128,
        "x.attention.value_length": 64,
        "x.feed_forward_length": [100, 400, 300, 200],
        "x.attention.causal": True,
    }
    shape = of_header(Header(tensors=1, size=1100, data=100, vocabulary=7, values=values))
    assert shape == Shape(
        weights=1000, cache=10 * (128 + 64), embedding=1024, feed_forward=400, vocabulary=7
    )
    assert of_header(Header(tensors=1, size=1, data=1, values=values), 5000).weights == 5000


def test_encoders_have_no_cache_and_no_next_word() -> None:
    values = {
        "general.architecture": "bert",
        "bert.block_count": 6,
        "bert.embedding_length": 384,
        "bert.attention.head_count": 12,
        "bert.feed_forward_length": 1536,
        "bert.attention.causal": False,
    }
    shape = of_header(Header(tensors=1, size=1100, data=100, vocabulary=30522, values=values))
    assert (shape.cache, shape.vocabulary) == (0, 0)
    config = {"model_type": "bert", "num_hidden_layers": 6, "hidden_size": 384, "vocab_size": 9}
    assert of_config(config, 22_000_000, "F16") == Shape(
        weights=44_000_000, cache=0, embedding=384, feed_forward=4 * 384, vocabulary=0
    )


def test_the_text_part_of_a_model_that_sees() -> None:
    text = {
        "num_hidden_layers": 10,
        "hidden_size": 512,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "intermediate_size": 2048,
        "vocab_size": 1000,
        "full_attention_interval": 5,
        "tie_word_embeddings": True,
    }
    config = {"hidden_size": 9, "vision_config": {"hidden_size": 8}, "text_config": text}
    shape = of_config(config, 100, "F16")
    assert shape == Shape(
        weights=200, cache=2 * 2 * 2 * 128, embedding=512, feed_forward=2048, vocabulary=1000
    )
    latent = {**text, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "full_attention_interval": None}
    assert of_config(latent, 100, "F16").cache == 10 * 576


VALUES: list[Any] = [
    *(None, "", "text", [], {}, [[]], [None], -1, 0, 10**400, 1.5, True, float("inf")),
    *([1, "a"], {"a": 1}, [10**400] * 3, float("nan"), "8", [-5]),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: str(value)[:20])
def test_what_a_stranger_wrote_is_no_crash(value: Any) -> None:
    names = (
        *("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads"),
        *("head_dim", "vocab_size", "intermediate_size", "text_config", "model_type"),
        *("kv_lora_rank", "num_experts_per_tok", "full_attention_interval"),
    )
    usual = {
        **{"num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 5},
    }
    keys = (
        *("block_count", "embedding_length", "attention.head_count", "attention.head_count_kv"),
        *("attention.key_length", "feed_forward_length", "expert_count", "expert_used_count"),
        *("full_attention_interval", "attention.causal"),
    )
    for name in names:
        _sound(formula.memory(of_config({**usual, name: value}, 100, "Q4_K_M"), 4096))
    for key in keys:
        values = {"general.architecture": "a", "a.block_count": 3, f"a.{key}": value}
        _sound(formula.memory(of_header(Header(tensors=1, size=1, data=1, values=values)), 4096))
    _sound(formula.memory(of_config(dict.fromkeys(names, value), 100, "Q4_K_M"), 4096))


def _sound(estimate: Memory) -> None:
    assert 0 <= float(estimate.total) < float("inf")


def test_the_server_scores_words_for_one_token_of_each_slot() -> None:
    shape = Shape(weights=0, cache=0, embedding=1024, feed_forward=2816, vocabulary=32000)
    layer = 512 * (4 * (3 * 2816 + 4 * 1024) + 2 * 4096)
    scores = 512 * 4 * (32000 + 2 * 1024)
    tool = formula.memory(shape, 4096)
    assert tool.compute == scores
    assert served(tool, shape, 4096) == Memory((Device("", 0, 0, layer),), estimate=True)
    # Of several devices the one that has the scores.
    rows = (Device("CUDA0", 5, 6, 100 * MIB), Device("Host", 1, 2, 5 * MIB))
    estimate = served(Memory(rows), shape, 4096)
    assert [row.compute for row in estimate.devices] == [100 * MIB - 512 * 4 * 32000, 5 * MIB]
    assert (estimate.weights, estimate.context) == (6, 8)
    # Where a layer is wider than the scores nothing changes.
    narrow = Shape(weights=0, cache=0, embedding=1024, feed_forward=28160, vocabulary=320)
    assert served(formula.memory(narrow, 4096), narrow, 4096) == formula.memory(narrow, 4096)
