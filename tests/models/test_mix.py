"""Mixes: how a size is written, what a tensor loses in a type, and how large a mix may become."""

from __future__ import annotations

import re
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf as format
import numpy as np
import pytest
from twins import Twin

from pipeline.core.errors import PipelineError, UsageError
from pipeline.core.paths import Home
from pipeline.core.store import artifacts, json_file
from pipeline.models import lockfile, mix, mix_choice, quantize, quants, resolve, tensor_errors
from pipeline.models.mix import MixTensor, Weights
from pipeline.models.quantize import Quantization
from pipeline.models.quants import Budget, QuantRequest
from pipeline.models.resolve import Resolved

TOOL = {"commit": "c", "build": "b"}


@pytest.mark.parametrize(
    ("typed", "means"),
    [
        ("4.8bpw", Budget("4.8bpw", bits=4.8)),
        (" 4.80BPW ", Budget("4.8bpw", bits=4.8)),
        ("5bpw", Budget("5bpw", bits=5.0)),
        ("3GiB", Budget("3GiB", bytes=3 << 30)),
        ("1.5gib", Budget("1.5GiB", bytes=3 << 29)),
        ("500MiB", Budget("500MiB", bytes=500 << 20)),
    ],
)
def test_a_size_is_written_like_this(typed: str, means: Budget) -> None:
    assert quants.budget(quants.parse(typed)) == means
    assert quants.is_mix(quants.parse(typed))


@pytest.mark.parametrize(
    ("typed", "near"),
    [
        ("4,8bpw", "4.8bpw"),
        ("4.8 bits", "4.8bpw"),
        ("4.8bits", "4.8bpw"),
        ("4.8", "4.8bpw"),
        ("4.8 bpw", "4.8bpw"),
        ("3GB", "3GiB"),
        ("3 GiB", "3GiB"),
        ("3g", "3GiB"),
        ("500mb", "500MiB"),
    ],
)
def test_another_spelling_is_refused_with_the_right_one(typed: str, near: str) -> None:
    with pytest.raises(ValueError, match=rf"a size such as 4\.8bpw.*; did you mean {near}\?$"):
        quants.parse(typed)


@pytest.mark.parametrize("typed", ["4.8.1bpw", "8kib", "1e3bpw", "-4bpw", "bpw", "4.8bpw5"])
def test_what_is_no_size(typed: str) -> None:
    with pytest.raises(ValueError, match=r"4\.8bpw"):
        quants.parse(typed)


def test_other_quants_are_no_mixes() -> None:
    for quant in (*quants.TYPES, "UD-Q4_K_XL", quants.AUTO, quants.ALL, ""):
        assert not quants.is_mix(quant)
    assert quants.parse("fit") == quants.FIT


# How large a mix may become

GROUPED = MixTensor(name="blk.0.ffn_up.weight", shape=[512, 1024], kind="bf16")
NARROW = MixTensor(name="token_embd.weight", shape=[96, 1000], kind="f32")
ODD = MixTensor(name="blk.0.x.weight", shape=[384, 4], kind="f16")


def test_the_types_that_the_rows_allow() -> None:
    assert GROUPED.candidates(is_weighed=True) == [*mix.CANDIDATES, "bf16"]
    assert not set(GROUPED.candidates(is_weighed=False)) & set(mix.NEED_MATRIX)
    narrow = ["iq4_nl", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "f16"]
    assert NARROW.candidates(is_weighed=True) == ODD.candidates(is_weighed=True) == narrow


WEIGHTS = Weights(tensors=[GROUPED, NARROW], other_bytes=4000, other_elements=1000, start=640)


def test_bits_are_those_of_all_tensors_and_bytes_those_of_the_file() -> None:
    elements = 512 * 1024 + 96 * 1000 + 1000
    assert WEIGHTS.room(Budget("5bpw", bits=5.0)) == elements * 5 // 8 - 4000
    assert WEIGHTS.bits(WEIGHTS.room(Budget("5bpw", bits=5.0))) == pytest.approx(5, abs=1e-4)
    room = WEIGHTS.room(Budget("1MiB", bytes=1 << 20))
    assert WEIGHTS.file_bytes(room) == 1 << 20


@pytest.mark.parametrize("size", ["1bpw", "17bpw", "0.1MiB"])
def test_a_size_out_of_reach_is_refused_with_what_is_within_it(size: str) -> None:
    budget = quants.budget(quants.parse(size))
    assert budget
    with pytest.raises(UsageError) as error:
        mix.require_possible(budget, WEIGHTS, lambda name: True)
    named = re.fullmatch(
        rf"quant={size}: a mix of this model has from ([\d.]+)bpw \(.*\) to ([\d.]+)bpw \(.*\)",
        error.value.message,
    )
    assert named
    for bits in named.groups():  # what is named can be had
        mix.require_possible(Budget("", bits=float(bits)), WEIGHTS, lambda name: True)


