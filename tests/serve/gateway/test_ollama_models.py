"""What Ollama's clients are told of models, from the headers of their files."""

from __future__ import annotations

import hashlib
import json
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import gguf
import msgspec
import numpy as np
import pytest
from conftest import REPOSITORY
from fakes import tiny_projector
from gateway_tools import instance

from pipeline.core.store import receipts
from pipeline.serve.gateway.answers import utc
from pipeline.serve.gateway.ollama import models
from pipeline.serve.gateway.servers import Target
from pipeline.serve.supervisor.usage import ServerUse

TEMPLATE = "{% if tools %}{{ tools }}{% endif %}{% if enable_thinking %}<think>{% endif %}"


def write(
    path: Path, *, template: str = "", fim: bool = False, tokens: list[str] | None = None
) -> None:
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_context_length(32768)
    writer.add_file_type(15)
    writer.add_float32("odd.value", float("nan"))
    writer.add_license("apache-2.0")
    if template:
        writer.add_chat_template(template)
    if fim:
        writer.add_uint32("tokenizer.ggml.fim_pre_token_id", 5)
    if tokens:
        writer.add_token_list(tokens)
    writer.add_tensor("token_embd.weight", np.zeros((1000, 64), dtype=np.float32))
    writer.add_tensor("output_norm.weight", np.zeros(64, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def target(path: Path, *words: str, **more: Any) -> Target:
    command = ("--model", path.name, *words)
    return Target(
        instance=instance("x", cmd=command, folder=str(path.parent), **more), state="ready"
    )


def can(path: Path, *words: str, **more: Any) -> list[str]:
    capabilities: list[str] = models.shown("x", target(path, *words, **more), {})["capabilities"]
    return capabilities


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a model ü.gguf"
    write(path, template=TEMPLATE, fim=True)
    return path


def test_what_a_header_says(file: Path) -> None:
    said = {"meta": {"n_ctx": 4096}}
    shown = json.loads(msgspec.json.encode(models.shown("me", target(file), said)))
    assert shown["details"] == {
        **{"parent_model": "", "format": "gguf", "family": "qwen2", "families": ["qwen2"]},
        **{"parameter_size": "64K", "quantization_level": "Q4_K_M"},
    }
    info = shown["model_info"]
    assert info["general.parameter_count"] == 64_064 and info["qwen2.context_length"] == 4096
    assert info["odd.value"] is None and not any("chat_template" in key for key in info)
    assert shown["template"] == TEMPLATE and shown["license"] == "apache-2.0"
    assert shown["parameters"] == "num_ctx 4096" and shown["modified_at"].endswith("Z")
    listed = models.listed("me", target(file))
    assert listed["size"] == file.stat().st_size and listed["details"] == shown["details"]
    running = models.running("me", target(file), said, ServerUse())
    assert running["context_length"] == 4096 and "size_vram" not in running
    assert running["expires_at"] > "2300" and "modified_at" not in running


def test_the_context_that_clients_are_told_is_the_one_they_have(file: Path) -> None:
    """They go by the header's, and send as much; no request makes the context larger."""

    def told(said: dict[str, Any], *arguments: str) -> tuple[int, str]:
        shown = models.shown("me", target(file, *arguments), said)
        return shown["model_info"]["qwen2.context_length"], shown["parameters"]

    assert told({"meta": {"n_ctx": 4096}}, "--ctx-size", "8192") == (4096, "num_ctx 4096")
    assert told({}, "--ctx-size", "8192") == (8192, "num_ctx 8192"), "while it is not loaded"
    assert told({}, "-c", "8192") == (8192, "num_ctx 8192")
    assert told({}, "--ctx-size", "0") == told({}) == (32_768, "")
    assert told({"meta": {"n_ctx": 65_536}}) == (65_536, "num_ctx 65536"), "a stretched one"


def test_capabilities(file: Path, tmp_path: Path) -> None:
    assert can(file) == ["completion", "tools", "thinking", "insert"]
    assert can(file, "--no-jinja") == ["completion", "thinking", "insert"]
    assert can(file, "--chat-template", "chatml") == ["completion", "insert"]
    (tmp_path / "own.jinja").write_text("{{ messages }}")
    assert can(file, "--chat-template-file", "own.jinja") == ["completion", "insert"]
    assert can(file, kind="embedding") == ["embedding"] and can(file, kind="rerank") == []
    tiny_projector.make(tmp_path / "mmproj.gguf", width=64)
    assert "vision" in can(file, "--mmproj", "mmproj.gguf")
    assert "vision" not in can(file, "--mmproj", "missing.gguf")
    plain, coder = tmp_path / "plain.gguf", tmp_path / "coder.gguf"
    write(plain, tokens=["a", "b"])
    write(coder, tokens=["a", "<|fim_prefix|>"])
    assert can(plain) == ["completion"] and can(coder) == ["completion", "insert"]


def test_digests(file: Path) -> None:
    """The sha256 of a file that has a receipt; else one that changes with the file."""
    unknown = models.listed("x", target(file))["digest"]
    assert unknown == models.listed("y", target(file))["digest"] and len(unknown) == 64
    write(file, template="other")
    assert models.listed("x", target(file))["digest"] != unknown
    write(file, template="a longer one")
    receipts.change(file, receipts.stamp(file, {"step": "x"}, seconds=0))
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    assert models.listed("x", target(file))["digest"] == sha256


def test_what_is_no_model_file(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(10))
    for path in (tmp_path / "broken.gguf", tmp_path / "missing.gguf", tmp_path):
        listed = models.listed("x", target(path))
        assert listed["size"] == 0 and "modified_at" not in listed and len(listed["digest"]) == 64
        assert can(path) == ["completion"]
    vllm = target(REPOSITORY, engine="vllm")
    assert models.listed("x", vllm)["details"]["format"] == ""


@pytest.mark.parametrize(
    ("use", "more", "at"),
    [
        ({}, {}, None),
        ({}, {"idle_timeout": 60.0}, 160),  # since it is ready
        ({"last": 1000.0}, {"idle_timeout": 60.0}, 1060),
        ({"last": 1000.0}, {"idle_timeout": 60.0, "pinned": True}, None),
        ({"last": 1000.0, "keep": 5.0}, {"idle_timeout": 60.0}, 1005),
        ({"last": 1000.0, "keep": -1.0}, {"idle_timeout": 60.0}, None),
        ({"last": 1000.0, "keep": 5.0}, {}, 1005),
        ({"last": 50.0, "keep": 5.0}, {"idle_timeout": 60.0}, 160),  # before it was loaded again
    ],
)
def test_when_a_model_is_unloaded(
    use: dict[str, float], more: dict[str, Any], at: float | None
) -> None:
    server = Target(instance=instance("x", **more), state="ready", ready_at=100.0)
    if "last" in use:  # as a gateway has it
        use = {**use, "last": use["last"] - time.time() + time.monotonic()}
    told = models.expires_at(server, ServerUse(**use))
    if at is None:
        assert told == models.NEVER
    else:
        assert abs(datetime.fromisoformat(told).timestamp() - at) < 1
    busy = models.expires_at(server, ServerUse(**use, in_flight=1))
    assert (busy == models.NEVER) if at is None else (busy > utc(time.time()))


@pytest.mark.parametrize(
    ("words", "more", "is_on_cpu"),
    [
        *(((), {}, False), (("--n-gpu-layers", "0"), {}, True), (("--device", "none"), {}, True)),
        *(((), {"gpu_ids": "none"}, True), (("--n-gpu-layers", "99"), {"gpu_ids": "0"}, False)),
    ],
)
def test_memory_of_a_gpu(file: Path, words: Any, more: Any, is_on_cpu: bool) -> None:
    entry = models.running("x", target(file, *words, **more), {}, ServerUse())
    assert ("size_vram" in entry) == is_on_cpu and entry.get("size_vram", 0) == 0


@pytest.mark.parametrize(
    ("count", "text"),
    [(134_515_008, "134.52M"), (8_030_000_000, "8.0B"), (1_440_000, "1.44M"), (12, "12")],
)
def test_numbers_of_parameters(count: int, text: str) -> None:
    assert models.human(count) == text
