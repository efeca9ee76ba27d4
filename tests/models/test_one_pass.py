"""Quantized while it is converted: the same bytes as in two steps, and what both leave behind."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Callable, Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

import gguf as gguf_py
import numpy as np
import pytest
from conftest import Doit
from fakes import large_llama
from msgspec.structs import replace

from pipeline.bins.binaries import QUANTIZER, Binaries
from pipeline.core.paths import Home
from pipeline.core.pins import pins
from pipeline.models import (
    contents,
    gguf,
    one_pass,
    quants,
    run_quantizer,
    skeleton,
    tensor_errors,
)
from pipeline.models.convert import Conversion
from pipeline.models.gguf_format import padded
from pipeline.models.quantize import Quantization
from pipeline.models.resolve import Resolved

Types = gguf_py.GGMLQuantizationType
SEED = 7
BYTES = {"f16": Types.F16, "bf16": Types.BF16, "f32": Types.F32}


def tensors(experts: int = 0, *, tied: bool = False, odd: bool = False) -> dict[str, Any]:
    """Weights of a tiny Llama, in single precision; `odd`: with rows that no K-quant takes."""
    random = np.random.default_rng(SEED)
    wide, deep, words = 256, 480 if odd else 512, 96

    def matrix(*shape: int) -> Any:
        return random.standard_normal(shape, dtype=np.float32)

    made = {"token_embd.weight": matrix(words, wide), "output_norm.weight": matrix(wide)}
    if not tied:
        made["output.weight"] = matrix(words, wide)
    for layer in range(2):
        start = f"blk.{layer}."
        made |= {f"{start}{name}_norm.weight": matrix(wide) for name in ("attn", "ffn")}
        made |= {f"{start}attn_{name}.weight": matrix(wide, wide) for name in ("q", "output")}
        made |= {f"{start}attn_{name}.weight": matrix(128, wide) for name in ("k", "v")}
        more, tail = ((experts,), "_exps") if experts else ((), "")
        if experts:
            made[f"{start}ffn_gate_inp.weight"] = matrix(experts, wide)
        for name, shape in (("gate", (deep, wide)), ("up", (deep, wide)), ("down", (wide, deep))):
            made[f"{start}ffn_{name}{tail}.weight"] = matrix(*more, *shape)
    return made


def writer(path: Path, arrays: Mapping[str, Any], precision: str, experts: int = 0) -> Any:
    """The converter's own writer, about to write the header."""
    made = gguf_py.GGUFWriter(path, "llama")
    made.add_context_length(64)
    made.add_embedding_length(256)
    made.add_block_count(2)
    made.add_feed_forward_length(512)
    made.add_head_count(4)
    made.add_head_count_kv(2)
    made.add_layer_norm_rms_eps(1e-5)
    made.add_file_type(1)
    if experts:
        made.add_expert_count(experts)
        made.add_expert_used_count(2)
    made.add_tokenizer_model("llama")
    made.add_token_list([f"word{number}" for number in range(96)])
    for name, array in arrays.items():
        kind = Types.F32 if array.ndim == 1 else BYTES[precision]
        data = array if kind == Types.F32 else gguf_py.quantize(array, kind)
        made.add_tensor(name, data, raw_dtype=kind)
    made.write_header_to_file()
    made.write_kv_data_to_file()
    return made


def matrix_file(path: Path, arrays: Mapping[str, Any]) -> Path:
    """As llama-imatrix writes it: sums of squares, and how many there are for each expert."""
    random = np.random.default_rng(SEED)
    made = gguf_py.GGUFWriter(path, "")
    made.add_type("imatrix")
    made.add_array("imatrix.datasets", ["a text"])
    made.add_uint32("imatrix.chunk_count", 3)
    made.add_uint32("imatrix.chunk_size", 512)
    for name, array in arrays.items():
        if array.ndim > 1 and name != "token_embd.weight":
            experts = array.shape[0] if array.ndim == 3 else 1
            sums = random.random((experts, array.shape[-1]), dtype=np.float32) * 9
            counts = np.arange(experts, dtype=np.float32).reshape(-1, 1) + (experts == 1) * 5
            made.add_tensor(f"{name}.in_sum2", sums)
            made.add_tensor(f"{name}.counts", counts)
    made.write_header_to_file()
    made.write_kv_data_to_file()
    made.write_tensors_to_file()
    made.close()
    return path