def test_a_file_has_no_more_than_the_largest_mix() -> None:
    most = sum(tensor.elements * 2 for tensor in WEIGHTS.tensors)
    assert mix.require_possible(Budget("", bytes=1 << 40), WEIGHTS, lambda name: True) == most


# What is measured


def test_a_list_of_types_matches_each_tensor_alone() -> None:
    """As llama-quantize reads it: the pattern in lower case, the name as it is."""
    names = ["blk.1.attn_q.weight", "blk.11.attn_q.weight", "blk.1.attn_qkv.weight", "v.A-b.weight"]
    lines = tensor_errors.type_list(dict.fromkeys(names, "q4_k")).split()
    for line, own in zip(lines, names, strict=True):
        pattern, _, kind = line.rpartition("=")
        assert kind == "q4_k"
        assert [name for name in names if re.search(pattern.lower(), name)] == [own]


def test_an_error_is_weighed_column_by_column_for_each_expert() -> None:
    rng = np.random.default_rng(5)
    exact, made = rng.standard_normal((2, 3, 7, 8), dtype=np.float32)
    weights = rng.random((3, 8), dtype=np.float32)
    wrong = (weights[:, None] * (exact - made) ** 2).sum() / (weights[:, None] * exact**2).sum()
    flat = [memoryview(each.tobytes()).cast("f") for each in (exact, made)]
    found = tensor_errors.error(*flat, weights.ravel().tolist(), row=8, depth=3)
    assert found == pytest.approx(float(wrong), rel=1e-5)
    plain = ((exact - made) ** 2).sum() / (exact**2).sum()
    assert tensor_errors.error(*flat, (), row=8, depth=3) == pytest.approx(float(plain), rel=1e-5)


