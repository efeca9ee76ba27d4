"""Models from a hub, as users get them: chosen, planned, fetched, pinned and served."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import tarfile
import tomllib
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from conftest import Doit, Run, get, post, wait_for, with_programs
from fakes import hub, tiny_llama, tiny_projector

from pipeline.core.store import receipts

pytestmark = [pytest.mark.build, pytest.mark.slow]

TOKEN = "hf_secretSECRETsecretSECRETsecret12"
WEIGHTS = (".gguf", ".safetensors", ".bin", ".part", ".onnx")


@dataclass(frozen=True)
class Parts:
    """What repositories are filled with: the tiny model in all the forms that uploaders use."""

    folder: Path  # safetensors in two files
    f16: Path
    q8_0: Path
    q4_k_m: Path
    shards: list[Path]  # of the Q8_0
    large: Path  # 30 MB
    mmproj: dict[str, Path]


@pytest.fixture(scope="module")
def parts(built: Path, converter: Path, tmp_path_factory: pytest.TempPathFactory) -> Parts:
    top = tmp_path_factory.mktemp("parts")
    folder = top / "tiny"
    tiny_llama.make(folder, shards=2)
    doit = with_programs(built, top / "hôme")
    made: dict[str, Path] = {}
    for quant in ("f16", "q8_0", "q4_k_m"):
        doit("prepare", f"model={made.get('f16', folder)}", f"quant={quant}")
        made[quant] = next((doit.home / "models" / "gguf").rglob(f"*.{quant}.gguf"))
    shards = top / "shards"
    shards.mkdir()
    split = next(built.glob("*-cpu")) / "llama-gguf-split"
    command = [split, "--split", "--split-max-tensors", "8", made["q8_0"], shards / "tiny-Q8_0"]
    subprocess.run(command, check=True, capture_output=True)
    widths = {"tiny-F16": tiny_llama.HIDDEN, "tiny-F32": tiny_llama.HIDDEN, "wide-F16": 512}
    mmproj = {f"mmproj-{name}.gguf": top / f"mmproj-{name}.gguf" for name in widths}
    for (name, width), path in zip(widths.items(), mmproj.values(), strict=True):
        tiny_projector.make(path, width=width, dtype="f32" if "F32" in name else "f16")
    large = top / "large.gguf"
    make_large(made["f16"], large)
    return Parts(
        folder=folder,
        f16=made["f16"],
        q8_0=made["q8_0"],
        q4_k_m=made["q4_k_m"],
        shards=sorted(shards.iterdir()),
        large=large,
        mmproj=mmproj,
    )


def make_large(tiny: Path, path: Path, deep: int = 8192) -> None:
    """A GGUF with the metadata of `tiny` but for its feed-forward length, and random weights."""
    reader, rng = gguf.GGUFReader(tiny), np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value = deep if name == "llama.feed_forward_length" else field.contents()
        writer.add_key_value(name, value, field.types[0], field.types[-1])
    for tensor in reader.tensors:
        shape = [int(n) for n in reversed(tensor.shape)]
        shape = [
            deep if n == tiny_llama.INTERMEDIATE and "ffn" in tensor.name else n for n in shape
        ]
        values = rng.standard_normal(shape, dtype=np.float32)
        writer.add_tensor(tensor.name, values.astype(tensor.data.dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Site:
    """A hub of a test's own, and a user of it."""

    def __init__(self, root: Path, server: hub.Running, doit: Doit, built: Path) -> None:
        self.root, self.server, self.built = root, server, built
        self.doit = self.connected(doit)

    def connected(self, doit: Doit) -> Doit:
        """`doit` with this hub, and with caches and a working folder of its own beside its home."""
        folder = doit.home.parent / f"{doit.home.name} user"
        folder.mkdir()
        doit.env |= {
            "HF_ENDPOINT": self.server.endpoint,
            "HF_HOME": str(folder / "hf"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "LLAMA_PIPELINE_CWD": str(folder),
        }
        return doit

    def stranger(self, name: str) -> Doit:
        """Another user on an empty home with programs."""
        return self.connected(with_programs(self.built, self.root.parent / name / "ein häus"))

    def put(self, repo: str, files: Mapping[str, Path | bytes], **settings: Any) -> Path:
        """Push a repository."""
        folder = self.root / repo
        folder.mkdir(parents=True)
        for name, content in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:
                shutil.copyfile(content, path)
        if settings:
            (folder / ".hub.json").write_text(json.dumps(settings))
        return folder

    def log(self) -> list[dict[str, Any]]:
        """The requests since the last time."""
        entries = self.server.log()
        self.server.control(clear_log=True)
        return entries


@pytest.fixture
def site(doit: Doit, built: Path, tmp_path: Path) -> Iterator[Site]:
    root = tmp_path / "hub"
    root.mkdir()
    with hub.start(root) as server:
        yield Site(root, server, doit, built)


def tree(folder: Path) -> dict[str, Path]:
    """All files below a folder by their names in a repository."""
    return {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}


def weights(doit: Doit) -> list[str]:
    """All weights and parts of such that lie among the models."""
    models = doit.home / "models"
    return sorted(p.name for p in models.rglob("*") if p.is_file() and p.suffix in WEIGHTS)


def lock_of(doit: Doit) -> Path:
    return Path(doit.env["LLAMA_PIPELINE_CWD"]) / "pipeline.lock"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def chat(url: str, content: Any = "hello there") -> Any:
    """What is counted of an answer of 8 tokens."""
    messages = [{"role": "user", "content": content}]
    body = {"messages": messages, "max_tokens": 8, "temperature": 0}
    answer = post(f"{url}/v1/chat/completions", body)
    assert answer["choices"][0]["message"]["content"]
    return answer["usage"]


def picture() -> list[dict[str, Any]]:
    """A message with an image: noise, as a PNG of 7 KB."""
    side, rng = 48, random.Random(0)
    rows = b"".join(b"\0" + rng.randbytes(3 * side) for _ in range(side))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head)
    png += chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    data = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    return [
        {"type": "text", "text": "what is this?"},
        {"type": "image_url", "image_url": {"url": data}},
    ]


