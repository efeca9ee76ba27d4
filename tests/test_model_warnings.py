"""What the metadata of a model does not say is said before its server starts, wherever it was asked
for; a file that is not a model is refused there too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Doit, free_port

pytestmark = pytest.mark.build
NO_TEMPLATE = "brings no chat template"


@pytest.fixture
def base(gguf: Path, tmp_path: Path) -> Path:
    """The tiny model as though nobody had given it a template."""
    path = tmp_path / "base.gguf"
    data = gguf.read_bytes()
    path.write_bytes(data.replace(b"tokenizer.chat_template", b"tokenizer.xhat_template"))
    return path


def config(tmp_path: Path, model: Path, *, raw: bool = False, **options: object) -> str:
    """The variable that names a file with one server of `model`."""
    server = {"port": free_port(), "ctx_size": 512, **({"model": str(model)} if raw else {})}
    lines = ["[instance.one.server]"]
    lines += [f"{name} = {json.dumps(value)}" for name, value in (server | options).items()]
    lines += [] if raw else ["[instance.one.model]", f"ref = {json.dumps(str(model))}"]
    file = tmp_path / "servers.toml"
    file.write_text("\n".join(lines), encoding="utf-8")
    return f"config={file}"


def test_a_model_without_a_chat_template(doit: Doit, base: Path, tmp_path: Path) -> None:
    assert NO_TEMPLATE in doit("plan", f"model={base}").out
    assert NO_TEMPLATE not in doit("plan", f"model={base}", "server.chat_template=chatml").out
    for raw in (False, True):
        named = config(tmp_path, base, raw=raw)
        assert f"warning: one: the model {NO_TEMPLATE}" in doit("plan", named).err
        assert json.loads(doit("plan", named, "format=json").out)[0]["name"] == "one"
    try:
        assert f"warning: one: the model {NO_TEMPLATE}" in doit("up", named).err
    finally:
        doit("down", named)
    assert NO_TEMPLATE not in doit("plan", config(tmp_path, base, chat_template="chatml")).err
    assert NO_TEMPLATE not in doit("plan", config(tmp_path, base, embeddings=True)).err


def test_a_model_with_a_chat_template_is_not_warned_of(
    doit: Doit, gguf: Path, tmp_path: Path
) -> None:
    assert NO_TEMPLATE not in doit("plan", f"model={gguf}").out
    assert NO_TEMPLATE not in doit("plan", config(tmp_path, gguf)).err


def test_an_embedding_model_is_not_started_as_a_chat_model(
    doit: Doit, demo: Doit, tmp_path: Path
) -> None:
    made = next(demo.home.rglob("*.q8_0.gguf"))
    encoder = tmp_path / "encoder.gguf"
    encoder.write_bytes(made.read_bytes().replace(b"bert.pooling_type", b"bert.xpooling_typ"))
    told = doit("plan", f"model={encoder}").out
    assert "--embeddings --pooling mean" in told and "does not say how it pools" in told
    told = doit("plan", config(tmp_path, encoder)).out
    assert "--embeddings --pooling mean" in told
    wrong = doit("plan", config(tmp_path, encoder, raw=True), status=3)
    assert "one:" in wrong.err and "is an embedding model (bert)" in wrong.err
    assert 'pooling = "mean"' in wrong.err
    doit("plan", config(tmp_path, encoder, raw=True, embeddings=True, pooling="mean"))


def test_a_pointer_in_place_of_another_file(
    doit: Doit, gguf: Path, tiny: Path, tmp_path: Path
) -> None:
    pointer = tmp_path / "p.gguf"
    pointer.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n")
    for words in (f"server.lora={pointer}", f"server.model_draft={pointer}", f"mmproj={pointer}"):
        assert "is a Git LFS pointer" in doit("plan", f"model={gguf}", words, status=1).err
    wrong = doit("plan", f"model={tiny}", "quant=q4_k_m", f"imatrix={pointer}", status=1)
    assert "is a Git LFS pointer" in wrong.err
    wrong = doit("plan", f"model={tiny}", "quant=q4_k_m", f"imatrix={gguf}", status=3)
    assert "no importance matrix" in wrong.err


def test_a_file_that_is_no_model_is_refused_in_a_file_of_servers(
    doit: Doit, tmp_path: Path
) -> None:
    pointer = tmp_path / "m.gguf"
    pointer.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n")
    for task in ("plan", "up"):
        for raw in (False, True):
            wrong = doit(task, config(tmp_path, pointer, raw=raw), status=1)
            assert f"{pointer}: is a Git LFS pointer" in wrong.err
            assert "git lfs pull" in wrong.err
