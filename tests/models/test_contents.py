"""Files that people have in place of a model are named for what they are, with the way out."""

from __future__ import annotations

import io
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.core.errors import PipelineError
from pipeline.core.paths import Home
from pipeline.models import contents, resolve

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 4321\n"


def zipped(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, b"x" * 2000)
    return buffer.getvalue()


def tarred() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model.gguf"))
    return buffer.getvalue()


FILES = {
    "lfs": (POINTER, ["Git LFS pointer", "git lfs pull"]),
    "xet": (b"# xet version 0\nfilesize = 3\n" + bytes(20), ["Xet pointer"]),
    "annex": (b"/annex/objects/SHA256E-s5--abc.gguf\n", ["git-annex", "annex get"]),
    "page": (b"\n<!DOCTYPE html>\n<html><head>", ["web page", "/resolve/"]),
    "page, small letters": (b"<html lang=en><head></head></html>", ["web page"]),
    "xml": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>', ["XML", "/resolve/"]),
    "json": (b'{"error":"Invalid username or password."}', ["JSON", "download"]),
    "empty": (b"", ["is empty", "download"]),
    "zeros": (bytes(4096), ["zeros", "download"]),
    "ggml": (struct.pack("<I", 0x67676D6C) + bytes(40), ["GGML", "GGUF"]),
    "ggmf": (struct.pack("<I", 0x67676D66) + bytes(40), ["GGMF", "GGUF"]),
    "ggjt": (struct.pack("<I", 0x67676A74) + bytes(40), ["GGJT", "GGUF"]),
    "ggla": (struct.pack("<I", 0x67676C61) + bytes(40), ["GGLA", "LoRA"]),
    "version 1": (b"GGUF" + struct.pack("<III", 1, 0, 0) + bytes(20), ["version 1"]),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 1, 1) + bytes(20), ["big-endian"]),
    "torch": (zipped("archive/data.pkl"), ["PyTorch", "runs code"]),
    "pickle": (pickle.dumps({"weight": [0.5] * 20}), ["pickled", "runs code"]),
    "zip": (zipped("model.gguf"), ["zip archive", "unpack"]),
    "tar": (tarred(), ["tar archive", "unpack"]),
    "gzip": (b"\x1f\x8b\x08" + bytes(40), ["compressed", "unpack"]),
    "llamafile": (b"MZqFpD='\n" + bytes(40), ["llamafile", "unzip"]),
    "program": (b"\x7fELF" + bytes(40), ["program"]),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(40), ["HDF5"]),
    "onnx": (b"\x08\x08\x12\x07pytorch\x1a\x052.1.0" + bytes(20), ["ONNX"]),
    "safetensors": (struct.pack("<Q", 2) + b"{}" + bytes(20), ["safetensors", "config.json"]),
    "text": (b"this is a page, not a model", ["does not start with GGUF"]),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_that_is_no_gguf_is_named_for_what_it_is(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(FILES[kind][0])
    said = refusal(path)
    assert str(path) in said and "hint: " in said
    for words in FILES[kind][1]:
        assert words in said


def refusal(path: Path) -> str:
    with pytest.raises(PipelineError) as caught:
        resolve.gguf_path(path, Home(path.parent / "home"))
    return str(caught.value)


def write(
    path: Path, arch: str, kind: str = "", tensors: tuple[str, ...] = ("t",), **more: Any
) -> None:
    """A GGUF by the official writer, with the metadata that its program writes."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, arch)
    if kind:
        writer.add_type(kind)
    for key, value in more.items():
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        add(key.replace("__", "."), value)
    for name in tensors:
        writer.add_tensor(name, np.zeros(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


HEAD = ("token_embd.weight", "blk.4.attn_q.weight", "blk.4.nextn.eh_proj.weight")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"arch": "clip", "kind": "mmproj"}, ["projector", "mmproj=PATH"]),
        ({"arch": "clip"}, ["projector", "mmproj=PATH"]),
        ({"arch": "llama", "kind": "adapter"}, ["LoRA adapter", "lora=PATH"]),
        ({"arch": "llama", "adapter__type": "lora"}, ["LoRA adapter", "lora=PATH"]),
        ({"arch": "", "kind": "imatrix"}, ["importance matrix", "imatrix=PATH"]),
        ({"arch": "controlvector"}, ["control vector", "server.control_vector=PATH"]),
        ({"arch": "eagle3"}, ["draft", "server.spec_draft_model=PATH"]),
        ({"arch": "dflash"}, ["draft", "server.spec_draft_model=PATH"]),
        ({"arch": "glm4moe", "tensors": HEAD, "glm4moe__nextn_predict_layers": 1}, ["draft"]),
        ({"arch": "llama", "tensors": ()}, ["vocabulary", "no weights"]),
        ({"arch": "flux"}, ["diffusion model", "stable-diffusion.cpp"]),
        ({"arch": "qwen_image"}, ["diffusion model"]),
        ({"arch": "wavtokenizer-dec"}, ["vocoder"]),
        ({"arch": "llama", "split__count": 2}, ["one of 2 parts", "-00001-of-0000N.gguf"]),
    ],
    ids=lambda value: f"{value['arch']}-{value.get('kind', '')}" if isinstance(value, dict) else "",
)
def test_a_gguf_that_is_no_model_is_named_for_what_it_is(
    args: dict[str, Any], says: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "any name.gguf"
    write(path, **args)
    said = refusal(path)
    assert str(path) in said
    for words in says:
        assert words in said


def test_a_model_with_a_head_for_drafts_is_a_model(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write(path, "glm4moe", tensors=("blk.0.attn_q.weight", *HEAD), glm4moe__nextn_predict_layers=1)
    assert resolve.gguf_path(path, Home(tmp_path / "home")).kind == "gguf"


def test_parts_of_two_models_are_not_one(tmp_path: Path) -> None:
    paths = [tmp_path / f"m-0000{n}-of-00002.gguf" for n in (1, 2)]
    for path in paths:
        write(path, "llama", split__count=2, split__tensors__count=3)
    assert "has 2 tensors in its parts, by its header 3" in refusal(paths[0])


def test_a_page_of_many_comments_is_recognized_at_once() -> None:
    """Its start was tried in 2**140 ways."""
    comments = b"<!-- a -->" * 100
    assert contents.foreign(comments + b"text") is None
    kind = contents.foreign(comments + b"<html>")
    assert kind and "web page" in kind[0]
    kind = contents.foreign(b" <!-- > --> \n<!---->\n<!DOCTYPE html>")
    assert kind and "web page" in kind[0]


def test_a_damaged_gguf_of_123_tensors_is_no_safetensors_file(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 123, 1) + bytes(40))
    assert "is not a usable GGUF" in refusal(path)
