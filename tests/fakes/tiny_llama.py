"""Make a tiny but real Llama chat model as a Hugging Face folder: 1.4 M random parameters.

Conversion, quantization and serving treat it like any other Llama; only its answers mean
nothing. The tokenizer is SentencePiece because the converter refuses a BPE tokenizer whose hash
it does not know. With one set of installed libraries the same arguments give the same bytes.
"""

import argparse
import io
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import sentencepiece

Dtype = Literal["bf16", "f16", "f32"]
F32 = npt.NDArray[np.float32]
Stored = npt.NDArray[np.float32] | npt.NDArray[np.float16] | npt.NDArray[np.uint16]

TORCH_NAMES: dict[Dtype, str] = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}

# Every row of every matrix is a multiple of 256 long, the block size of the K-quants.
HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS = 256, 512, 2, 4, 2
HEAD_DIM = HIDDEN // HEADS
# Coding agents open with prompts of several thousand tokens.
CONTEXT = 16384

VOCAB = 512
SPECIAL = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
UNK, BOS, EOS = 0, 1, 2
# SentencePiece puts the 256 byte pieces after the special ones, and the learned ones last.
FIRST_PIECE = len(SPECIAL) + 256

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

TEXT = """\
A small model is still a model: it has layers, heads, weights and a list of words.
The morning train to the coast was late, so we drank coffee and watched the rain.
Who wrote this file, and where was it kept before the server moved to another room?
You are a helpful assistant. Answer the user in one short sentence.
The user asks a question and the assistant gives an answer, one word after another.
When the water is hot, put the tea in the pot and wait for about four minutes.
Our neighbour grows tomatoes, beans and onions behind the house, and apples near the wall.
Please read the message again and tell me whether the number at the end is right.
There are 12 boxes on the shelf, 7 of them empty; the other 5 hold old letters from 1938.
If a download stops in the middle, the program should continue where it was interrupted.
She said that nothing would change, but everything had already changed by then.
Hello! What is the weather like today? It is cold and windy, with some sun later.
They walked over the hill, through the forest and along the river until it was dark.
Write a function that returns the largest value in a list, or nothing for an empty list.
def add(left, right): return left + right  # the sum of two numbers
"""


def make(folder: Path, *, dtype: Dtype = "bf16", shards: int = 1, seed: int = 0) -> None:
    """Write the model into folder, which is created where missing."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(train_tokenizer())
    for name, content in configs(dtype).items():
        write_json(folder / name, content)
    # The seed decides the float32 values, and dtype only rounds them: folders of two dtypes are
    # the same model.
    tensors = {name: stored(values, dtype) for name, values in weights(seed)}
    save(folder, tensors, dtype, shards)


def train_tokenizer() -> bytes:
    """Return a SentencePiece model file with VOCAB pieces learned from TEXT."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB,
        # As Llama's own: text is not normalized, and what has no piece is spelled in bytes.
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        byte_fallback=True,
        control_symbols=list(SPECIAL[3:]),
        unk_id=UNK,
        bos_id=BOS,
        eos_id=EOS,
        # With several threads the order of equal candidates is not fixed.
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def configs(dtype: Dtype) -> dict[str, dict[str, Any]]:
    """Return the folder's small JSON files by name."""
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    added = {
        str(number): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for number, token in enumerate(SPECIAL)
    }
    return {
        "config.json": {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "head_dim": HEAD_DIM,
            "hidden_act": "silu",
            "hidden_size": HIDDEN,
            "intermediate_size": INTERMEDIATE,
            "max_position_embeddings": CONTEXT,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": HEADS,
            "num_hidden_layers": LAYERS,
            "num_key_value_heads": KV_HEADS,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "torch_dtype": TORCH_NAMES[dtype],
            "vocab_size": VOCAB,
        },
        "generation_config.json": {"bos_token_id": BOS, "eos_token_id": EOS},
        "special_tokens_map.json": names,
        "tokenizer_config.json": {
            **names,
            "add_bos_token": True,
            "add_eos_token": False,
            "added_tokens_decoder": added,
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "legacy": False,
            "model_max_length": CONTEXT,
            "tokenizer_class": "LlamaTokenizer",
        },
    }