# Served


def test_a_split_model_is_served_and_then_needs_no_hub(site: Site, parts: Parts) -> None:
    files = {f"Q8_0/{path.name}": path for path in parts.shards}
    assert len(files) == 3
    site.put("org/split", files | {"tiny-Q4_K_M.gguf": parts.q4_k_m})
    with site.doit.serving("model=org/split:Q8_0", "ctx_size=512") as url:
        assert chat(url)["completion_tokens"] == 8
        assert site.doit.summary["quant"] == "Q8_0"
    assert weights(site.doit) == [path.name for path in parts.shards]
    folder = next(site.doit.home.rglob("*-00001-of-00003.gguf")).parent
    noted = {name: entry.sha256 for name, entry in receipts.load(folder).items()}
    assert noted == {path.name: sha256(path) for path in parts.shards}

    assert site.log()
    again = site.doit("prepare", "model=org/split", "quant=q8_0")
    assert again.steps == []
    with site.doit.serving("model=org/split:Q8_0", "ctx_size=512") as url:
        chat(url)
    assert site.log() == []


def test_a_shard_that_is_missing_is_named(site: Site, parts: Parts) -> None:
    site.put("org/torn", {path.name: path for path in parts.shards if "-00002-" not in path.name})
    wrong = site.doit("prepare", "model=org/torn:Q8_0", status=3)
    assert "tiny-Q8_0-00002-of-00003.gguf" in wrong.err and "3 parts" in wrong.err
    assert weights(site.doit) == []


def test_the_projector_that_fits_is_served(site: Site, parts: Parts) -> None:
    doit = site.doit
    site.put("org/eyes", {"tiny-Q8_0.gguf": parts.q8_0, **parts.mmproj})
    with doit.serving("model=org/eyes", "mmproj=none", "ctx_size=1024") as url:
        assert get(f"{url}/props")["modalities"]["vision"] is False
        assert "projector" not in doit.summary
    assert weights(doit) == ["tiny-Q8_0.gguf"]

    with doit.serving("model=org/eyes", "ctx_size=1024") as url:
        assert doit.summary["projector"] == "mmproj-tiny-F16.gguf"
        assert get(f"{url}/props")["modalities"]["vision"] is True
        text = chat(url, "what is this?")["prompt_tokens"]
        assert chat(url, picture())["prompt_tokens"] >= text + tiny_projector.PATCHES
    assert weights(doit) == ["mmproj-tiny-F16.gguf", "tiny-Q8_0.gguf"]
    cmd = doit("plan", "model=org/eyes", "ctx_size=1024", "format=json").json()["cmd"]
    assert cmd[cmd.index("--mmproj") + 1].endswith("mmproj-tiny-F16.gguf")

    with doit.serving("model=org/eyes", "mmproj=mmproj-tiny-F32.gguf", "ctx_size=1024") as url:
        assert doit.summary["projector"] == "mmproj-tiny-F32.gguf"
        chat(url, picture())


def test_a_projector_of_another_width_is_refused_at_once(site: Site, parts: Parts) -> None:
    site.put("org/eyes", {"tiny-Q8_0.gguf": parts.q8_0, **parts.mmproj})
    wrong = site.doit("serve", "model=org/eyes", "mmproj=mmproj-wide-F16.gguf", status=3)
    assert "mmproj-wide-F16.gguf: does not fit this model" in wrong.err
    unknown = site.doit("serve", "model=org/eyes", "mmproj=mmproj-none.gguf", status=3)
    assert "mmproj-tiny-F16.gguf" in unknown.err, "those that there are"
    no_projector = site.doit("serve", "model=org/eyes", "mmproj=tiny-Q8_0.gguf", status=3)
    assert "is not a projector" in no_projector.err
    assert weights(site.doit) == []


def test_a_projector_of_the_users_own(site: Site, parts: Parts) -> None:
    own = parts.mmproj["mmproj-tiny-F16.gguf"]
    with site.doit.serving(f"model={parts.q8_0}", f"mmproj={own}", "ctx_size=1024") as url:
        assert site.doit.summary["projector"] == own.name
        chat(url, picture())
    wide = parts.mmproj["mmproj-wide-F16.gguf"]
    wrong = site.doit("serve", f"model={parts.q8_0}", f"mmproj={wide}", status=None)
    assert wrong.status in (1, 3) and "does not fit this model" in wrong.err


@pytest.mark.parametrize("dimension", [0, 768], ids=["minicpmv", "llava"])
def test_a_projector_of_the_older_converters(site: Site, parts: Parts, dimension: int) -> None:
    """tools/mtmd/legacy-models writes CLIP's own projection_dim or 0, and no general.type; most
    projectors of LLaVA, MiniCPM-V and GLM-Edge on the hub are such, and llama-server takes them."""
    data = (
        parts.mmproj["mmproj-tiny-F16.gguf"].read_bytes().replace(b"general.type", b"general.odds")
    )
    key, uint32 = b"clip.vision.projection_dim", 4
    told_width = key + struct.pack("<II", uint32, tiny_llama.HIDDEN)
    assert data.count(told_width) == 1
    data = data.replace(told_width, key + struct.pack("<II", uint32, dimension))
    site.put("org/old", {"tiny-Q8_0.gguf": parts.q8_0, "mmproj-model-f16.gguf": data})
    words = ("model=org/old", "mmproj=mmproj-model-f16.gguf", "ctx_size=1024")
    with site.doit.serving(*words) as url:
        chat(url, picture())