class Both:
    """A model that is quantized in both ways, in a folder."""

    def __init__(self, folder: Path, program: Path, **kind: Any) -> None:
        self.folder, self.program = folder, program
        precision = kind.pop("precision", "bf16")
        self.arrays = tensors(**kind)
        self.write = lambda path: writer(path, self.arrays, precision, kind.get("experts", 0))
        self.input = folder / "model.gguf"
        self.types: dict[str, str] | None = None  # of a mix
        made = self.write(self.input)
        made.write_tensors_to_file()
        made.close()

    @property
    def library(self) -> Path:
        return next(self.program.parent.glob("libggml-quantizer.so"))

    def two_steps(self, quant: str, matrix: Path | None = None) -> str:
        out = self.folder / "two.gguf"
        options = ["--imatrix", f"./{matrix.name}"] if matrix else []
        if self.types:
            (self.folder / "types.txt").write_text(tensor_errors.type_list(self.types))
            options += ["--tensor-type-file", "types.txt"]
        subprocess.run(
            [self.program, *options, self.input, out, quant],
            cwd=self.folder,
            check=True,
            capture_output=True,
            timeout=300,
        )
        return digest(out)

    def one_pass(self, quant: str, matrix: Path | None = None, threads: int = 2) -> str:
        header, out = self.folder / run_quantizer.HEADER, self.folder / "one.gguf"
        made = self.write(header)
        made.write_ti_data_to_file()
        made.write_padding(made.fout[0], made.fout[0].tell())
        made.flush()
        head = header.read_bytes()
        assert skeleton.extend_by_hole(
            header, padded(gguf.parse(local(header), is_whole=False).size)
        )
        made_from = replace(quantization(self.folder, quant, matrix), types=self.types)
        plan = one_pass.planned(made_from, self.program, header)
        plan |= {"library": str(self.library), "out": str(out), "threads": threads}
        out.write_bytes(b"")
        try:
            result = run_quantizer.quantize_all(made.tensors[0], head, header, plan)
        finally:
            made.close()
        assert result == {"sha256": digest(self.input), "size": self.input.stat().st_size}
        return digest(out)


def local(path: Path) -> Any:
    return contents.local(path, path.name)


def tensors_of(path: Path) -> Any:
    return gguf_py.GGUFReader(path).tensors


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def quantization(folder: Path, quant: str, matrix: Path | None) -> Quantization:
    resolved = Resolved(
        kind="safetensors",
        name="m",
        slug="m",
        folder=folder,
        local=True,
        source={},
        files=(),
        precision="BF16",
    )
    return Quantization(
        resolved=resolved,
        target=folder / "one.gguf",
        input=folder / "model.gguf",
        conversion=None,
        quant=quant,
        imatrix=matrix,
    )


SOME = ("Q4_K_M", "Q2_K", "Q6_K", "Q5_1", "MXFP4_MOE")
EVERY = tuple(name for name in quants.TYPES if name not in quants.DIRECT)


@pytest.fixture
def both(program: Callable[[str], Path], tmp_path: Path) -> Callable[..., Both]:
    return lambda **kind: Both(tmp_path, program("llama-quantize"), **kind)


@pytest.mark.build
@pytest.mark.parametrize("precision", ["f16", "bf16", "f32"])
def test_each_precision_gives_the_bytes_of_two_steps(
    both: Callable[..., Both], precision: str
) -> None:
    model = both(precision=precision)
    for quant in ("Q4_K_M", "Q3_K_S"):
        assert model.one_pass(quant) == model.two_steps(quant), quant


@pytest.mark.build
@pytest.mark.parametrize("kind", [{}, {"experts": 4}], ids=["dense", "experts"])
@pytest.mark.parametrize("weighed", [False, True], ids=["plain", "imatrix"])
@pytest.mark.parametrize("types", [SOME, pytest.param(EVERY, marks=pytest.mark.long)])
def test_each_type_gives_the_bytes_of_two_steps(
    both: Callable[..., Both], kind: dict[str, Any], weighed: bool, types: tuple[str, ...]
) -> None:
    model = both(**kind)
    matrix = matrix_file(model.folder / "a matrix.gguf", model.arrays) if weighed else None
    for quant in types:
        if weighed or quant not in quants.NEED_IMATRIX:
            assert model.one_pass(quant, matrix) == model.two_steps(quant, matrix), quant


@pytest.mark.build
def test_a_mix_that_a_lock_file_pins_gives_the_bytes_of_two_steps(
    both: Callable[..., Both],
) -> None:
    model = both()
    matrix = matrix_file(model.folder / "a matrix.gguf", model.arrays)
    kinds = cycle(("q4_k", "q2_k", "q6_k", "q4_k", "q8_0", "bf16", "q5_0"))
    names = (name for name, array in model.arrays.items() if array.ndim > 1)
    model.types = dict(zip(names, kinds, strict=False))
    model.types["token_embd.weight"] = "q5_k"
    assert model.one_pass("4.8BPW", matrix) == model.two_steps("Q4_K_M", matrix)
    types = {t.name: t.tensor_type.name.lower() for t in tensors_of(model.folder / "one.gguf")}
    assert types | model.types == types


