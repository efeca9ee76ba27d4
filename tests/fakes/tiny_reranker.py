"""Make a tiny but real reranker as a Hugging Face folder: an XLM-RoBERTa with a classifier of one
output, as BAAI/bge-reranker-v2-m3 is one, with 200,000 random parameters.

Its tokenizer is SentencePiece's unigram model, which the converter takes with any vocabulary.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from .tiny_llama import F32, TEXT, stored, write_json, write_safetensors

HIDDEN, INTERMEDIATE, LAYERS, HEADS, CONTEXT = 128, 256, 2, 4, 512
PAD = 1
ADDED = 2  # tokens: XLM-RoBERTa has <pad> and <mask>, which SentencePiece does not know


def make(folder: Path, *, outputs: int = 1, seed: int = 0) -> None:
    """Write the model into `folder`. With more `outputs` than one it is a classifier, and ranks
    nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
    (folder / "sentencepiece.bpe.model").write_bytes(tokenizer)
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer)
    words = processor.get_piece_size() + ADDED
    write_json(folder / "config.json", config(words, outputs))
    tensors = {name: stored(values, "f32") for name, values in weights(words, outputs, seed)}
    write_safetensors(folder / "model.safetensors", tensors, "f32")


def train_tokenizer() -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()),
        model_writer=model,
        model_type="unigram",
        vocab_size=400,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def config(words: int, outputs: int) -> dict[str, Any]:
    names = ["LABEL_0"] if outputs == 1 else [f"MOOD_{number}" for number in range(outputs)]
    return {
        "architectures": ["XLMRobertaForSequenceClassification"],
        "bos_token_id": 0,
        "eos_token_id": 2,
        "hidden_act": "gelu",
        "hidden_size": HIDDEN,
        "id2label": {str(number): name for number, name in enumerate(names)},
        "intermediate_size": INTERMEDIATE,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": CONTEXT + PAD + 1,
        "model_type": "xlm-roberta",
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "pad_token_id": PAD,
        "torch_dtype": "float32",
        "type_vocab_size": 1,
        "vocab_size": words,
    }


def weights(words: int, outputs: int, seed: int) -> Iterator[tuple[str, F32]]:
    """Each tensor's name and values."""
    rng = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> F32:
        values = rng.standard_normal((rows, columns), dtype=np.float32)
        return values * np.float32(columns**-0.5)

    def dense(name: str, rows: int, columns: int) -> Iterator[tuple[str, F32]]:
        yield f"{name}.weight", matrix(rows, columns)
        yield f"{name}.bias", np.zeros(rows, dtype=np.float32)

    def norm(name: str) -> Iterator[tuple[str, F32]]:
        yield f"{name}.weight", np.ones(HIDDEN, dtype=np.float32)
        yield f"{name}.bias", np.zeros(HIDDEN, dtype=np.float32)

    start = "roberta.embeddings"
    for name, rows in (("word", words), ("position", CONTEXT + PAD + 1), ("token_type", 1)):
        yield f"{start}.{name}_embeddings.weight", matrix(rows, HIDDEN)
    yield from norm(f"{start}.LayerNorm")
    for layer in range(LAYERS):
        start = f"roberta.encoder.layer.{layer}"
        for name in ("query", "key", "value"):
            yield from dense(f"{start}.attention.self.{name}", HIDDEN, HIDDEN)
        yield from dense(f"{start}.attention.output.dense", HIDDEN, HIDDEN)
        yield from norm(f"{start}.attention.output.LayerNorm")
        yield from dense(f"{start}.intermediate.dense", INTERMEDIATE, HIDDEN)
        yield from dense(f"{start}.output.dense", HIDDEN, INTERMEDIATE)
        yield from norm(f"{start}.output.LayerNorm")
    yield from dense("classifier.dense", HIDDEN, HIDDEN)
    yield from dense("classifier.out_proj", outputs, HIDDEN)
