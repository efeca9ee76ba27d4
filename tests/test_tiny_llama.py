"""The tiny Llama that other tests convert and serve is what it claims to be."""

import json
from pathlib import Path

import numpy as np
import pytest
from fakes import tiny_llama
from safetensors import safe_open
from sentencepiece import SentencePieceProcessor


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("shards", [1, 3])
def test_same_arguments_same_bytes(tmp_path: Path, shards: int) -> None:
    tiny_llama.make(tmp_path / "a", shards=shards)
    tiny_llama.make(tmp_path / "b", shards=shards)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_seed_changes_the_weights_and_nothing_else(tmp_path: Path) -> None:
    tiny_llama.make(tmp_path / "a", seed=0)
    tiny_llama.make(tmp_path / "b", seed=1)
    a, b = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert [name for name in a if a[name] != b[name]] == ["model.safetensors"]


@pytest.mark.parametrize(("dtype", "stored"), [("bf16", "BF16"), ("f16", "F16"), ("f32", "F32")])
def test_safetensors_reads_every_tensor(
    tmp_path: Path, dtype: tiny_llama.Dtype, stored: str
) -> None:
    tiny_llama.make(tmp_path, dtype=dtype)
    expected = {name: list(values.shape) for name, values in tiny_llama.weights(0)}
    with safe_open(tmp_path / "model.safetensors", framework="numpy") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        assert {name: part.get_shape() for name, part in slices.items()} == expected
        assert {part.get_dtype() for part in slices.values()} == {stored}


def test_safetensors_reads_the_values_back(tmp_path: Path) -> None:
    tiny_llama.make(tmp_path, dtype="f32")
    with safe_open(tmp_path / "model.safetensors", framework="numpy") as file:
        for name, values in tiny_llama.weights(0):
            np.testing.assert_array_equal(file.get_tensor(name), values)


def test_index_names_every_tensor_of_every_shard(tmp_path: Path) -> None:
    tiny_llama.make(tmp_path, shards=3)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    found: dict[str, str] = {}
    for path in tmp_path.glob("*.safetensors"):
        with safe_open(path, framework="numpy") as file:
            found |= dict.fromkeys(file.keys(), path.name)
    assert index["weight_map"] == found
    assert sorted(set(found.values())) == [
        f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)
    ]
    sizes = [values.size * 2 for _, values in tiny_llama.weights(0)]
    assert len(found) == len(sizes)
    assert index["metadata"]["total_size"] == sum(sizes)


def test_shards_hold_the_same_values_as_one_file(tmp_path: Path) -> None:
    tiny_llama.make(tmp_path / "one", dtype="f16")
    tiny_llama.make(tmp_path / "many", dtype="f16", shards=21)
    with safe_open(tmp_path / "one/model.safetensors", framework="numpy") as one:
        for path in (tmp_path / "many").glob("*.safetensors"):
            with safe_open(path, framework="numpy") as part:
                for name in part.keys():  # noqa: SIM118
                    np.testing.assert_array_equal(part.get_tensor(name), one.get_tensor(name))


@pytest.mark.parametrize("shards", [0, 22])
def test_impossible_shards_are_refused(tmp_path: Path, shards: int) -> None:
    with pytest.raises(ValueError, match="from 1 to 21"):
        tiny_llama.make(tmp_path, shards=shards)


@pytest.mark.parametrize(
    "sentence",
    [
        "The weather on the coast is windy.",
        "x = [1, 2]\n\n\treturn  x",
        "Grüße aus Zürich, 北京 🙂",
    ],
)
def test_tokenizer_gives_a_sentence_back(sentence: str) -> None:
    tokenizer = SentencePieceProcessor(model_proto=tiny_llama.train_tokenizer())
    ids = tokenizer.encode(sentence)
    assert tiny_llama.UNK not in ids
    assert tokenizer.decode(ids) == sentence


def test_tokenizer_has_the_pieces_that_the_config_names() -> None:
    tokenizer = SentencePieceProcessor(model_proto=tiny_llama.train_tokenizer())
    config = tiny_llama.configs("bf16")["config.json"]
    assert tokenizer.vocab_size() == config["vocab_size"]
    assert tokenizer.bos_id() == config["bos_token_id"]
    assert tokenizer.eos_id() == config["eos_token_id"]
    pieces = [tokenizer.id_to_piece(number) for number in range(len(tiny_llama.SPECIAL))]
    assert pieces == list(tiny_llama.SPECIAL)
    is_byte = [tokenizer.is_byte(number) for number in range(tiny_llama.VOCAB)]
    assert is_byte.index(True) == len(tiny_llama.SPECIAL)
    assert is_byte.index(False, len(tiny_llama.SPECIAL)) == tiny_llama.FIRST_PIECE


@pytest.mark.parametrize(
    ("bits", "rounded"),
    [
        (0x3F800000, 0x3F80),  # 1.0, exact
        (0xBF800000, 0xBF80),  # -1.0
        (0x80000000, 0x8000),  # -0.0
        (0x3F807FFF, 0x3F80),  # just below the middle: down
        (0x3F808000, 0x3F80),  # the middle, even below: down
        (0x3F808001, 0x3F81),  # just above the middle: up
        (0x3F818000, 0x3F82),  # the middle, odd below: up
        (0xBF818000, 0xBF82),  # the same with a sign
        (0x3FFFFFFF, 0x4000),  # into the next exponent
        (0x00008001, 0x0001),  # subnormal
        (0x7F7FFFFF, 0x7F80),  # the largest float32 is nearest to infinity
        (0x7F800000, 0x7F80),  # infinity
        (0x7F800001, 0x7FC0),  # a NaN whose mark lies in the lower half stays one
        (0xFFFFFFFF, 0xFFFF),  # a NaN that rounding would carry away
    ],
)
def test_bf16_rounds_to_nearest_even(bits: int, rounded: int) -> None:
    value = np.array([bits], dtype=np.uint32).view(np.float32)
    assert tiny_llama.to_bf16(value)[0] == rounded