def test_a_projector_of_the_users_own_is_refused_before_the_download(
    site: Site, parts: Parts
) -> None:
    site.put("org/model", {"tiny-Q8_0.gguf": parts.q8_0})
    wide = parts.mmproj["mmproj-wide-F16.gguf"]
    wrong = site.doit("serve", "model=org/model", f"mmproj={wide}", status=None)
    assert wrong.status in (1, 3) and "does not fit this model" in wrong.err
    assert weights(site.doit) == []


def test_only_the_weights_and_what_belongs_to_them_is_taken(site: Site, parts: Parts) -> None:
    whole = parts.folder / "model-00001-of-00002.safetensors"
    traps: dict[str, Path | bytes] = {
        "modeling.py": b"raise SystemExit('this must not be run')",
        "tokenization.py": b"raise SystemExit('this must not be run')",
        "pytorch_model.bin": b"pickle",
        "training_args.bin": b"pickle",
        "consolidated.safetensors": whole,
        "onnx/model.onnx": b"onnx",
        "onnx/model.safetensors": whole,
        ".gitattributes": b"* lfs",
    }
    site.put("org/trapped", tree(parts.folder) | traps | {"empty.txt": b""})
    with site.doit.serving("model=org/trapped", "ctx_size=512") as url:
        assert site.doit.summary["quant"] == "Q4_K_M"
        chat(url)
    source = next((site.doit.home / "models" / "source").iterdir())
    found = {name for name in tree(source) if not name.endswith(".lock")}
    assert found - {receipts.FILE} == {*tree(parts.folder), "empty.txt"}
    touched = {entry["path"].rpartition("/")[2] for entry in site.log()}
    assert not touched & {Path(name).name for name in traps}
    assert site.doit("prepare", "model=org/trapped").steps == [] and site.log() == []


def test_files_of_other_formats_in_subfolders_are_left_there(site: Site, parts: Parts) -> None:
    site.put("org/onnx", tree(parts.folder) | {"onnx/tokenizer.json": b'{"large": 1}'})
    site.doit("fetch", "model=org/onnx")
    assert [*site.doit.home.glob("models/source/*/tokenizer.model")]
    assert not [*site.doit.home.rglob("onnx")]


# Chosen


def test_gguf_beside_safetensors(site: Site, parts: Parts) -> None:
    ggufs = {"tiny-Q8_0.gguf": parts.q8_0, "tiny-Q4_K_M.gguf": parts.q4_k_m}
    site.put("org/both", tree(parts.folder) | ggufs)
    there = site.doit("prepare", "model=org/both:q8_0")
    assert there.steps == ["resolve", "fetch"] and weights(site.doit) == ["tiny-Q8_0.gguf"]
    assert "Q8_0 was asked for" in there.err
    made = site.doit("prepare", "model=org/both", "quant=q5_k_m")
    assert made.steps == ["resolve", "fetch", "convert", "quantize"]
    assert "it has no GGUF with Q5_K_M: converted from safetensors" in made.err
    assert "model.q5_k_m.gguf" in weights(site.doit)


def test_which_quant_is_taken(site: Site, parts: Parts) -> None:
    files = {"F16": parts.f16, "Q8_0": parts.q8_0, "Q4_K_M": parts.q4_k_m, "Q5_K_S": parts.q4_k_m}
    site.put("org/many", {f"tiny-{quant}.gguf": path for quant, path in files.items()})
    unknown = site.doit("prepare", "model=org/many", "quant=q3_k_s", status=3)
    assert "Q3_K_S" in unknown.err
    for quant in files:
        line = next(line for line in unknown.err.splitlines() if f"tiny-{quant}.gguf" in line)
        assert quant in line.split() and line.split()[2] in ("kB", "MB"), line
    assert weights(site.doit) == []

    said = site.doit("prepare", "model=org/many").err
    assert "Q4_K_M: no quant was asked for" in said
    assert weights(site.doit) == ["tiny-Q4_K_M.gguf"]
    best = site.doit("prepare", "model=org/many", "quant=auto").err
    assert "Q8_0: the best that fits the memory" in best, "unquantized ones are hardly better"
    assert weights(site.doit) == ["tiny-Q4_K_M.gguf", "tiny-Q8_0.gguf"]
    site.log()
    assert site.doit("prepare", "model=org/many", "quant=auto").steps == []
    assert site.doit("prepare", "model=org/many").steps == []
    assert site.log() == []


def test_several_models_are_not_guessed_from(site: Site, parts: Parts) -> None:
    site.put("org/two", {"large-Q4_K_M.gguf": parts.large, "tiny-Q4_K_M.gguf": parts.q4_k_m})
    for words in ((), ("quant=auto",), ("quant=q4_k_m",)):
        wrong = site.doit("prepare", "model=org/two", *words, status=3)
        assert "large-Q4_K_M.gguf" in wrong.err and "tiny-Q4_K_M.gguf" in wrong.err
        assert "filename=" in wrong.err
    assert weights(site.doit) == []
    site.doit("prepare", "model=org/two", "pattern=tiny*")
    site.doit("prepare", "model=org/two", "filename=large-Q4_K_M.gguf")
    assert weights(site.doit) == ["large-Q4_K_M.gguf", "tiny-Q4_K_M.gguf"]


# Planned


