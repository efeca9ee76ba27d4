"""Make a Llama of any size whose weights are a hole: all zero, and nothing on the disk.

Headers, conversions and memory are those of a real one; nothing about them depends on values.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from fakes import tiny_llama

WINDOW = 1 << 24  # numbers that are made at once


@dataclass(frozen=True, kw_only=True)
class Size:
    layers: int
    hidden: int
    feed_forward: int
    heads: int
    kv_heads: int
    vocabulary: int = 32000
    experts: int = 0
    dtype: str = "BF16"

    @property
    def head(self) -> int:
        return self.hidden // self.heads

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shapes by name."""
        wide, deep = self.hidden, self.feed_forward
        found: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocabulary, wide),
            "model.norm.weight": (wide,),
            "lm_head.weight": (self.vocabulary, wide),
        }
        for layer in range(self.layers):
            start = f"model.layers.{layer}."
            found |= {
                f"{start}input_layernorm.weight": (wide,),
                f"{start}post_attention_layernorm.weight": (wide,),
                f"{start}self_attn.q_proj.weight": (wide, wide),
                f"{start}self_attn.k_proj.weight": (self.kv_heads * self.head, wide),
                f"{start}self_attn.v_proj.weight": (self.kv_heads * self.head, wide),
                f"{start}self_attn.o_proj.weight": (wide, wide),
            }
            blocks = [("mlp.", "gate_proj", "up_proj", "down_proj")]
            if self.experts:
                found[f"{start}block_sparse_moe.gate.weight"] = (self.experts, wide)
                blocks = [
                    (f"block_sparse_moe.experts.{n}.", "w1", "w3", "w2")
                    for n in range(self.experts)
                ]
            for block, gate, up, down in blocks:
                found |= {
                    f"{start}{block}{gate}.weight": (deep, wide),
                    f"{start}{block}{up}.weight": (deep, wide),
                    f"{start}{block}{down}.weight": (wide, deep),
                }
        return found


def make(folder: Path, size: Size) -> int:
    """Write the model; returns how many weights it has."""
    folder.mkdir(parents=True)
    (folder / "tokenizer.model").write_bytes(tiny_llama.train_tokenizer())
    for name, content in tiny_llama.configs("bf16").items():
        if name == "config.json":
            content |= {
                "hidden_size": size.hidden,
                "head_dim": size.head,
                "intermediate_size": size.feed_forward,
                "num_hidden_layers": size.layers,
                "num_attention_heads": size.heads,
                "num_key_value_heads": size.kv_heads,
                "vocab_size": size.vocabulary,
            }
            if size.experts:
                content |= {
                    "architectures": ["MixtralForCausalLM"],
                    "model_type": "mixtral",
                    "num_local_experts": size.experts,
                    "num_experts_per_tok": 2,
                }
        tiny_llama.write_json(folder / name, content)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = elements = 0
    for name, shape in size.tensors().items():
        elements += math.prod(shape)
        end = begin + math.prod(shape) * (4 if size.dtype == "F32" else 2)
        header[name] = {"dtype": size.dtype, "shape": shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + begin)
    return elements


def fill(folder: Path) -> None:
    """Write random weights in BF16 into the hole, some at a time."""
    random = np.random.default_rng(0)
    with (folder / "model.safetensors").open("r+b") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        end = file.seek(0, 2)
        for start in range(8 + length, end, 2 * WINDOW):
            count = min(WINDOW, (end - start) // 2)
            values = random.standard_normal(count, dtype=np.float32) * np.float32(0.02)
            file.seek(start)
            file.write(tiny_llama.to_bf16(values).tobytes())
