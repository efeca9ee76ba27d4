"""Safetensors that are quantized already: which of them the official converter can read.

What it reads is in `dequant_model` and `prepare_tensors` of its conversion/base.py, and in the
methods of the same name of single architectures.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from pipeline.core.errors import PipelineError

HINT = "get the model that it was made from, unquantized, or a GGUF of it"

# By quant_method. The names that people know, where they differ.
NAMES = {
    **{"awq": "AWQ", "gptq": "GPTQ", "hqq": "HQQ", "exl2": "EXL2", "exl3": "EXL3", "aqlm": "AQLM"},
    **{"eetq": "EETQ", "vptq": "VPTQ", "spqr": "SpQR", "quip": "QuIP#", "fp8": "FP8"},
    **{"fbgemm_fp8": "FBGEMM FP8", "auto-round": "AutoRound", "intel/auto-round": "AutoRound"},
    **{"modelopt": "ModelOpt", "mxfp4": "MXFP4", "quanto": "Quanto", "mlx": "MLX"},
}
# By what is in the names of tensors, where the configuration does not say it.
TENSORS = {
    ".qweight": "GPTQ or AWQ, and its config.json has no quantization_config",
    ".q_weight": "EXL2",
    ".trellis": "EXL3",
    ".absmax": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".quant_state.bitsandbytes__": "bitsandbytes",
    ".W_q": "HQQ",
    ".codebooks": "AQLM",
    ".Qidxs": "QuIP#",
    ".weight_packed": "compressed-tensors, and its config.json has no quantization_config",
}
PACKED = ("U8", "I8", "U32", "I32")  # element types of weights that are packed
# Architectures whose own code reads more than others.
OWN = {
    "GptOssForCausalLM": ("mxfp4",),
    "DeepseekV4ForCausalLM": ("fp8",),
    "MiMoV2ForCausalLM": ("mxfp4",),  # in store_dtype
    "MiMoV2FlashForCausalLM": ("mxfp4",),
    "KimiK3ForConditionalGeneration": ("mxfp4-pack-quantized",),
}
MODELOPT_FILE = "hf_quant_config.json"  # of the converter's other place to look
NVFP4 = "nvfp4-pack-quantized"  # of compressed-tensors
MODELOPT = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "NVFP4", "W4A16_NVFP4", "MIXED_PRECISION")


def require_readable(
    config: Mapping[str, Any],
    modelopt: Mapping[str, Any],
    tensors: Collection[str],
    dtypes: Mapping[str, int],
    where: str,
) -> None:
    """Raise PipelineError where the weights are quantized in a way that the converter cannot read.

    `config` is config.json, `modelopt` the hf_quant_config.json beside it, or empty; `tensors` are
    the names in a file of the weights, `dtypes` their bytes by element type.
    """
    if kind := _unreadable(config, modelopt, tensors, dtypes):
        raise PipelineError(
            f"{where}: its weights are quantized with {kind}, which llama.cpp's converter cannot "
            "read",
            HINT,
        )


def _unreadable(
    config: Mapping[str, Any],
    modelopt: Mapping[str, Any],
    tensors: Collection[str],
    dtypes: Mapping[str, int],
) -> str:
    """The quantization that cannot be read; empty where all can be."""
    settings = _settings(config, modelopt)
    method = str(settings.get("quant_method") or "").lower()
    own = OWN.get(str(next(iter(config.get("architectures") or ()), "")), ())
    if not method:
        return _by_tensors(_table(config, "quantization") or settings, tensors, dtypes)
    if {method, str(settings.get("format")), str(settings.get("store_dtype"))} & {*own}:
        return ""
    name = NAMES.get(method, method if method.isprintable() else repr(method))
    detail = DETAILS.get(method, _bits)(settings, tensors)
    return f"{name} ({detail})" if detail else "" if method in DETAILS else name


def _settings(config: Mapping[str, Any], modelopt: Mapping[str, Any]) -> dict[str, Any]:
    """Where the converter looks: in the configuration, that of the text model first."""
    text, whole = _table(config, "text_config"), _table(config, "quantization_config")
    settings = _table(text, "quantization_config") or whole
    producer = str(_table(modelopt, "producer").get("name", ""))
    if producer:
        return {"quant_method": producer, **settings, **_table(modelopt, "quantization")}
    return settings


def _table(holder: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = holder.get(name)
    return value if isinstance(value, dict) else {}


def _by_tensors(
    settings: Mapping[str, Any], tensors: Collection[str], dtypes: Mapping[str, int]
) -> str:
    """The quantization without a quant_method: MLX writes none, older tools no settings at all."""
    if "group_size" in settings and "bits" in settings:
        return f"MLX ({settings['bits']} bits)"
    for part, kind in TENSORS.items():
        if any(part in tensor for tensor in tensors):
            return kind
    largest = max(dtypes, key=lambda name: dtypes[name], default="")
    return f"an unknown method (most of them are {largest})" if largest in PACKED else ""


# What of each method cannot be read, in a few words; empty: all of it can be.


def _bits(settings: Mapping[str, Any], tensors: Collection[str]) -> str:
    for bits in (4, 8):
        if settings.get(f"load_in_{bits}bit"):
            return f"{bits} bits"
    bits = next((settings[key] for key in ("bits", "w_bit", "nbits") if key in settings), 0)
    return f"{bits} bits" if bits else ""


def _gptq(settings: Mapping[str, Any], tensors: Collection[str]) -> str:
    form = settings.get("checkpoint_format", "gptq")
    if settings.get("is_marlin_format") or form not in ("gptq", "gptq_v2"):
        return "in Marlin's layout" if form == "gptq" else f"in the layout {form}"
    return "" if settings.get("bits") in (2, 4, 8) else f"{settings.get('bits')} bits"


def _modelopt(settings: Mapping[str, Any], tensors: Collection[str]) -> str:
    algorithm = settings.get("quant_algo")
    return "" if algorithm in (None, *MODELOPT) else str(algorithm)


def _compressed(settings: Mapping[str, Any], tensors: Collection[str]) -> str:
    form, groups = settings.get("format"), list(_table(settings, "config_groups").values())
    formats = {group.get("format") for group in groups if isinstance(group, dict)}
    if form == NVFP4 or (form == "mixed-precision" and formats == {NVFP4}):
        return ""
    if len(groups) != 1 or not isinstance(groups[0], dict):
        return f"{form}, {len(groups)} groups of settings"
    weights = _table(groups[0], "weights")
    strategy, size = weights.get("strategy"), weights.get("group_size")
    if form in ("float-quantized", "int-quantized", "naive-quantized"):
        fine = strategy in ("channel", "block") and size is None
    else:
        fine = form == "pack-quantized" and strategy == "group" and bool(size)
        fine = fine and weights.get("type", "int") == "int"
        fine = fine and not any(tensor.endswith(".weight_g_idx") for tensor in tensors)
    return "" if fine else f"{form}, by {strategy}"


DETAILS: Mapping[str, Callable[[Mapping[str, Any], Collection[str]], str]] = {
    "bitnet": lambda settings, tensors: "",
    "gptq": _gptq,
    "fp8": lambda settings, tensors: (
        "with weight_scale" if any(t.endswith(".weight_scale") for t in tensors) else ""
    ),
    "modelopt": _modelopt,
    "compressed-tensors": _compressed,
}