def test_a_plan_moves_no_weight_and_is_right(site: Site, parts: Parts) -> None:
    doit = site.doit
    site.put("org/large", {"large-F16.gguf": parts.large, "tiny-Q8_0.gguf": parts.q8_0})
    plan = doit("plan", "model=org/large:F16", "format=json").json()
    entries, size = site.log(), parts.large.stat().st_size
    assert size > 25e6 and sum(entry["sent"] for entry in entries) < 3e6
    assert {entry["status"] for entry in entries} <= {200, 206, 302, 307}
    assert weights(doit) == []
    assert plan["download_bytes"] == plan["file_bytes"] == size
    assert plan["files"] == [{"name": "large-F16.gguf", "bytes": size}]
    assert plan["disk_peak_bytes"] >= size
    memory = plan["memory"]
    assert memory["estimate"] is False and memory["fits"] is True and not plan["estimate_why"]
    # llama-fit-params tells whole MiB
    assert abs(memory["weights_bytes"] - size) < 2 * 1024**2
    assert memory["context_bytes"] > 0 and memory["compute_bytes"] > 0
    assert plan["cmd"][plan["cmd"].index("--model") + 1] == plan["file"]
    states = {step["name"]: step["state"] for step in plan["steps"]}
    assert states["fetch"] == "to do" and states["build_bins"] == "up to date"
    text = doit("plan", "model=org/large:F16").out
    assert "large-F16.gguf" in text and "download" in text and "fits" in text
    site.log()

    assert doit("prepare", "model=org/large:F16").steps == ["resolve", "fetch"]
    bodies = [entry for entry in site.log() if entry["path"].endswith("large-F16.gguf")]
    assert size <= sum(entry["sent"] for entry in bodies) < size + 3e6
    assert Path(plan["file"]).stat().st_size == size
    after = doit("plan", "model=org/large:F16", "format=json").json()
    assert after["download_bytes"] == after["disk_peak_bytes"] == 0
    assert after["memory"]["total_bytes"] == memory["total_bytes"]


def test_a_plan_of_safetensors_is_right(site: Site, parts: Parts) -> None:
    site.put("org/tiny", tree(parts.folder))
    plan = site.doit("plan", "model=org/tiny", "quant=q6_k", "format=json").json()
    files = tree(parts.folder)
    assert plan["download_bytes"] == sum(path.stat().st_size for path in files.values())
    assert {file["name"] for file in plan["files"]} == set(files)
    assert plan["memory"]["estimate"] is False
    assert weights(site.doit) == []
    site.doit("prepare", "model=org/tiny", "quant=q6_k")
    assert Path(plan["file"]).stat().st_size == plan["file_bytes"]


def test_every_quant_with_its_size(site: Site, parts: Parts) -> None:
    sizes = {"F16": parts.f16, "Q8_0": parts.q8_0, "Q4_K_M": parts.q4_k_m}
    site.put("org/many", {f"tiny-{quant}.gguf": path for quant, path in sizes.items()})
    rows = site.doit("plan", "model=org/many", "quant=all", "format=json").json()
    assert {row["quant"]: row["file_bytes"] for row in rows} == {
        quant: path.stat().st_size for quant, path in sizes.items()
    }
    assert [row["quant"] for row in rows] == ["Q4_K_M", "Q8_0", "F16"]
    assert all(row["fits"] and row["memory_bytes"] > 0 for row in rows)

    site.put("org/tiny", tree(parts.folder))
    made = site.doit("plan", "model=org/tiny", "quant=all", "format=json").json()
    found = {row["quant"]: row["file_bytes"] for row in made}
    assert {"Q4_K_M", "Q8_0", "Q6_K", "F16"} <= set(found)
    assert found["Q4_K_M"] < found["Q6_K"] < found["Q8_0"] < found["F16"]
    assert weights(site.doit) == []
    table = site.doit("plan", "model=org/tiny", "quant=all").out
    assert "Q4_K_M" in table and "Q8_0" in table


# Pinned


def test_what_is_locked_is_built_anywhere(site: Site, parts: Parts) -> None:
    words = ("model=org/tiny", "quant=q6_k")
    pushed = site.put("org/tiny", tree(parts.folder))
    site.doit("lock", *words)
    first = lock_of(site.doit).read_bytes()
    site.doit("lock", *words)
    assert lock_of(site.doit).read_bytes() == first
    entry = tomllib.loads(first.decode())["model"][0]
    assert {file["name"] for file in entry["files"]} == set(tree(parts.folder))
    result = next(site.doit.home.rglob("model.q6_k.gguf"))
    assert entry["result"]["sha256"] == sha256(result)

    # The repository gets another commit; the one before stays in its history.
    shutil.copytree(pushed, site.root / "old")
    shutil.move(site.root / "old", pushed / ".hub" / "old")
    (pushed / ".hub.json").write_text(json.dumps({"branches": {"old": ".hub/old"}}))
    (pushed / "generation_config.json").write_bytes(b'{"bos_token_id": 1, "eos_token_id": [2, 4]}')
    other = site.stranger("änother folder")
    shutil.copy(lock_of(site.doit), lock_of(other))
    site.log()
    other("prepare", *words, "frozen=1")
    asked = [entry["path"] for entry in site.log()]
    assert asked and not [path for path in asked if path.startswith("/api/")]
    again = next(other.home.rglob("model.q6_k.gguf"))
    assert sha256(again) == sha256(result)
    assert other("prepare", *words, "frozen=1").steps == [] and site.log() == []
    with other.serving(*words, "frozen=1", "ctx_size=512") as url:
        chat(url)

    unfrozen = other("lock", *words)
    assert "fetch" in unfrozen.steps, "main has moved"
    assert lock_of(other).read_bytes() != first


