"""Headers of safetensors files: whole files are summed up, everything else is refused."""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.core.errors import PipelineError
from pipeline.models import contents, safetensors
from pipeline.models.contents import Readable


def by_hand(path: Path, header: Any, data: bytes = b"") -> Path:
    """A file with this header, given as JSON value or as bytes."""
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(content).to_bytes(8, "little") + content + data)
    return path


@pytest.fixture
def real(tmp_path: Path) -> Path:
    from safetensors.numpy import save_file

    path = tmp_path / "model.safetensors"
    tensors = {"a": np.zeros((4, 8), np.float16), "b": np.zeros(3, np.float32)}
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def test_bytes_by_type_of_a_real_file(real: Path) -> None:
    assert safetensors.read(real).dtypes == {"F16": 64, "F32": 12}


def test_a_file_without_tensors(tmp_path: Path) -> None:
    assert safetensors.read(by_hand(tmp_path / "a", {"__metadata__": {"a": "b"}})).dtypes == {}


def test_cut_at_every_byte(real: Path, tmp_path: Path) -> None:
    data, path = real.read_bytes(), tmp_path / "cut.safetensors"
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(PipelineError, match=r"cut\.safetensors"):
            safetensors.read(path)


def test_a_byte_too_many_is_said_with_both_lengths(real: Path) -> None:
    size = real.stat().st_size
    with real.open("ab") as file:
        file.write(b"\0")
    with pytest.raises(PipelineError, match=f"has {size + 1} bytes, its header needs {size}"):
        safetensors.read(real)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GGUF",
        bytes(100),
        b"\xff" * 100,
        (1 << 62).to_bytes(8, "little") + b"{}",  # longer than the file
        (3).to_bytes(8, "little") + b"{}",  # by one byte
        (2).to_bytes(8, "little") + b"{]",
        (2).to_bytes(8, "little") + b"\xff\xfe",
    ],
)
def test_garbage_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    with pytest.raises(PipelineError, match=r"a\.safetensors"):
        safetensors.read(path)


def tensor(offsets: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"a": {"dtype": dtype, "shape": [1], "data_offsets": offsets}}


@pytest.mark.parametrize(
    "header",
    [
        [],
        [1, 2],
        "text",
        12,
        None,
        {"a": 1},
        {"a": []},
        {"a": {}},
        {"a": {"dtype": "F32"}},
        {"a": {"data_offsets": [0, 4]}},
        tensor(None),
        tensor([0]),
        tensor([0, 2, 4]),
        tensor(["0", "4"]),
        tensor([0.0, 4.0]),
        tensor([None, 4]),
        tensor([[], 4]),
        tensor({"0": 0, "4": 4}),
        tensor([-4, 4]),
        tensor([4, 0]),
        tensor([0, 2**70]),
        b"[" * 100_000,
        b'{"a":' * 100_000,
    ],
    ids=lambda header: str(header)[:50],
)
def test_hostile_headers_are_errors_and_no_crash(tmp_path: Path, header: Any) -> None:
    path = by_hand(tmp_path / "a.safetensors", header, bytes(4))
    with pytest.raises(PipelineError, match=r"a\.safetensors"):
        safetensors.read(path)


@pytest.mark.parametrize("spans", [[(0, 4), (2, 6)], [(0, 4), (5, 9)], [(4, 8)], [(0, 4), (0, 4)]])
def test_tensors_that_overlap_or_leave_gaps(tmp_path: Path, spans: list[tuple[int, int]]) -> None:
    header = {str(n): tensor(list(span))["a"] for n, span in enumerate(spans)}
    path = by_hand(tmp_path / "a.safetensors", header, bytes(max(end for _, end in spans)))
    with pytest.raises(PipelineError, match="overlap or leave gaps"):
        safetensors.read(path)


def test_a_header_from_elsewhere_is_all_that_is_read(real: Path) -> None:
    data, asked = real.read_bytes(), []

    def read(start: int, stop: int) -> bytes:
        asked.append((start, stop))
        return data[start:stop]

    head = safetensors.head(Readable(name="far", size=len(data), read=read))
    assert head.length == len(data) - 76
    assert (head.elements, head.dtypes) == (4 * 8 + 3, {"F16": 64, "F32": 12})
    assert asked == [(0, 8), (8, head.length)]


@pytest.mark.parametrize("length", [8, 100_000_001, 2**60, 2**64 - 1])
def test_a_claim_of_a_long_header_is_not_followed(length: int) -> None:
    asked = []

    def read(start: int, stop: int) -> bytes:
        asked.append(stop)
        return length.to_bytes(8, "little")[start:stop]

    with pytest.raises(PipelineError, match="far"):
        safetensors.head(Readable(name="far", size=2**62, read=read))
    assert all(stop <= contents.START for stop in asked)


def test_flipped_header_bytes_are_only_ever_an_error(real: Path, tmp_path: Path) -> None:
    seed = int(os.environ.get("TEST_SEED") or random.SystemRandom().randrange(2**32))
    print(f"TEST_SEED={seed}")
    chance = random.Random(seed)
    whole, path = real.read_bytes(), tmp_path / "flipped"
    refused = 0
    for _ in range(1000):
        data = bytearray(whole)
        data[chance.randrange(len(data) - 76)] ^= 1 << chance.randrange(8)
        path.write_bytes(data)
        try:
            safetensors.read(path)
        except PipelineError:
            refused += 1
    assert refused > 100


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="none"):
        safetensors.read(tmp_path / "none")


@pytest.mark.parametrize(
    ("dtypes", "precision"),
    [
        ({"F32": 10, "F16": 90}, "F16"),
        ({"F32": 90, "BF16": 10}, "F32"),
        ({"F64": 5}, "F32"),
        ({"F8_E4M3": 90, "F32": 10}, "BF16"),
        ({"BF16": 7, "I64": 2}, "BF16"),
        ({}, "BF16"),
    ],
)
def test_the_precision_of_most_bytes_wins(dtypes: dict[str, int], precision: str) -> None:
    assert safetensors.own_precision(Counter(dtypes)) == precision


def test_a_damaged_file_is_not_told_to_be_named_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes((1000).to_bytes(8, "little") + b'{"a": 1}')
    with pytest.raises(PipelineError, match="or is cut short") as caught:
        safetensors.read(path)
    assert "is a safetensors file" not in str(caught.value)
