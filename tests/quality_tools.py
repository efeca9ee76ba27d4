"""What the tests of quality share: a model that was trained, and ways to spoil a quant of it."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import kept
import numpy as np
import pytest
from conftest import REPOSITORY, with_programs
from fakes import tiny_llama, trained_llama

from pipeline.bins.compile import source
from pipeline.core.paths import Home
from pipeline.core.pins import pins
from pipeline.models import converter as converters
from pipeline.models import gguf, texts


@pytest.fixture(scope="session")
def prose(built: Path) -> str:
    """The text that quality is measured on."""
    return texts.read(source.pinned(Home(REPOSITORY)).folder, "test")


@pytest.fixture(scope="session")
def trained(
    built: Path, converter: Path, prose: str, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A small Llama that was trained, as an F16 GGUF; in `hf` beside it as safetensors. For reading
    only."""

    def make(folder: Path) -> None:
        trained_llama.make(folder / "hf", converter, prose)
        doit = with_programs(built, tmp_path_factory.mktemp("trained") / "home")
        doit("prepare", f"model={folder / 'hf'}", "quant=f16")
        (made,) = (doit.home / "models").rglob("model.f16.gguf")
        shutil.copyfile(made, folder / "model.f16.gguf")

    key = [pins().torch, converters.requirements_sha256(), prose[:1000], str(len(prose))]
    key += kept.code_of(trained_llama, tiny_llama)
    return kept.trained("llama", key, make) / "model.f16.gguf"


@pytest.fixture(scope="session")
def short_minilm(built: Path, converter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first layer of all-MiniLM-L6-v2 as an F32 GGUF, which still embeds. For reading only."""

    def make(folder: Path) -> None:
        doit = with_programs(built, tmp_path_factory.mktemp("minilm") / "home")
        doit("prepare", "model=demo-embed", "quant=f32")
        (made,) = (doit.home / "models").rglob("model.f32.gguf")
        shorten(made, folder / "model.f32.gguf")

    key = [pins().torch, converters.requirements_sha256(), pins().llama_cpp_commit]
    return kept.trained("minilm", key, make) / "model.f32.gguf"


def shorten(model: Path, target: Path) -> None:
    """The first layer of a bert as a model of its own."""
    rewrite(model, target, {"bert.block_count": 1}, lambda name: not re.match(r"blk\.[1-9]", name))


def rewrite(
    model: Path, target: Path, own: Mapping[str, object], keeps: Callable[[str], bool]
) -> None:
    """A copy of a GGUF with some values of its own, None for none, and the tensors that `keeps`
    says."""
    from gguf import GGUFReader, GGUFWriter

    reader = GGUFReader(model)
    writer = GGUFWriter(target, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        value = own.get(field.name, field.contents())
        written = field.name.startswith("GGUF.") or field.name == "general.architecture"
        if written or value is None:
            continue
        inner = field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(field.name, value, field.types[0], inner)
    for tensor in reader.tensors:
        if keeps(tensor.name):
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


Quantize = Callable[[Path, str, str], Path]


@pytest.fixture
def quantize(built: Path, tmp_path: Path) -> Quantize:
    """A function that quantizes a GGUF to a type, into a file of this name."""
    program = next(built.glob("*-cpu/llama-quantize*"))

    def make(model: Path, quant: str, name: str) -> Path:
        made = tmp_path / f"{name}.gguf"
        words = [program, model, made, quant, "2"]
        subprocess.run(words, check=True, capture_output=True, timeout=300)
        assert gguf.read(made).quant == quant
        return made

    return make


def tensors(model: Path) -> dict[str, np.ndarray]:
    """The tensors of an F16 GGUF, in the file itself: what is written into them changes it."""
    from gguf import GGUFReader

    return {each.name: each.data for each in GGUFReader(model, "r+").tensors}


def varied(model: Path, target: Path, seed: int) -> Path:
    """A model of its own: the same with some noise on each weight, before it is quantized."""
    shutil.copyfile(model, target)
    rng = np.random.default_rng(seed)
    for values in tensors(target).values():
        if values.dtype == np.float16:
            noise = rng.standard_normal(values.shape, dtype=np.float32)
            values += (0.02 * values.astype(np.float32).std() * noise).astype(np.float16)
    return target


def spoiled(model: Path, target: Path, way: str, seed: int) -> Path:
    """A copy of an F16 GGUF with one thing wrong in it."""
    shutil.copyfile(model, target)
    rng = np.random.default_rng(seed)
    own = tensors(target)
    layers = sorted({name.split(".")[1] for name in own if name.startswith("blk.")})
    layer, other = rng.permutation(layers)[:2]
    part = str(rng.choice(["ffn_up", "ffn_down", "ffn_gate"]))
    values = own[f"blk.{layer}.{part}.weight"]
    if way == "noise":  # where it matters: one layer of this model can do with much
        values = own[str(rng.choice(["token_embd", "output"])) + ".weight"]
        noise = rng.standard_normal(values.shape, dtype=np.float32)
        values += (0.5 * values.astype(np.float32).std() * noise).astype(np.float16)
    elif way == "scale":
        values *= np.float16(1.5)
    elif way == "swap":
        twin = own[f"blk.{other}.{part}.weight"]
        values[:], twin[:] = twin.copy(), values.copy()
    else:
        raise ValueError(way)
    return target