def test_force_downloads_again(site: Site, parts: Parts) -> None:
    site.put("org/one", {"tiny-Q8_0.gguf": parts.q8_0})
    words = ["prepare", "model=org/one"]
    site.doit(*words)
    file = next((site.doit.home / "models").rglob("tiny-Q8_0.gguf"))
    whole, stat = file.read_bytes(), file.stat()
    file.write_bytes(whole[:-40] + bytes(40))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    site.log()
    assert site.doit(*words).steps == [] and site.log() == []
    offline = site.doit(*words, "force=1", "offline=1", status=1)
    assert "is damaged" in offline.err and "forbids downloading" in offline.err
    plan = site.doit("plan", "model=org/one", "force=1", "format=json").json()
    assert plan["download_bytes"] == len(whole)
    assert site.doit(*words, "force=1").steps == ["fetch"]
    assert file.read_bytes() == whole
    assert site.doit(*words, "force=1", "offline=1").steps == ["fetch"], "hashed, and right"


def test_a_lock_of_a_checkout_holds_for_a_package_of_the_same_source(
    site: Site, parts: Parts, package: Path, tmp_path: Path
) -> None:
    """Its programs are what an image has, and each node of a cluster that runs it."""
    site.put("org/one", {"tiny-Q8_0.gguf": parts.q8_0})
    site.doit("lock", "model=org/one")
    other = site.stranger("with a package")
    shutil.copy(lock_of(site.doit), lock_of(other))
    with tarfile.open(package) as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    (manifest,) = (tmp_path / "unpacked").rglob("manifest.json")
    other.env["LLAMA_SERVER_BINS_DIR"] = str(manifest.parent / "bin")
    other("prepare", "model=org/one", "frozen=1")
    manifest.unlink()  # programs of nobody knows which source
    refused = other("prepare", "model=org/one", "frozen=1", status=3)
    assert "llama_quantize_sha256: locked is nothing" in refused.err


def test_frozen_refuses_what_is_not_locked(site: Site, parts: Parts) -> None:
    doit = site.doit
    site.put("org/many", {"tiny-Q8_0.gguf": parts.q8_0, "tiny-Q4_K_M.gguf": parts.q4_k_m})
    missing = doit("prepare", "model=org/many", "frozen=1", status=3)
    assert "pipeline.lock" in missing.err and "doit lock" in missing.err
    doit("lock", "model=org/many")
    locked = lock_of(doit).read_text()
    other = site.stranger("another")
    other("lock", "model=org/many")
    assert lock_of(other).read_text() == locked

    quant = doit("prepare", "model=org/many", "quant=q8_0", "frozen=1", status=3)
    assert "does not pin this request" in quant.err and "model=org/many" in quant.err

    tool = locked.replace('tree = "', 'tree = "0')
    assert tool != locked
    lock_of(doit).write_text(tool)
    changed = doit("prepare", "model=org/many", "frozen=1", status=3)
    assert "llama_cpp.tree: locked is 0" in changed.err

    commit = tomllib.loads(locked)["model"][0]["source"]["revision"]
    other = site.stranger("a third")
    lock_of(other).write_text(locked.replace(commit, "0" * 40))
    gone = other("prepare", "model=org/many", "frozen=1", status=3)
    assert "org/many" in gone.err and "0" * 40 in gone.err
    assert not [*other.home.glob("models/**/tiny-Q4_K_M.gguf")]

    digest = tomllib.loads(locked)["model"][0]["files"][0]["sha256"]
    lock_of(doit).write_text(locked.replace(digest, "f" * 64))
    file = doit("prepare", "model=org/many", "frozen=1", status=None)
    assert file.status in (1, 3) and "tiny-Q4_K_M.gguf" in file.err and "f" * 64 in file.err
    lock_of(doit).write_text("[[model]\n")
    assert (
        "cannot be read as a lock file"
        in doit("prepare", "model=org/many", "frozen=1", status=3).err
    )
    lock_of(doit).write_text(locked)
    assert doit("prepare", "model=org/many", "frozen=1").steps == []


def test_what_was_chosen_is_locked(site: Site, parts: Parts) -> None:
    files = {"tiny-Q8_0.gguf": parts.q8_0, "tiny-Q4_K_M.gguf": parts.q4_k_m, **parts.mmproj}
    site.put("org/new-eyes", files)
    site.put("org/eyes", {}, renamed_to="org/new-eyes")
    words = ("model=org/eyes", "quant=auto")
    site.doit("lock", *words)
    assert weights(site.doit) == ["mmproj-tiny-F16.gguf", "tiny-Q8_0.gguf"]
    other = site.stranger("another")
    shutil.copy(lock_of(site.doit), lock_of(other))
    site.log()
    plan = other("plan", *words, "frozen=1", "ctx_size=1024", "format=json").json()
    assert plan["download_bytes"] == sum(file["bytes"] for file in plan["files"])
    with other.serving(*words, "frozen=1", "ctx_size=1024") as url:
        assert other.summary["projector"] == "mmproj-tiny-F16.gguf"
        chat(url, picture())
    assert weights(other) == weights(site.doit)
    assert not [entry for entry in site.log() if entry["path"].startswith("/api/")]
    away = site.stranger("a third")
    shutil.copy(lock_of(site.doit), lock_of(away))
    lacking = away("prepare", *words, "frozen=1", "offline=1", status=1)
    assert "tiny-Q8_0.gguf" in lacking.err and "offline=1" in lacking.err
    assert site.log() == []


