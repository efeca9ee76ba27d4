"""What can be passed as an importance matrix."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from pipeline.core.errors import UsageError
from pipeline.models import imatrix

TEXT = "Der Bär läuft über die Straße und sieht das Meer. " * 40
NAME = b"blk.0.ffn_up.weight"


@pytest.mark.parametrize(
    "data",
    [
        TEXT.encode("latin-1"),
        TEXT.encode("utf-16"),
        b"PK\x03\x04" + bytes(4000),
        bytes(range(256)) * 20,
        struct.pack("<ii", 1, 4000) + bytes(100),
    ],
    ids=["Latin-1", "UTF-16", "zip", "noise", "no name"],
)
def test_what_is_neither_a_matrix_nor_a_text(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(UsageError, match="neither an importance matrix nor a text in UTF-8"):
        imatrix.require_usable(tmp_path / "x")


@pytest.mark.parametrize(
    "data",
    [
        TEXT.encode(),
        TEXT.encode("utf-8-sig"),
        struct.pack("<ii", 1, len(NAME)) + NAME + struct.pack("<iif", 1, 1, 2.0),
    ],
    ids=["text", "text with a byte order mark", "older format"],
)
def test_what_is_one(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x").write_bytes(data)
    imatrix.require_usable(tmp_path / "x")


@pytest.mark.parametrize("letter", ["é", "春", "😀"])
def test_a_text_is_one_wherever_its_beginning_is_cut(tmp_path: Path, letter: str) -> None:
    """It is read in part, which may end within a letter."""
    for shift in range(len(letter.encode())):
        (tmp_path / "x").write_text("a" * shift + letter * 3000, encoding="utf-8")
        assert imatrix.is_text(tmp_path / "x")


SHAPES = {
    **{f"blk.{n}.ffn_up.weight": (512, 256) for n in range(3)},
    **{f"blk.{n}.ffn_up_exps.weight": (4, 512, 256) for n in range(3)},
    "token_embd.weight": (100, 256),
}


def gguf_of(path: Path, arrays: dict[str, tuple[int, ...]], **values: int) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in values.items():
        writer.add_uint32(f"llama.{key}", value)
    for name, shape in arrays.items():
        writer.add_tensor(name, np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def matrix_of(path: Path, sizes: dict[str, int], *, is_older: bool) -> Path:
    if not is_older:
        return gguf_of(path, {f"{name}.in_sum2": (1, size) for name, size in sizes.items()})
    with path.open("wb") as file:
        file.write(struct.pack("<i", len(sizes)))
        for name, size in sizes.items():
            file.write(struct.pack("<i", len(name)) + name.encode())
            file.write(struct.pack("<ii", 1, size) + bytes(4 * size))
    return path


@pytest.mark.parametrize("is_older", [False, True])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, ""),
        ({"output.weight": 7, "token_embd.weight": 3}, ""),
        ({"blk.1.ffn_up_exps.weight": 0}, ""),  # experts that no text reached
        (
            {"blk.1.ffn_up.weight": 128},
            "it has 128 values for blk.1.ffn_up.weight",
        ),
        ({"blk.3.ffn_up.weight": 256}, "it knows blk.3.ffn_up.weight, which the model has not"),
        (
            {"blk.2.ffn_up.weight": 0, "blk.2.ffn_up_exps.weight": 0},
            "it knows 2 of the 3 layers",
        ),
    ],
)
def test_a_matrix_of_another_model(
    change: dict[str, int], says: str, is_older: bool, tmp_path: Path
) -> None:
    model = gguf_of(tmp_path / "m.gguf", SHAPES)
    own = {name: 256 * (4 if "exps" in name else 1) for name in SHAPES if "blk" in name} | change
    sizes = {name: size for name, size in own.items() if size}
    matrix = matrix_of(tmp_path / "x", sizes, is_older=is_older)
    if not says:
        imatrix.require_of(matrix, model)
        return
    with pytest.raises(UsageError, match="was computed for another model") as caught:
        imatrix.require_of(matrix, model)
    assert says in caught.value.message
