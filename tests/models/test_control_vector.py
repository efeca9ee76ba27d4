"""Control vectors that llama-server would log, and leave out."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from fakes.raw_gguf import TEXT, UINT32, number, raw, tensor, text, whole

from pipeline.models.control_vector import misfit

Shapes = dict[str, tuple[int, ...]]


def vector(path: Path, shapes: Shapes) -> Path:
    """A control vector as llama-cvector-generator writes it."""
    table, offset = b"", 0
    for name, shape in shapes.items():
        table += tensor(name, shape, 0, offset)
        offset += -(-math.prod(shape) * 4 // 32) * 32
    head = raw(
        ("general.architecture", TEXT, text("controlvector")), tensors=table, count=len(shapes)
    )
    path.write_bytes(whole(head, offset))
    return path


@pytest.mark.parametrize(
    ("shapes", "why"),
    [
        ({"direction.1": (64,), "direction.3": (64,)}, ""),
        ({"direction.1": (32,)}, "has 32 numbers for a layer, and the model has 64"),
        ({"direction.1": (64, 2)}, "has 64 × 2 numbers for a layer, and the model has 64"),
        ({"direction.1": (64,), "direction.9": (64,)}, "changes layer 9, and the model has 4"),
        ({"direction.0": (64,)}, "is not a control vector: it holds direction.0"),
        ({"blk.0.attn_q.weight.lora_a": (64, 4)}, "is not a control vector: it holds blk.0"),
        ({}, "holds no directions"),
    ],
)
def test_whether_it_fits(tmp_path: Path, shapes: Shapes, why: str) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(
        raw(
            ("general.architecture", TEXT, text("llama")),
            ("llama.embedding_length", UINT32, number(64)),
            ("llama.block_count", UINT32, number(4)),
        )
    )
    found = misfit(vector(tmp_path / "v.gguf", shapes), model)
    assert found.startswith(why) if why else not found