def test_branches_tags_and_commits(site: Site, parts: Parts) -> None:
    settings = {"branches": {"exp/one": ".hub/one"}, "tags": {"v1.0": "exp/one"}}
    files = {"tiny-Q4_K_M.gguf": parts.q4_k_m, ".hub/one/tiny-Q8_0.gguf": parts.q8_0}
    site.put("org/many", files, **settings)
    said = site.doit("prepare", "model=org/many@v1.0")
    assert "it is the only one" in said.err and weights(site.doit) == ["tiny-Q8_0.gguf"]
    branch = site.doit("prepare", "model=org/many:Q8_0@exp/one")
    assert branch.steps == ["resolve"], "the same commit"
    commit = next((site.doit.home / "models" / "gguf").iterdir()).name.rpartition("__")[2]
    site.doit("lock", "model=org/many", "revision=exp/one")
    entry = tomllib.loads(lock_of(site.doit).read_text())["model"][0]
    full = entry["source"]["revision"]
    assert full.startswith(commit) and len(full) == 40
    assert site.doit("prepare", f"model=org/many@{full}").steps == ["resolve"]
    site.doit("prepare", "model=org/many")
    assert weights(site.doit) == ["tiny-Q4_K_M.gguf", "tiny-Q8_0.gguf"]


def test_a_changed_file_in_a_locked_folder_is_named(
    site: Site, own_tiny: Path, converter: Path
) -> None:
    words = (f"model={own_tiny}", "quant=q8_0")
    site.doit("lock", *words)
    site.doit("prepare", *words, "frozen=1")
    config = own_tiny / "generation_config.json"
    config.write_text(config.read_text().replace("2", "3"))
    before = weights(site.doit)
    wrong = site.doit("prepare", *words, "frozen=1", status=3)
    assert "files[generation_config.json].sha256: locked is" in wrong.err
    assert weights(site.doit) == before


# Without network


def test_offline_with_everything_here_and_with_nothing(site: Site, parts: Parts) -> None:
    site.put("org/many", {"tiny-Q8_0.gguf": parts.q8_0, "tiny-Q4_K_M.gguf": parts.q4_k_m})
    doit = site.doit
    for switch in ({}, {"HF_HUB_OFFLINE": "1"}):
        doit.env |= switch
        missing = doit("prepare", "model=org/many", *([] if switch else ["offline=1"]), status=None)
        assert missing.status in (1, 3) and "org/many" in missing.err
        assert "offline=1" in missing.err and "HF_HUB_OFFLINE" in missing.err
    assert site.log() == []
    del doit.env["HF_HUB_OFFLINE"]
    doit("resolve", "model=org/many")
    lacking = doit("prepare", "model=org/many", "offline=1", status=1)
    assert "tiny-Q4_K_M.gguf" in lacking.err, "resolved, and not fetched"
    doit("prepare", "model=org/many")
    site.log()
    assert doit("prepare", "model=org/many", "offline=1").steps == []
    doit.env["HF_HUB_OFFLINE"] = "1"
    with doit.serving("model=org/many", "ctx_size=512") as url:
        chat(url)
    assert doit("plan", "model=org/many", "format=json").json()["download_bytes"] == 0
    assert site.log() == []


def fill_cache(site: Site, repo: str, *names: str) -> None:
    """Download into the user's Hugging Face cache with the real client."""
    code = (
        f"from huggingface_hub import hf_hub_download as get; [get({repo!r}, n) for n in {names}]"
    )
    command = [sys.executable, "-c", code]
    subprocess.run(command, env=site.doit.env, check=True, capture_output=True)
    site.log()


def test_a_plan_offline_reads_the_hugging_face_cache(site: Site, parts: Parts) -> None:
    site.put("org/many", {"tiny-Q8_0.gguf": parts.q8_0})
    fill_cache(site, "org/many", "tiny-Q8_0.gguf")
    plan = site.doit("plan", "model=org/many", "offline=1", "format=json").json()
    assert plan["download_bytes"] == 0 and plan["file_bytes"] == parts.q8_0.stat().st_size
    assert site.log() == []


def test_offline_takes_what_the_hugging_face_cache_has(site: Site, parts: Parts) -> None:
    site.put("org/many", {"tiny-Q8_0.gguf": parts.q8_0, "tiny-Q4_K_M.gguf": parts.q4_k_m})
    site.put("org/tiny", tree(parts.folder))
    fill_cache(site, "org/many", "tiny-Q8_0.gguf", "tiny-Q4_K_M.gguf")
    fill_cache(site, "org/tiny", *tree(parts.folder))
    site.log()
    words = ("model=org/many", "quant=q8_0", "offline=1")
    assert site.doit("prepare", *words).steps == ["resolve", "fetch"]
    made = next((site.doit.home / "models").rglob("tiny-Q8_0.gguf"))
    blob = Path(site.doit.env["HF_HOME"]) / "hub" / "models--org--many" / "blobs" / sha256(made)
    assert made.samefile(blob), "a hard link"
    site.doit("prepare", "model=org/tiny", "quant=q8_0", "offline=1")
    assert site.log() == []
    lacking = site.doit("prepare", "model=org/many", "quant=q6_k", "offline=1", status=3)
    assert "tiny-Q8_0.gguf" in lacking.err
    # with the network, what is there is not downloaded either
    other = site.stranger("another")
    other.env["HF_HOME"] = site.doit.env["HF_HOME"]
    other("prepare", "model=org/many:Q8_0")
    assert sum(entry["sent"] for entry in site.log()) < 2e6


def test_a_commit_that_is_gone_is_resolved_anew(site: Site, parts: Parts) -> None:
    folder = site.put("org/one", {"tiny-Q8_0.gguf": parts.q8_0})
    site.doit("resolve", "model=org/one")
    (folder / "README.md").write_text("the history is squashed")
    gone = site.doit("prepare", "model=org/one", status=None)
    assert gone.status in (0, 1), gone.err
    assert site.doit("prepare", "model=org/one").steps in ([], ["resolve", "fetch"])


def test_one_request_in_two_spellings_is_pinned_once(site: Site, parts: Parts) -> None:
    site.put("org/one", {"tiny-Q8_0.gguf": parts.q8_0})
    site.doit("lock", "model=org/one:Q8_0")
    assert site.doit("prepare", "model=org/one", "quant=q8_0", "frozen=1").steps == []


