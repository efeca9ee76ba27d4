"""A profile of the registry, planned and served."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from conftest import Doit, chat, free_port
from fakes import hub

pytestmark = pytest.mark.build


@pytest.fixture
def registry(doit: Doit, gguf: Path, tmp_path: Path) -> Path:
    file = tmp_path / "profiles ü.yaml"
    profile = {
        "display_name": "Tiny",
        "backend": "llamacpp",
        "model_id": "tiny-chat",
        "gpu": {"device_ids": "0"},
        "llamacpp": {
            "gguf_path": str(gguf),
            "port": free_port(),
            "ctx_size": 512,
            "threads": 1,
            "parallel": 1,
        },
    }
    file.write_text(json.dumps({"profiles": {"tiny": profile}}), encoding="utf-8")  # YAML too
    doit.env["LLM_PROFILES_CONFIG_PATH"] = str(file)
    return file


def planned(doit: Doit, *words: str) -> dict[str, Any]:
    """The options of the one instance, and its environment."""
    (told,) = doit("plan", "format=json", *words).json()
    cmd = told["cmd"]
    values = {w: v for w, v in zip(cmd, [*cmd[1:], ""], strict=True) if w.startswith("--")}
    return values | told["env"]


def test_who_wins(doit: Doit, registry: Path) -> None:
    assert planned(doit, "profile=tiny")["--ctx-size"] == "512"
    doit.env |= {"LLAMACPP_CTX_SIZE_OVERRIDE": "256", "LLAMACPP_THREADS_OVERRIDE": " "}
    doit.env["CUDA_VISIBLE_DEVICES_OVERRIDE"] = "2,1"
    told = planned(doit, "profile=tiny")
    assert (told["--ctx-size"], told["--threads"], told["--alias"]) == ("256", "1", "tiny-chat")
    assert told["CUDA_VISIBLE_DEVICES"] == "2,1"
    assert planned(doit, "profile=tiny", "ctx_size=128")["--ctx-size"] == "128"
    doit.env["LLM_PROFILE_NAME"] = "tiny"
    assert planned(doit)["--ctx-size"] == "256"


def test_served(doit: Doit, registry: Path) -> None:
    port = free_port()
    with doit.start("serve", "profile=tiny", f"port={port}", "format=json") as process:
        assert process.stdout is not None
        told = json.loads(process.stdout.readline())
        assert told["url"] == f"http://127.0.0.1:{port}"
        assert chat(told["url"])
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=120)
    assert process.returncode == 0


@pytest.mark.parametrize("parts", [False, True])
def test_a_missing_file_is_had_from_its_repository(
    doit: Doit, registry: Path, gguf: Path, tmp_path: Path, parts: bool
) -> None:
    """It is downloaded once, with all its parts, to where the profile wants it."""
    there = tmp_path / "hub" / "org" / "tiny-GGUF"
    there.mkdir(parents=True)
    if parts:
        split = next((doit.home / "bins").glob("*-cpu")) / "llama-gguf-split"
        words = [split, "--split", "--split-max-tensors", "8", gguf, there / "tiny-q8_0"]
        subprocess.run(words, check=True, capture_output=True)
    else:
        shutil.copyfile(gguf, there / "tiny-q8_0.gguf")
    files = sorted(there.iterdir())
    assert (len(files) > 1) == parts
    told = json.loads(registry.read_text())
    table = told["profiles"]["tiny"]["llamacpp"]
    del table["gguf_path"]
    table |= {"model_root": "cache", "hf_repo_id": "org/tiny-GGUF", "hf_filename": files[0].name}
    registry.write_text(json.dumps(told))
    with hub.start(tmp_path / "hub") as site:
        doit.env |= {"HF_ENDPOINT": site.endpoint, "HF_HOME": str(tmp_path / "hf")}
        doit.env["NO_PROXY"] = "127.0.0.1"
        doit("up", "profile=tiny")
        for file in files:
            assert (tmp_path / "cache" / file.name).read_bytes() == file.read_bytes()
        (row,) = doit("ps", "profile=tiny", "format=json").json()
        assert row["state"] == "ready"
        assert chat(row["url"])
        doit("down", "profile=tiny")
    placed = planned(doit, "profile=tiny", "offline=1")["--model"]
    assert placed == str(tmp_path / "cache" / files[0].name)


def test_where_nothing_can_be_put_nothing_is_downloaded(
    doit: Doit, registry: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    told = json.loads(registry.read_text())
    table = {"model_root": "file", "hf_repo_id": "org/tiny-GGUF", "hf_filename": "tiny-q8_0.gguf"}
    told["profiles"]["tiny"]["llamacpp"] = table
    registry.write_text(json.dumps(told))
    doit.env["HF_ENDPOINT"] = "http://127.0.0.1:1"
    said = doit("prepare", "profile=tiny", status=1).err
    assert f"{tmp_path / 'file'}: cannot be written to" in said
    doit.env["LLM_PROFILE_NAME"] = "tiny"
    assert "cannot be written" not in doit("source", status=None).err, "it puts nothing there"
    assert "let this user write there" in said


def test_what_is_missing_is_said(doit: Doit, registry: Path) -> None:
    wrong = doit("serve", "profile=tinny", status=3)
    assert "did you mean tiny?" in wrong.err
    registry.write_text("profile: {}\n")
    assert "has no key profiles" in doit("serve", "profile=tiny", status=3).err
    registry.unlink()
    assert "no registry of profiles" in doit("serve", "profile=tiny", status=3).err
