"""Make a LoRA adapter for the tiny Llama as PEFT saves one: random, and strong enough that answers
change."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .tiny_llama import F32, HIDDEN, INTERMEDIATE, LAYERS, Dtype, stored, write_safetensors

RANK, ALPHA = 4, 8
# Both shapes that are not square, and one that the converter permutes.
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": RANK,
    "lora_alpha": ALPHA,
    "target_modules": [name.rpartition(".")[2] for name in SHAPES],
    "bias": "none",
    "modules_to_save": None,
    "use_dora": False,
    "base_model_name_or_path": "org/tiny-llama",
}


def weights(seed: int = 0, rank: int = RANK) -> dict[str, F32]:
    """A and B of each tensor that is changed, by PEFT's names."""
    rng, made = np.random.default_rng(seed), {}
    for layer in range(LAYERS):
        for module, (rows, columns) in SHAPES.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            for part, shape in (("A", (rank, columns)), ("B", (rows, rank))):
                values = rng.standard_normal(shape, dtype=np.float32) / math.sqrt(shape[1])
                made[f"{name}.lora_{part}.weight"] = values
    return made


def save(folder: Path, tensors: Mapping[str, F32], *, dtype: Dtype = "f32", **config: Any) -> Path:
    """An adapter with these tensors, and with these keys in its config."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {name: stored(values, dtype) for name, values in tensors.items()}
    write_safetensors(folder / "adapter_model.safetensors", content, dtype)
    text = json.dumps(CONFIG | config, indent=1)
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")
    return folder


def make(folder: Path, *, seed: int = 0, dtype: Dtype = "f32", **config: Any) -> Path:
    """An adapter for the tiny Llama."""
    return save(folder, weights(seed), dtype=dtype, **config)


def merged(values: Mapping[str, F32], adapter: Mapping[str, F32], scale: float) -> dict[str, F32]:
    """The weights of a model with an adapter merged into them."""
    made = dict(values)
    for name, a in adapter.items():
        if name.endswith(".lora_A.weight"):
            b = adapter[name.replace("lora_A", "lora_B")]
            of_model = name.removeprefix("base_model.model.").replace(".lora_A", "")
            made[of_model] = values[of_model] + scale * ALPHA / RANK * (b @ a)
    return made