# Refused


def no_token_in(site: Site, *runs: Run) -> None:
    for run in runs:
        assert TOKEN not in run.out + run.err
    for folder in (site.doit.home, Path(site.doit.env["LLAMA_PIPELINE_CWD"])):
        for path in folder.rglob("*"):
            if path.is_file() and not path.is_relative_to(site.doit.home / "bins"):
                assert TOKEN.encode() not in path.read_bytes(), path


def test_gated(site: Site, parts: Parts) -> None:
    files = {
        "tiny-Q8_0.gguf": parts.q8_0,
        "mmproj-tiny-F16.gguf": parts.mmproj["mmproj-tiny-F16.gguf"],
    }
    site.put("org/gated", files, gated="auto", token=TOKEN)
    without = site.doit("prepare", "model=org/gated", status=1)
    assert "accept terms" in without.err and "HF_TOKEN" in without.err
    site.doit.env["HF_TOKEN"] = "hf_secretWRONG"
    wrong = site.doit("prepare", "model=org/gated", status=1)
    assert f"{site.server.endpoint}/org/gated" in wrong.err and "hf_secret" not in wrong.err
    (site.root / ".hub.json").write_text(json.dumps({"tokens": [TOKEN]}))
    unknown = site.doit("prepare", "model=org/gated", status=1)
    assert "rejects the token in use" in unknown.err and "/settings/tokens" in unknown.err
    assert weights(site.doit) == []
    site.doit.env["HF_TOKEN"] = TOKEN
    site.log()
    plan = site.doit("plan", "model=org/gated")
    right = site.doit("prepare", "model=org/gated")
    entries = site.log()
    assert {entry["authorization"] for entry in entries if entry["server"] == "hub"} == {True}
    assert {entry["authorization"] for entry in entries if entry["server"] == "cdn"} == {False}
    locked = site.doit("lock", "model=org/gated")
    with site.doit.serving("model=org/gated", "ctx_size=512") as url:
        chat(url)
    assert weights(site.doit) == ["mmproj-tiny-F16.gguf", "tiny-Q8_0.gguf"]
    no_token_in(site, plan, right, locked)


def test_private(site: Site, parts: Parts) -> None:
    site.put("org/private", {"tiny-Q8_0.gguf": parts.q8_0}, private=True, token=TOKEN)
    without = site.doit("prepare", "model=org/private", status=1)
    assert "no such repository, or it is private" in without.err and "set HF_TOKEN" in without.err
    site.doit.env["HF_TOKEN"] = "hf_secretWRONG"
    wrong = site.doit("prepare", "model=org/private", status=1)
    assert "the token in use may not see it" in wrong.err and "hf_secret" not in wrong.err
    del site.doit.env["HF_TOKEN"]
    folder = Path(site.doit.env["LLAMA_PIPELINE_CWD"])  # where the user types: paths start there
    (folder / "own").mkdir()
    (folder / "own" / "token").write_text(TOKEN)
    site.doit.env["HF_HOME"] = "own"
    right = site.doit("prepare", "model=org/private")
    (folder / "own" / "token").unlink()
    assert weights(site.doit) == ["tiny-Q8_0.gguf"]
    assert not any(e["authorization"] for e in site.log() if e["server"] == "cdn")
    no_token_in(site, right)


def test_renamed(site: Site, parts: Parts) -> None:
    site.put("org/new-name", {"tiny-Q8_0.gguf": parts.q8_0})
    site.put("org/old-name", {}, renamed_to="org/new-name")
    done = site.doit("prepare", "model=org/old-name")
    assert "org/old-name is called org/new-name now" in done.err
    assert weights(site.doit) == ["tiny-Q8_0.gguf"]
    site.log()
    assert site.doit("prepare", "model=org/old-name").steps == [] and site.log() == []


@pytest.mark.parametrize(
    ("files", "status", "says"),
    [
        ({}, 1, ["org/odd: is empty at"]),
        ({"README.md": b"soon"}, 1, ["org/odd: is empty at"]),
        ({"pytorch_model.bin": b"p", "config.json": b"{}"}, 1, ["pickled", "pytorch_model.bin"]),
        (
            {"adapter_model.safetensors": b"x", "adapter_config.json": b"{}"},
            1,
            ["adapter (LoRA)", "this as lora="],
        ),
        ({"mmproj-F16.gguf": b"x"}, 1, ["only projectors (mmproj)"]),
        ({"model.onnx": b"x"}, 1, ["neither GGUF nor safetensors", "model.onnx"]),
        ({"tiny-Q8_0.gguf": b"no GGUF", "tiny-Q4_0.gguf": b"x"}, 1, ["not a usable GGUF"]),
    ],
    ids=["empty", "readme", "pickled", "adapter", "projector", "onnx", "broken"],
)
def test_repositories_that_cannot_be_used(
    site: Site, files: dict[str, bytes], status: int, says: list[str]
) -> None:
    site.put("org/odd", files)
    wrong = site.doit("serve", "model=org/odd", status=status)
    for text in says:
        assert text in wrong.err
    assert "Traceback" not in wrong.err and wrong.out == "" and weights(site.doit) == []