def weights(seed: int) -> Iterator[tuple[str, F32]]:
    """Yield each tensor's name and values, in the order of the layers."""
    rng = np.random.default_rng(seed)

    def matrix(rows: int, columns: int, scale: float = 1.0) -> F32:
        # 1/sqrt(columns) keeps the size of activations about the same from layer to layer.
        values = rng.standard_normal((rows, columns), dtype=np.float32)
        return values * np.float32(scale / columns**0.5)

    def norm() -> F32:
        return np.ones(HIDDEN, dtype=np.float32)

    kv_size = KV_HEADS * HEAD_DIM
    yield "model.embed_tokens.weight", matrix(VOCAB, HIDDEN, scale=HIDDEN**0.5)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", norm()
        yield f"{prefix}.self_attn.q_proj.weight", matrix(HIDDEN, HIDDEN)
        yield f"{prefix}.self_attn.k_proj.weight", matrix(kv_size, HIDDEN)
        yield f"{prefix}.self_attn.v_proj.weight", matrix(kv_size, HIDDEN)
        yield f"{prefix}.self_attn.o_proj.weight", matrix(HIDDEN, HIDDEN)
        yield f"{prefix}.post_attention_layernorm.weight", norm()
        yield f"{prefix}.mlp.gate_proj.weight", matrix(INTERMEDIATE, HIDDEN)
        yield f"{prefix}.mlp.up_proj.weight", matrix(INTERMEDIATE, HIDDEN)
        yield f"{prefix}.mlp.down_proj.weight", matrix(HIDDEN, INTERMEDIATE)
    yield "model.norm.weight", norm()
    # Scores of learned pieces spread ten times wider than those of special and byte pieces, so
    # that answers are letters, seldom broken UTF-8 and seldom an early end.
    head = matrix(VOCAB, HIDDEN, scale=3.0)
    head[:FIRST_PIECE] *= np.float32(0.1)
    yield "lm_head.weight", head


def stored(values: F32, dtype: Dtype) -> Stored:
    """Round float32 to dtype, little-endian as the file has it (bfloat16 as its bits)."""
    match dtype:
        case "bf16":
            return to_bf16(values).astype("<u2")
        case "f16":
            return values.astype("<f2")
        case "f32":
            return values.astype("<f4")


def to_bf16(values: F32) -> npt.NDArray[np.uint16]:
    """Round float32 to bfloat16, to nearest and ties to even, and return the bits."""
    bits = values.view(np.uint32)
    # numpy has no bfloat16. It is the upper half of a float32: adding just under half of its
    # last place, and one more where that place is odd, carries upwards exactly when it must.
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    # Rounding could carry a NaN into an infinity or a zero; a quiet NaN keeps its sign.
    return np.where(np.isnan(values), (bits >> 16) | 0x0040, rounded).astype(np.uint16)


def save(folder: Path, tensors: dict[str, Stored], dtype: Dtype, shards: int) -> None:
    """Write the tensors as one file, or as shards with their index."""
    names = list(tensors)
    if not 1 <= shards <= len(names):
        raise ValueError(f"shards must be from 1 to {len(names)}, not {shards}")
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors, dtype)
        return
    weight_map: dict[str, str] = {}
    for number in range(shards):
        begin, end = (len(names) * edge // shards for edge in (number, number + 1))
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[begin:end]}
        write_safetensors(folder / file, part, dtype)
        weight_map |= dict.fromkeys(part, file)
    total_size = sum(values.nbytes for values in tensors.values())
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)


def write_safetensors(path: Path, tensors: dict[str, Stored], dtype: Dtype) -> None:
    """Write one file: the header's length in 8 bytes, the header as JSON, the values."""
    # By hand: the library's numpy side knows no bfloat16, and its raw side wants memory addresses.
    # Without a format transformers refuses the file.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, values in tensors.items():
        end = begin + values.nbytes
        header[name] = {"dtype": dtype.upper(), "shape": values.shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    # Spaces up to a multiple of 8, so that the values are aligned for who maps the file.
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.writelines(values.tobytes() for values in tensors.values())


def write_json(path: Path, content: dict[str, Any]) -> None:
    # Bytes, so that Windows writes the same line ends.
    path.write_bytes(json.dumps(content, indent=2).encode() + b"\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a tiny Llama as a Hugging Face folder.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=get_args(Dtype), default="bf16")
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    make(args.folder, dtype=args.dtype, shards=args.shards, seed=args.seed)


if __name__ == "__main__":
    main()