@pytest.mark.build
@pytest.mark.parametrize("kind", [{"tied": True}, {"odd": True}], ids=["tied", "odd"])
def test_other_shapes_give_the_bytes_of_two_steps(
    both: Callable[..., Both], kind: dict[str, Any]
) -> None:
    model = both(**kind)
    for quant in ("Q4_K_M", "IQ4_XS", "Q5_0", "MXFP4_MOE"):
        assert model.one_pass(quant) == model.two_steps(quant), quant


@pytest.mark.build
def test_the_number_of_threads_does_not_matter(
    both: Callable[..., Both], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = both(experts=3)
    monkeypatch.setattr(run_quantizer, "PIECE", 1000)  # some rows at a time
    assert len({model.one_pass("Q4_K_M", threads=count) for count in (1, 3, 8)}) == 1
    assert model.one_pass("Q4_K_M") == model.two_steps("Q4_K_M")


@pytest.mark.build
def test_blocks_of_all_kinds_give_the_bytes_of_two_steps(both: Callable[..., Both]) -> None:
    """Side by side are blocks of zeros, of one value, without a sign, and of sizes that nearly
    leave the range of a float."""
    model = both(precision="f32")
    random = np.random.default_rng(SEED)
    for name, array in model.arrays.items():
        if array.ndim == 2 and "norm" not in name:
            blocks = array.reshape(-1, 16)
            blocks[::7] = 0
            blocks[1::7] = blocks[1::7, :1]
            blocks[2::7] = abs(blocks[2::7])
            blocks[3::7] = -abs(blocks[3::7])
            blocks[4::7] *= 10.0 ** random.integers(-30, 4, (len(blocks[4::7]), 1))
            blocks[5::7, 1:] = 0
            blocks[6::7] = np.round(blocks[6::7])
    made = model.write(model.input)
    made.write_tensors_to_file()
    made.close()
    for matrix in (None, matrix_file(model.folder / "matrix.gguf", model.arrays)):
        for quant in ("Q4_K_M", "Q5_K_M"):  # with some Q6_K
            assert model.one_pass(quant, matrix) == model.two_steps(quant, matrix), quant


@pytest.mark.build
def test_no_more_waits_than_is_allowed(
    both: Callable[..., Both], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is converted ahead is bounded, whatever the size of the model."""
    model, most = both(precision="f32"), 0
    monkeypatch.setattr(run_quantizer, "AHEAD", 600_000)  # the largest tensor has 524,288 bytes
    settle = run_quantizer.Quantizer.settle

    def count(self: Any, limit: int) -> None:
        nonlocal most
        most = max(most, sum(size for size, _ in self.waiting))
        settle(self, limit)
        assert sum(size for size, _ in self.waiting) <= max(limit, 0)

    monkeypatch.setattr(run_quantizer.Quantizer, "settle", count)
    model.one_pass("Q4_K_M")
    assert 524_288 <= most <= 600_000 + 524_288


@pytest.mark.build
def test_values_that_are_no_numbers_end_it(both: Callable[..., Both]) -> None:
    model = both()
    model.arrays["blk.1.ffn_up.weight"][3, 5] = np.nan
    with pytest.raises(ValueError, match=r"'blk\.1\.ffn_up\.weight' has values that are no finite"):
        model.one_pass("Q4_K_M")


@pytest.mark.build
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no disk that is always full")
def test_a_full_disk_ends_it(both: Callable[..., Both]) -> None:
    model = both()
    (model.folder / "one.gguf").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        model.one_pass("Q4_K_M")


@pytest.mark.build
def test_a_matrix_without_the_figures_that_a_type_needs_is_left_to_llama_quantize(
    both: Callable[..., Both], capsys: pytest.CaptureFixture[str]
) -> None:
    model = both()
    arrays = {name: each for name, each in model.arrays.items() if "ffn_up" not in name}
    matrix = matrix_file(model.folder / "m.gguf", arrays)
    with pytest.raises(SystemExit) as end:
        model.one_pass("IQ3_XXS", matrix)
    assert end.value.code == run_quantizer.DECLINED
    assert "has no figures that fit blk.0.ffn_up.weight" in capsys.readouterr().out
    assert model.one_pass("Q4_K_M", matrix) == model.two_steps("Q4_K_M", matrix)


# Which it is


@pytest.fixture
def due(tmp_path: Path) -> Quantization:
    """Of safetensors, with nothing made yet."""
    made = quantization(tmp_path, "Q4_K_M", None)
    between = Conversion(
        resolved=made.resolved,
        target=tmp_path / "model.bf16.gguf",
        outtype="BF16",
        script=Path("/src/convert_hf_to_gguf.py"),
        llama_cpp={},
        keep=False,
    )
    return replace(made, conversion=between)


def test_one_pass_unless_there_is_a_reason(due: Quantization, tmp_path: Path) -> None:
    assert one_pass.obstacle(due, has_library=True) == ""
    assert "no libggml-quantizer" in one_pass.obstacle(due, has_library=False)
    kept = replace(due, conversion=replace(due.conversion, keep=True))
    assert "keep_f16=1" in one_pass.obstacle(kept, has_library=True)
    for content, why in ((b"A text.\n", "is a text"), (b"\x01\0\0\0", "older"), (b"GGUF", "")):
        matrix = tmp_path / "matrix"
        matrix.write_bytes(content + b"\0" * (content != b"A text.\n"))
        found = one_pass.obstacle(replace(due, imatrix=matrix), has_library=True)
        assert why in found and bool(why) == bool(found)
    mixed = replace(due, quant="4.8BPW")
    assert "a mix is chosen" in one_pass.obstacle(mixed, has_library=True)
    pinned = replace(mixed, types={"x": "q4_k"})
    assert "the importance matrix of a mix" in one_pass.obstacle(pinned, has_library=True)
    assert one_pass.obstacle(replace(pinned, imatrix=matrix), has_library=True) == ""
    due.conversion.target.touch()
    assert "is there" in one_pass.obstacle(due, has_library=True)


def test_only_programs_of_the_pinned_llama_cpp_bring_the_library(tmp_path: Path) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    pinned = pins().llama_cpp_commit
    ours = Binaries(folder=folder, commit=pinned, home=Home(tmp_path))
    assert ours.quantizer is None
    library = folder / "libggml-base.so.0"
    library.touch()
    assert ours.quantizer == library, "of programs that share one"
    (folder / QUANTIZER).touch()
    assert ours.quantizer == folder / QUANTIZER
    assert replace(ours, commit="another").quantizer is None
    installed = replace(ours, commit="")
    assert installed.quantizer is None
    (tmp_path / "manifest.json").write_text(json.dumps({"commit": pinned}))
    assert installed.quantizer == folder / QUANTIZER, "an installed package"


# With the real converter


def entries(home: Path) -> dict[str, dict[str, Any]]:
    (file,) = (home / "models" / "gguf").glob("*/.state.json")
    varying = ("made_at", "seconds", "mtime_ns", "keep")
    artifacts = json.loads(file.read_text())["artifacts"]
    return {
        name: {key: value for key, value in entry.items() if key not in varying}
        for name, entry in artifacts.items()
    }


@pytest.mark.build
@pytest.mark.slow
def test_a_model_is_made_in_one_pass_and_is_current_for_both(doit: Doit, tiny: Path) -> None:
    words = (f"model={tiny}", "quant=q4_k_m")
    planned = doit("plan", *words, "format=json").json()
    steps = {step["name"]: step["what"] for step in planned["steps"]}
    assert steps["convert"] == "in one pass with quantize"
    run = doit("prepare", *words)
    assert "converting and quantizing tiny" in run.err and "llama-quantize" not in run.err
    (folder,) = (doit.home / "models" / "gguf").iterdir()
    shown = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
    assert shown == ["model.q4_k_m.gguf"]
    assert doit("prepare", *words).steps == []
    one = entries(doit.home)
    forced = doit("prepare", *words, "keep_f16=1", "force=1")
    assert "is converted first and then quantized: keep_f16=1" in forced.err
    assert entries(doit.home) == one, "the receipts and hashes of two steps"


ARCHITECTURES = ("tiny", "experts", "demo-embed")


@pytest.mark.build
@pytest.mark.long
@pytest.mark.parametrize("model", ARCHITECTURES)
def test_each_architecture_gives_the_bytes_of_two_steps(
    doit: Doit, tiny: Path, tmp_path: Path, model: str
) -> None:
    named = {"tiny": str(tiny), "experts": str(tmp_path / "experts")}.get(model, model)
    if model == "experts":
        size = large_llama.Size(
            layers=2, hidden=256, feed_forward=512, heads=4, kv_heads=2, experts=4, vocabulary=512
        )
        large_llama.make(tmp_path / "experts", size)
        large_llama.fill(tmp_path / "experts")
    for quant in ("q4_k_m", "q3_k_m"):
        words = (f"model={named}", f"quant={quant}")
        assert "converting and quantizing" in doit("prepare", *words).err
    one = entries(doit.home)
    for quant in ("q4_k_m", "q3_k_m"):
        doit("prepare", f"model={named}", f"quant={quant}", "keep_f16=1", "force=1")
    assert entries(doit.home) == one
