"""LoRA adapters that would change nothing, or another model, are told before the start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf as writer
import numpy as np
import pytest
from conftest import Doit

from pipeline.models import gguf as headers
from pipeline.models.adapter import file_misfit, gguf_misfit

NAME = "blk.0.attn_q.weight"
MODEL = {NAME: [256, 512], "token_embd.weight": [256, 1000]}
FITS = {f"{NAME}.lora_a": [256, 4], f"{NAME}.lora_b": [4, 512]}


@pytest.mark.parametrize(
    ("adapter", "why"),
    [
        (FITS, ""),
        ({"token_embd.weight.lora_a": [4, 1000], "token_embd.weight.lora_b": [4, 256]}, ""),
        ({}, "holds no tensors"),
        ({**FITS, "blk.0.attn_norm.weight": [256]}, "which llama.cpp leaves as it is"),
        ({f"{NAME}.lora_a": [256, 4]}, "has only one of the two tensors"),
        ({"blk.7.x.lora_a": [1, 1], "blk.7.x.lora_b": [1, 1]}, "blk.7.x, which the model has not"),
        ({**FITS, f"{NAME}.lora_b": [4, 256]}, "makes blk.0.attn_q.weight 256 × 256, the model's"),
        ({**FITS, f"{NAME}.lora_b": [8, 512]}, "makes blk.0.attn_q.weight"),
        ({f"{NAME}.lora_a": [256], f"{NAME}.lora_b": [4, 512]}, "is not of two dimensions"),
    ],
)
def test_the_rules_of_llama_cpp(adapter: dict[str, list[int]], why: str) -> None:
    found = gguf_misfit(adapter, MODEL)
    assert why in found and bool(why) == bool(found)


def make(path: Path, architecture: str = "llama", kind: str = "adapter", rank: int = 4) -> Path:
    """An adapter for the first layer of the tiny Llama."""
    made = writer.GGUFWriter(path, architecture)
    made.add_type(kind)
    made.add_string("adapter.type", "lora")
    made.add_float32("adapter.lora.alpha", 64.0)
    rng = np.random.default_rng(0)
    made.add_tensor(f"{NAME}.lora_a", rng.standard_normal((rank, 256), dtype=np.float32))
    made.add_tensor(f"{NAME}.lora_b", rng.standard_normal((256, rank), dtype=np.float32))
    made.write_header_to_file()
    made.write_kv_data_to_file()
    made.write_tensors_to_file()
    made.close()
    return path


@pytest.mark.build
def test_a_real_one(gguf: Path, tmp_path: Path) -> None:
    shapes: dict[str, list[int]] = {}
    headers.read(gguf, shapes)
    assert shapes[NAME] == [256, 256]
    assert file_misfit(make(tmp_path / "a.gguf"), [gguf]) == ""
    assert "an adapter for qwen2, and the model is llama" in file_misfit(
        make(tmp_path / "b.gguf", "qwen2"), [gguf]
    )
    assert "is not a LoRA adapter" in file_misfit(make(tmp_path / "c.gguf", kind="model"), [gguf])
    assert "is not a LoRA adapter" in file_misfit(gguf, [gguf])


@pytest.mark.build
@pytest.mark.slow
def test_one_is_used_and_switched_by_request(doit: Doit, gguf: Path, tmp_path: Path) -> None:
    from conftest import post

    adapter = make(tmp_path / "ä b.gguf")
    other = make(tmp_path / "other.gguf", "qwen2")
    refused = doit("serve", f"model={gguf}", f"server.lora_scaled={other}:0.5", status=3)
    assert f"{other}: is an adapter for qwen2, and the model is llama" in refused.err
    with doit.serving(f"model={gguf}", f"server.lora={adapter}", "ctx_size=512") as url:

        def answer(**more: Any) -> str:
            body = {"prompt": "hello", "n_predict": 16, "temperature": 0, **more}
            return str(post(f"{url}/completion", body)["content"])

        assert answer() != answer(lora=[{"id": 0, "scale": 0}])
    assert doit.summary["adapters"] == "ä b.gguf"
