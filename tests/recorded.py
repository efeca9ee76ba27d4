"""A home in which receipts say that models were fetched, converted and quantized: real GGUF
headers, real receipts, no programs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.core.paths import Home
from pipeline.core.pins import pins
from pipeline.core.store import receipts
from pipeline.core.store.receipts import Entry

COMMIT = "c" * 40
SOURCE = {"type": "hf", "ref": "org/model", "revision": COMMIT}
SLUG = "org__model__cccccccccccc"
LLAMA_CPP = {"commit": pins().llama_cpp_commit, "tree": pins().llama_cpp_tree}
TOOL = {"commit": pins().llama_cpp_commit, "build": f"sha256:{'b' * 64}"}


def gguf(path: Path, **texts: str) -> Path:
    """A GGUF without tensors, with these metadata."""
    import gguf as library

    path.parent.mkdir(parents=True, exist_ok=True)
    writer = library.GGUFWriter(path, "llama")
    for name, text in texts.items():
        writer.add_string(f"general.{name}", text)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def record(path: Path, recipe: Mapping[str, Any], **more: Any) -> Entry:
    """Give a file its receipt."""
    entry = receipts.stamp(path, recipe, seconds=1, **{"source": SOURCE, **more})
    receipts.change(path, entry)
    return entry


def quantized(home: Home) -> Path:
    """The GGUF of a repository that was converted and quantized by a calibration text."""
    folder = home.models / "gguf" / SLUG
    source = home.models / "source" / SLUG / "config.json"
    source.parent.mkdir(parents=True)
    source.write_text("{}")
    record(source, {"step": "fetch", "file": f"git:{'d' * 40}", **SOURCE})
    between = gguf(folder / "model.bf16.gguf", license="apache-2.0")
    conversion = {
        "step": "convert",
        "files": {"model.safetensors": f"sha256:{'e' * 64}", "config.json": f"git:{'d' * 40}"},
        "name": "model",
        "outtype": "BF16",
        "converter": {**LLAMA_CPP, "requirements": "f" * 64},
    }
    entry = record(between, conversion, keep=False, sandbox="Landlock 7, seccomp")
    matrix = folder / "imatrix-0123.gguf"
    matrix.write_text("a matrix")
    inputs = {"input": f"sha256:{entry.sha256}", "text": f"sha256:{'1' * 64}", "tool": TOOL}
    record(matrix, {"step": "imatrix", **inputs})
    file = gguf(folder / "model.q4_k_m.gguf", license="apache-2.0", name="größer")
    recipe = {
        "step": "quantize",
        "input": f"sha256:{entry.sha256}",
        "type": "Q4_K_M",
        "imatrix": f"sha256:{'1' * 64}",
        "tool": TOOL,
    }
    record(file, recipe)
    return file


def built(home: Home) -> None:
    """Receipts of llama.cpp's programs and of its source."""
    programs = home.bins / "linux-x64-cpu"
    programs.mkdir(parents=True)
    program = programs / "llama-quantize"
    program.touch()
    recipe = {"step": "build", "compiler": "12.2.0", "source": LLAMA_CPP}
    record(program, recipe, source=None, digest="b" * 64)
    tree = home.bins / ".source" / "llama.cpp"
    tree.mkdir(parents=True)
    archive = {"step": "source", **LLAMA_CPP, "archive": pins().llama_cpp_archive.sha256}
    record(tree, archive, source=None, digest="0" * 64)
