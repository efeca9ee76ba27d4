"""Make a tiny but real multimodal projector as a GGUF: a vision encoder of random weights.

Built like that of LLaVA-1.5: a CLIP encoder and two matrices that bring its patches to the text
model's width. llama-server loads it beside any model of that width and sees images through it;
what it sees means nothing. The same arguments give the same bytes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args

import gguf
import numpy as np
import numpy.typing as npt

Dtype = Literal["f16", "f32"]
F32 = npt.NDArray[np.float32]

FILE_TYPES: dict[Dtype, gguf.LlamaFileType] = {
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "f32": gguf.LlamaFileType.ALL_F32,
}

IMAGE, PATCH, CHANNELS = 56, 14, 3  # pixels; an image becomes 16 patches, each one token
PATCHES = (IMAGE // PATCH) ** 2
HIDDEN, INTERMEDIATE, HEADS = 64, 128, 4
LAYERS = 2  # of which, as in LLaVA, the last is not used


def make(path: Path, *, width: int, dtype: Dtype = "f16", seed: int = 0) -> None:
    """Write the projector; `width` is the text model's embedding length."""
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_type("mmproj")
    writer.add_name("Tiny projector")
    writer.add_file_type(FILE_TYPES[dtype])
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_projection_dim(width)
    writer.add_vision_image_size(IMAGE)
    writer.add_vision_patch_size(PATCH)
    writer.add_vision_embedding_length(HIDDEN)
    writer.add_vision_feed_forward_length(INTERMEDIATE)
    writer.add_vision_block_count(LAYERS)
    writer.add_vision_head_count(HEADS)
    writer.add_vision_attention_layernorm_eps(1e-5)
    writer.add_vision_image_mean([0.5, 0.5, 0.5])
    writer.add_vision_image_std([0.5, 0.5, 0.5])
    writer.add_vision_use_gelu(False)
    for name, values in tensors(width, np.random.default_rng(seed)):
        # Norms, biases and positions are added to what is float32.
        narrow = dtype == "f16" and values.ndim > 1 and "position" not in name
        writer.add_tensor(name, values.astype(np.float16) if narrow else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tensors(width: int, rng: np.random.Generator) -> Iterator[tuple[str, F32]]:
    """Yield each tensor's name and values."""

    def matrix(*shape: int) -> F32:
        values = rng.standard_normal(shape, dtype=np.float32)
        return values / np.float32(np.prod(shape[1:]) ** 0.5)

    def linear(name: str, rows: int, columns: int) -> Iterator[tuple[str, F32]]:
        yield f"{name}.weight", matrix(rows, columns)
        yield f"{name}.bias", np.zeros(rows, dtype=np.float32)

    def norm(name: str) -> Iterator[tuple[str, F32]]:
        yield f"{name}.weight", np.ones(HIDDEN, dtype=np.float32)
        yield f"{name}.bias", np.zeros(HIDDEN, dtype=np.float32)

    yield "v.class_embd", matrix(1, HIDDEN)[0]
    yield "v.patch_embd.weight", matrix(HIDDEN, CHANNELS, PATCH, PATCH)
    yield "v.position_embd.weight", matrix(PATCHES + 1, HIDDEN)
    yield from norm("v.pre_ln")
    for layer in range(LAYERS):
        block = f"v.blk.{layer}"
        yield from norm(f"{block}.ln1")
        for name in ("attn_q", "attn_k", "attn_v", "attn_out"):
            yield from linear(f"{block}.{name}", HIDDEN, HIDDEN)
        yield from norm(f"{block}.ln2")
        yield from linear(f"{block}.ffn_up", INTERMEDIATE, HIDDEN)
        yield from linear(f"{block}.ffn_down", HIDDEN, INTERMEDIATE)
    yield from linear("mm.0", width, HIDDEN)
    yield from linear("mm.2", width, width)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a tiny multimodal projector.")
    parser.add_argument("path", type=Path)
    parser.add_argument("--width", type=int, required=True)
    parser.add_argument("--dtype", choices=get_args(Dtype), default="f16")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    make(args.path, width=args.width, dtype=args.dtype, seed=args.seed)


if __name__ == "__main__":
    main()
