"""Quantized safetensors: what the converter reads is converted, all else is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.core.errors import PipelineError
from pipeline.models import quantized

LLAMA = "LlamaForCausalLM"
PLAIN = ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight")
SCALED = (*PLAIN, "model.layers.0.mlp.up_proj.weight_scale")


def refusal(
    settings: Any,
    architecture: str = LLAMA,
    tensors: tuple[str, ...] = PLAIN,
    modelopt: dict[str, Any] | None = None,
    dtype: str = "BF16",
    **more: Any,
) -> str:
    """What is wrong with such a model; empty where nothing is."""
    config = {"architectures": [architecture], "quantization_config": settings, **more}
    try:
        quantized.require_readable(config, modelopt or {}, tensors, {dtype: 9}, "org/model")
    except PipelineError as error:
        assert error.message.startswith("org/model: its weights are quantized with ")
        assert "unquantized, or a GGUF" in error.hint
        return error.message
    return ""


def compressed(form: str, groups: int = 1, **weights: Any) -> dict[str, Any]:
    named = {f"group_{n}": {"weights": weights, "format": form} for n in range(groups)}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": named}


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes (4 bits)"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes (8 bits)"),
        ({"quant_method": "awq", "bits": 4}, "AWQ (4 bits)"),
        ({"quant_method": "AWQ", "w_bit": 4}, "AWQ (4 bits)"),
        ({"quant_method": "gptq", "bits": 3}, "GPTQ (3 bits)"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "GPTQ (in the layout"),
        ({"quant_method": "gptq", "bits": 4, "is_marlin_format": True}, "GPTQ (in Marlin"),
        ({"quant_method": "hqq"}, "HQQ"),
        ({"quant_method": "exl2", "bits": 4.65}, "EXL2 (4.65 bits)"),
        ({"quant_method": "exl3", "bits": 3.0}, "EXL3"),
        ({"quant_method": "torchao"}, "torchao"),
        ({"quant_method": "auto-round", "bits": 4}, "AutoRound (4 bits)"),
        ({"quant_method": "fbgemm_fp8"}, "FBGEMM FP8"),
        ({"quant_method": "mxfp4"}, "MXFP4"),
        ({"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"}, "ModelOpt (W4A16_AWQ)"),
        (compressed("float-quantized", strategy="tensor", num_bits=8), "by tensor"),
        (compressed("pack-quantized", strategy="channel", num_bits=4), "by channel"),
        (compressed("mxfp4-pack-quantized", strategy="group", group_size=32), "mxfp4-pack"),
        (compressed("marlin-24", strategy="group", group_size=128), "marlin-24"),
        (compressed("pack-quantized", 2, strategy="group", group_size=128), "2 groups"),
        ({"group_size": 64, "bits": 4}, "MLX (4 bits)"),
    ],
    ids=str,
)
def test_what_the_converter_cannot_read_is_named(settings: dict[str, Any], name: str) -> None:
    assert name in refusal(settings)
    assert name in refusal(None, text_config={"quantization_config": settings})


@pytest.mark.parametrize(
    "settings",
    [
        None,
        {},
        "hostile",
        {"quant_method": None},
        {"quant_method": "bitnet"},
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        *({"quant_method": "gptq", "bits": bits} for bits in (2, 4, 8)),
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"},
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        {"quant_method": "modelopt", "quant_algo": "FP8"},
        compressed("float-quantized", strategy="channel", num_bits=8),
        compressed("int-quantized", strategy="channel", num_bits=8),
        compressed("naive-quantized", strategy="block"),
        compressed("pack-quantized", strategy="group", group_size=128, num_bits=4, type="int"),
        compressed("nvfp4-pack-quantized", 2, strategy="tensor_group", group_size=16),
    ],
    ids=str,
)
def test_what_the_converter_reads_is_not_refused(settings: Any) -> None:
    assert refusal(settings) == ""


@pytest.mark.parametrize(
    ("tensor", "dtype", "name"),
    [
        ("model.layers.0.mlp.up_proj.qweight", "I32", "GPTQ or AWQ"),
        ("model.layers.0.mlp.up_proj.q_weight", "I32", "EXL2"),
        ("model.layers.0.mlp.up_proj.trellis", "I16", "EXL3"),
        ("model.layers.0.mlp.up_proj.weight.absmax", "U8", "bitsandbytes"),
        ("m.up_proj.weight.quant_state.bitsandbytes__nf4", "U8", "bitsandbytes"),
        ("model.layers.0.mlp.up_proj.W_q", "U8", "HQQ"),
        ("model.layers.0.mlp.up_proj.weight", "U32", "an unknown method (most of them are U32)"),
    ],
)
def test_tensors_tell_what_the_configuration_does_not(tensor: str, dtype: str, name: str) -> None:
    assert name in refusal(None, tensors=(*PLAIN, tensor), dtype=dtype)


def test_mlx_says_it_in_a_table_of_its_own() -> None:
    assert "MLX (8 bits)" in refusal(None, quantization={"group_size": 64, "bits": 8})
    assert refusal(None, quantization={"qformat_weight": "fp8_e4m3"}) == ""


def test_one_method_has_two_layouts() -> None:
    fp8 = {"quant_method": "fp8"}
    assert "FP8 (with weight_scale)" in refusal(fp8, tensors=SCALED)
    assert refusal(fp8, tensors=(*PLAIN, f"{PLAIN[1]}_scale_inv")) == ""
    packed = compressed("pack-quantized", strategy="group", group_size=128)
    assert "pack-quantized" in refusal(packed, tensors=(*PLAIN, f"{PLAIN[1]}_g_idx"))


def test_modelopts_own_file_counts_as_for_the_converter() -> None:
    producer = {"producer": {"name": "modelopt"}}
    awq = producer | {"quantization": {"quant_algo": "W4A16_AWQ"}}
    assert "ModelOpt (W4A16_AWQ)" in refusal(None, modelopt=awq)
    assert refusal(None, modelopt=producer | {"quantization": {"quant_algo": "NVFP4"}}) == ""


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("GptOssForCausalLM", {"quant_method": "mxfp4"}),
        ("DeepseekV4ForCausalLM", {"quant_method": "fp8"}),
        ("MiMoV2ForCausalLM", {"quant_method": "fp8", "store_dtype": "mxfp4"}),
        ("KimiK3ForConditionalGeneration", compressed("mxfp4-pack-quantized", strategy="group")),
    ],
)
def test_what_one_architecture_reads_by_itself(architecture: str, settings: dict[str, Any]) -> None:
    assert refusal(settings, architecture, SCALED, dtype="U8") == ""
