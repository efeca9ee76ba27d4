"""A vision model that is converted here sees: its projector is made with it."""

from __future__ import annotations

import base64
import shutil
import struct
import zlib
from pathlib import Path

import pytest
from conftest import Doit, post

pytestmark = [pytest.mark.build, pytest.mark.slow]


def png(color: bytes, side: int = 56) -> str:
    """A picture of one color, as an address."""

    def chunk(name: bytes, data: bytes) -> bytes:
        body = name + data
        return len(data).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    rows = zlib.compress((b"\0" + color * side) * side)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


@pytest.fixture
def vision(tmp_path: Path) -> Path:
    from fakes import tiny_vision

    tiny_vision.make(tmp_path / "sees ü")
    return tmp_path / "sees ü"


def look(url: str, picture: str) -> dict[str, int]:
    content = [
        {"type": "text", "text": "what is this"},
        {"type": "image_url", "image_url": {"url": picture}},
    ]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 8, "temperature": 0}
    usage: dict[str, int] = post(f"{url}/v1/chat/completions", body)["usage"]
    return usage


def test_a_converted_vision_model_sees(doit: Doit, vision: Path, converter: Path) -> None:
    asked = (f"model={vision}", "quant=q8_0", "ctx_size=1024")
    todo = [s for s in doit("plan", *asked, "format=json").json()["steps"] if s["state"] == "to do"]
    assert [step["name"] for step in todo] == ["convert", "convert:mmproj"]
    with doit.serving(*asked) as url:
        assert look(url, png(b"\xff\x00\x00"))["completion_tokens"] > 0
    assert doit.summary["projector"] == "mmproj.f16.gguf"
    assert doit("prepare", *asked[:2]).steps == []

    # another quant makes no other projector, a lost one is made alone
    made = next((doit.home / "models").rglob("mmproj.f16.gguf"))
    before, model = made.stat().st_mtime_ns, made.with_name("model.q8_0.gguf").stat().st_mtime_ns
    doit("prepare", asked[0], "quant=f16")
    assert made.stat().st_mtime_ns == before
    made.unlink()
    assert doit("prepare", *asked[:2]).steps == ["convert"]
    assert made.is_file()
    assert made.with_name("model.q8_0.gguf").stat().st_mtime_ns == model

    doit("clean", "convert", *asked[:2])
    assert not made.exists()
    blind = doit("plan", *asked, "mmproj=none", "format=json").json()
    assert "convert:mmproj" not in [step["name"] for step in blind["steps"]]


def test_through_the_hub(doit: Doit, vision: Path, converter: Path, tmp_path: Path) -> None:
    from fakes import hub

    shutil.copytree(vision, tmp_path / "hub" / "org" / "sees")
    with hub.start(tmp_path / "hub") as server:
        doit.env |= {"HF_ENDPOINT": server.endpoint, "HF_HUB_DISABLE_XET": "1"}
        doit.env |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}
        doit("prepare", "model=org/sees", "quant=q8_0")
        assert [*(doit.home / "models").rglob("mmproj.f16.gguf")]
        assert doit("prepare", "model=org/sees", "quant=q8_0").steps == []


def test_what_cannot_be_converted_names_the_way_out(
    doit: Doit, vision: Path, converter: Path
) -> None:
    (vision / "preprocessor_config.json").unlink()
    refused = doit("prepare", f"model={vision}", "quant=q8_0", status=1)
    assert "the projector of sees-ü could not be converted" in refused.err
    assert "mmproj=none serves the model without it" in refused.err
    doit("prepare", f"model={vision}", "quant=q8_0", "mmproj=none")
