"""Make a tiny but real vision model as a Hugging Face folder: the tiny Llama with an encoder of
random weights, built like Idefics3. It sees images; what it sees means nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from . import tiny_llama
from .tiny_llama import F32, HIDDEN, VOCAB

IMAGE, PATCH, SCALE = 56, 14, 2  # pixels, pixels, patches that become one token in each direction
MARKS = ("\n\n", "<fake_token_around_image>", "<global-img>")  # around an image
WIDTH, INTERMEDIATE, HEADS, LAYERS = 64, 128, 4, 1


def make(folder: Path) -> None:
    """Write the model into folder, which is created where missing."""
    tiny_llama.make(folder)
    configs = tiny_llama.configs("bf16")
    text, tokenizer = configs["config.json"], configs["tokenizer_config.json"]
    for number, token in enumerate(MARKS, VOCAB - len(MARKS)):
        like = {**tokenizer["added_tokens_decoder"]["0"], "content": token}
        tokenizer["added_tokens_decoder"][str(number)] = like
    tiny_llama.write_json(folder / "tokenizer_config.json", tokenizer)
    vision = {
        "model_type": "idefics3_vision",
        "hidden_size": WIDTH,
        "intermediate_size": INTERMEDIATE,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "image_size": IMAGE,
        "patch_size": PATCH,
        "layer_norm_eps": 1e-5,
    }
    config = {
        "architectures": ["Idefics3ForConditionalGeneration"],
        "model_type": "idefics3",
        "scale_factor": SCALE,
        "text_config": text,
        "vision_config": vision,
        "torch_dtype": "bfloat16",
    }
    tiny_llama.write_json(folder / "config.json", config)
    preprocessor = {
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "size": {"longest_edge": IMAGE},
    }
    tiny_llama.write_json(folder / "preprocessor_config.json", preprocessor)
    of_text = {
        name.replace("model.", "model.text_model."): values
        for name, values in tiny_llama.weights(0)
    }
    tensors = {**of_text, **dict(encoder(np.random.default_rng(0)))}
    stored = {name: tiny_llama.stored(values, "bf16") for name, values in tensors.items()}
    tiny_llama.save(folder, stored, "bf16", 1)


def encoder(rng: np.random.Generator) -> Iterator[tuple[str, F32]]:
    """Yield each tensor's name and values."""

    def random(*shape: int) -> F32:
        return rng.standard_normal(shape, dtype=np.float32) * np.float32(0.05)

    def both(name: str, rows: int, columns: int) -> Iterator[tuple[str, F32]]:
        yield f"{name}.weight", random(rows, columns)
        yield f"{name}.bias", random(rows)

    def norm(name: str) -> Iterator[tuple[str, F32]]:
        yield f"{name}.weight", np.ones(WIDTH, dtype=np.float32)
        yield f"{name}.bias", np.zeros(WIDTH, dtype=np.float32)

    top = "model.vision_model"
    yield f"{top}.embeddings.patch_embedding.weight", random(WIDTH, 3, PATCH, PATCH)
    yield f"{top}.embeddings.patch_embedding.bias", random(WIDTH)
    yield f"{top}.embeddings.position_embedding.weight", random((IMAGE // PATCH) ** 2, WIDTH)
    for layer in range(LAYERS):
        prefix = f"{top}.encoder.layers.{layer}"
        yield from norm(f"{prefix}.layer_norm1")
        yield from norm(f"{prefix}.layer_norm2")
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from both(f"{prefix}.self_attn.{name}", WIDTH, WIDTH)
        yield from both(f"{prefix}.mlp.fc1", INTERMEDIATE, WIDTH)
        yield from both(f"{prefix}.mlp.fc2", WIDTH, INTERMEDIATE)
    yield from norm(f"{top}.post_layernorm")
    yield "model.connector.modality_projection.proj.weight", random(HIDDEN, WIDTH * SCALE**2)