def test_what_is_not_there(site: Site, parts: Parts) -> None:
    missing = site.doit("serve", "model=org/nothing", status=1)
    assert "org/nothing: there is no such repository, or it is private" in missing.err
    site.put("org/one", {"tiny-Q8_0.gguf": parts.q8_0})
    revision = site.doit("serve", "model=org/one@v9", status=3)
    assert "org/one: has no revision 'v9'" in revision.err
    filename = site.doit("serve", "model=org/one", "filename=other.gguf", status=3)
    assert "filename=other.gguf" in filename.err and "tiny-Q8_0.gguf" in filename.err
    site.doit.env["HF_ENDPOINT"] = "http://127.0.0.1:9"
    away = site.doit("serve", "model=org/one", status=1)
    assert "org/one: the hub could not be reached" in away.err and "http://127.0.0.1:9" in away.err
    for run in (missing, revision, filename, away):
        assert "Traceback" not in run.err and run.out == ""
    assert weights(site.doit) == []


def test_an_architecture_that_nobody_knows_is_refused_before_the_download(
    site: Site, parts: Parts
) -> None:
    files: dict[str, Path | bytes] = dict(tree(parts.folder))
    config = json.loads((parts.folder / "config.json").read_text())
    files["config.json"] = json.dumps({**config, "architectures": ["LlamaForCausalLN"]}).encode()
    site.put("org/unheard", files)
    refused = site.doit("prepare", "model=org/unheard", status=3)
    assert "the architecture LlamaForCausalLN is not known" in refused.err
    assert "did you mean LlamaForCausalLM?" in refused.err
    assert weights(site.doit) == []


def test_a_gguf_that_this_llama_cpp_cannot_read_is_not_planned(site: Site, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "nobody")
    writer.add_tensor("token_embd.weight", np.zeros((32, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    site.put("org/newer", {"m-F32.gguf": tmp_path / "m.gguf"})
    refused = site.doit("plan", "model=org/newer", status=3)
    assert "m-F32.gguf: this llama.cpp cannot load it" in refused.err
    assert "its architecture is 'nobody'" in refused.err


def test_what_a_cache_held_is_no_answer_of_the_hubs(site: Site, parts: Parts) -> None:
    """Prepared offline from a cache with one quant: online the hub is asked what else there is."""
    site.put("org/more", {"tiny-Q8_0.gguf": parts.q8_0, "tiny-Q4_K_M.gguf": parts.q8_0})
    fill_cache(site, "org/more", "tiny-Q8_0.gguf")
    site.doit("prepare", "model=org/more", "offline=1")
    online = site.doit("plan", "model=org/more", "format=json").json()
    assert [file["name"] for file in online["files"]] == ["tiny-Q4_K_M.gguf"]


def test_a_mistyped_name_does_not_cost_a_build(bare: Doit, site: Site) -> None:
    """quant=auto is decided with the programs, and they are not built for what is not there."""
    bare.env |= {name: site.doit.env[name] for name in ("HF_ENDPOINT", "HF_HOME", "NO_PROXY")}
    refused = bare("prepare", "model=org/none", "quant=auto", status=1)
    assert "there is no such repository" in refused.err
    assert refused.steps == ["_check"] or refused.steps == []


LARGE = 96 * 1024 * 1024  # bytes: more than all connections have under way


def slow_large(site: Site) -> bytes:
    """A repository with one large file, of which each connection brings 8 MB a second."""
    head = b"GGUF" + struct.pack("<IQQQ", 3, 1, 0, 1) + b"t"  # one tensor, t, of 32 numbers
    head += struct.pack("<IQIQ", 1, 32, 0, 0)
    content = head + random.Random(5).randbytes(LARGE - len(head))
    site.put("org/large", {"large-Q8_0.gguf": content})
    site.server.control(faults=[{"kind": "slow", "at": "cdn", "bytes_per_second": 8_000_000}])
    return content


def test_a_killed_fetch_goes_on_from_what_is_there(site: Site) -> None:
    content = slow_large(site)
    site.doit("resolve", "model=org/large")
    site.log()

    def sent() -> int:
        return sum(line["sent"] for line in site.server.log() if line["server"] == "cdn")

    with site.doit.start("fetch", "model=org/large") as process:
        wait_for(lambda: sent() > LARGE // 2)
        process.kill()
        process.communicate()
    assert not list(site.doit.home.rglob("large-Q8_0.gguf"))
    site.doit("fetch", "model=org/large")
    [file] = site.doit.home.rglob("large-Q8_0.gguf")
    assert file.read_bytes() == content
    in_flight = 8 * 4 * 1024 * 1024  # connections, each with a piece
    # What a connection's buffers hold counts as sent, though nobody received it.
    assert sent() < LARGE + in_flight + 8 * 4 * 1024 * 1024
    assert sorted(path.suffix for path in file.parent.iterdir() if "part" in path.name) == []


def test_two_fetches_of_one_model_download_it_once(site: Site) -> None:
    content = slow_large(site)
    site.doit("resolve", "model=org/large")
    site.log()
    with site.doit.start("fetch", "model=org/large") as first:
        wait_for(lambda: any(line["server"] == "cdn" for line in site.server.log()))
        second = site.doit("fetch", "model=org/large")
        first.communicate()
    assert first.returncode == 0
    assert "another run is making large-Q8_0.gguf; waiting for it" in second.err
    assert sum(line["sent"] for line in site.log() if line["server"] == "cdn") == LARGE
    [file] = site.doit.home.rglob("large-Q8_0.gguf")
    assert file.read_bytes() == content


def test_cleaning_resolve_takes_the_headers_along(site: Site, parts: Parts) -> None:
    site.put("org/one", {"tiny-Q8_0.gguf": parts.q8_0})
    site.doit("resolve", "model=org/one")
    site.doit("plan", "model=org/one")
    headers = site.doit.home / "run" / "headers"
    assert [path.name for path in headers.rglob("*.gguf")] == ["tiny-Q8_0.gguf"]
    site.doit("clean", "resolve", "model=org/one")
    assert list(headers.rglob("*.gguf")) == []
    assert "asking the hub" in site.doit("resolve", "model=org/one").err