def test_a_matrix_in_either_format(tmp_path: Path) -> None:
    writer = format.GGUFWriter(tmp_path / "m.gguf", "imatrix")
    writer.add_tensor("blk.0.a.weight.in_sum2", np.arange(8, dtype=np.float32))
    writer.add_tensor("blk.0.a.weight.counts", np.array([2], dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert tensor_errors.weights(tmp_path / "m.gguf") == {"blk.0.a.weight": [*map(float, range(8))]}
    name = b"blk.0.a.weight"
    entry = struct.pack(f"<i{len(name)}sii8f", len(name), name, 5, 8, *range(8))
    (tmp_path / "m.dat").write_bytes(struct.pack("<i", 1) + entry + struct.pack("<i", 5))
    assert tensor_errors.weights(tmp_path / "m.dat") == {"blk.0.a.weight": (*map(float, range(8)),)}
    (tmp_path / "cut.dat").write_bytes(struct.pack("<i", 2) + entry)
    with pytest.raises(PipelineError, match=r"cut\.dat: cannot be read"):
        tensor_errors.weights(tmp_path / "cut.dat")


def test_a_matrix_of_the_users_own_says_which_types_there_are(tmp_path: Path) -> None:
    """Those of others seldom know the last tensor, which ours do."""
    matrix = tmp_path / "matrix.dat"
    name = b"blk.0.ffn_up.weight"
    start = struct.pack("<ii", 1, len(name)) + name
    matrix.write_bytes(start + struct.pack("<iif", 1, 1, 2.0))
    weighed = quantize.weighed(matrix, tmp_path / "model.gguf")
    assert weighed(name.decode()) and not weighed(mix.OUTPUT)


def test_the_layers_are_divided_as_finely_as_wanted() -> None:
    names = [f"blk.{layer}.{kind}.weight" for layer in range(10) for kind in ("q", "v")]
    tensors = [
        MixTensor(name=name, shape=[256, 2], kind="f16") for name in (*names, "output.weight")
    ]

    def sizes(parts: int) -> list[int]:
        return sorted(map(len, mix_choice.groups(tensors, parts).values()))

    assert sizes(1) == [1, 10, 10]
    assert sizes(2) == [1, 5, 5, 5, 5]
    assert sizes(1 << 30) == [1] * 21


# Steps and receipts


def quantization(home: Home, quant: str, **more: Any) -> Quantization:
    file = home.root / "m.gguf"
    file.touch()
    resolved = Resolved(
        kind="gguf",
        name="m",
        slug="m",
        folder=home.root,
        local=True,
        source={"type": "file"},
        files=(),
        precision="F16",
    )
    return Quantization(
        resolved=resolved,
        target=home.models / f"model.{quant.lower()}.gguf",
        input=file,
        conversion=None,
        quant=quant,
        imatrix=None,
        **more,
    )


def test_the_recipe_of_a_mix_names_its_types(tmp_path: Path) -> None:
    home = Home(tmp_path)
    made = quantization(home, "4.8BPW")
    assert made.chosen(home, TOOL, "sha256:i") is None
    before = made.recipe(home, TOOL, "sha256:i")
    types = {"blk.0.a.weight": "q4_k"}

    def write(to: Path) -> None:
        json_file.write(to, {"types": types})

    artifacts.make(made.mix, made.mix_recipe(home, TOOL, "sha256:i"), write)
    assert made.chosen(home, TOOL, "sha256:i") == types
    after = made.recipe(home, TOOL, "sha256:i")
    assert before["mix"] != after["mix"]
    assert made.chosen(home, TOOL, "sha256:other") is None
    pinned = quantization(home, "4.8BPW", types=types)
    assert pinned.recipe(home, TOOL, "sha256:i") == after
    other = quantization(home, "4.8BPW", types={"blk.0.a.weight": "q5_k"})
    assert other.recipe(home, TOOL, "sha256:i")["mix"] != after["mix"]
    assert "mix" not in quantization(home, "Q4_K_M").recipe(home, TOOL, "sha256:i")


@pytest.mark.parametrize("types", ["q4_k", ["q4_k"], {"a": "q9"}, {"a": 4}, {"a": {"b": "q4_k"}}])
def test_a_lock_file_pins_types_that_there_are(types: Any) -> None:
    entry = {"quantization": {"type": "4.8BPW", "types": types}}
    with pytest.raises(UsageError, match=r"quantization\.types"):
        lockfile.types(entry)
    assert lockfile.types({"quantization": {"types": {"a": "q4_k"}}}) == {"a": "q4_k"}
    assert lockfile.types({}) is None


def test_what_fit_means_is_kept_beside_what_auto_means(tmp_path: Path) -> None:
    home = Home(tmp_path)
    resolved = quantization(home, "4.8BPW").resolved
    fit, auto = (
        resolve.decision_path(resolved, QuantRequest(quant=quant), None, home)
        for quant in (quants.FIT, quants.AUTO)
    )
    assert fit != auto
    resolve.write(fit, {"quant": "5.25BPW"})
    assert resolve.decided(fit) == "5.25BPW"


# With llama.cpp's programs

SOME = ("q4_k", "iq2_xs", "q8_0")


@pytest.mark.build
def test_a_sample_loses_what_the_whole_model_loses(
    program: Callable[[str], Path],
    tiny: Path,
    twin: Callable[[Path, str], Twin],
    tmp_path: Path,
) -> None:
    """Against what llama-quantize makes of the real file, made numbers by gguf's own code. The
    sample has all rows of small tensors, and of others as many as tell the same."""
    real, quantizer = twin(tiny, "F16").real, program("llama-quantize")
    reader = format.GGUFReader(real)
    tensors = {t.name: t for t in mix.look(quantizer, real).tensors}
    assert set(tensors) == {t.name for t in reader.tensors if len(t.shape) == 2}
    rng = np.random.default_rng(3)
    matrix, weights = tmp_path / "matrix.dat", dict[str, list[float]]()
    data = struct.pack("<i", len(tensors))
    for name, tensor in tensors.items():
        weights[name] = rng.random(tensor.shape[0]).astype("f4").tolist()
        row = tensor.shape[0]
        data += struct.pack(f"<i{len(name)}sii", len(name), name.encode(), 1, row)
        data += struct.pack(f"<{row}f", *weights[name])
    matrix.write_bytes(data + struct.pack("<i", 1))
    tensor_errors.write_sample([real], tensors, tmp_path / "sample.gguf")
    types = {kind: list(tensors) for kind in SOME}
    errors = tensor_errors.measure(
        quantizer,
        tmp_path / "sample.gguf",
        types,
        matrix,
        tensor_errors.weights(matrix),
        tmp_path,
        lambda done, total: None,
    )
    exact = {t.name: np.array(t.data, dtype="f8") for t in reader.tensors}
    for kind in SOME:
        made = tmp_path / f"{kind}.gguf"
        words = ["--imatrix", matrix, "--tensor-type", f"weight={kind}", real, made, "Q8_0"]
        subprocess.run([quantizer, *words], check=True, capture_output=True, timeout=120)
        for tensor in format.GGUFReader(made).tensors:
            if tensor.name in tensors:
                numbers = format.quants.dequantize(tensor.data, tensor.tensor_type)
                columns = np.array(weights[tensor.name])
                wrong = (columns * (numbers - exact[tensor.name]) ** 2).sum()
                share = wrong / (columns * exact[tensor.name] ** 2).sum()
                is_whole = tensor.n_elements <= tensor_errors.SAMPLE
                near = pytest.approx(share, rel=1e-3 if is_whole else 0.1)
                assert errors[tensor.name][kind] == near, tensor.name
        made.unlink()


@pytest.mark.build
def test_the_plan_knows_the_size_before_the_weights_are_there(
    program: Callable[[str], Path], tiny: Path, twin: Callable[[Path, str], Twin]
) -> None:
    skeleton = twin(tiny, "F16").skeleton
    sizes = quantize.quant_sizes(program("llama-quantize"), skeleton, ["4.8BPW", "0.8MIB"])
    elements = sum(np.prod(t.shape) for t in format.GGUFReader(twin(tiny, "F16").real).tensors)
    assert sizes["4.8BPW"] == pytest.approx(elements * 4.8 / 8, rel=0.03)  # and the metadata
    assert sizes["0.8MIB"] == int(0.8 * (1 << 20))
