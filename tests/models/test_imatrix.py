"""What can be passed as an importance matrix."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from pipeline.core.errors import UsageError
from pipeline.models import imatrix

TEXT = "Der Bär läuft über die Straße und sieht das Meer. " * 40
NAME = b"blk.0.ffn_up.weight"


@pytest.mark.parametrize(
    "data",
    [
        TEXT.encode("latin-1"),
        TEXT.encode("utf-16"),
        b"PK\x03\x04" + bytes(4000),
        bytes(range(256)) * 20,
        struct.pack("<ii", 1, 4000) + bytes(100),
    ],
    ids=["Latin-1", "UTF-16", "zip", "noise", "no name"],
)
def test_what_is_neither_a_matrix_nor_a_text(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(UsageError, match="neither an importance matrix nor a text in UTF-8"):
        imatrix.require_usable(tmp_path / "x")


@pytest.mark.parametrize(
    "data",
    [
        TEXT.encode(),
        TEXT.encode("utf-8-sig"),
        struct.pack("<ii", 1, len(NAME)) + NAME + struct.pack("<iif", 1, 1, 2.0),
    ],
    ids=["text", "text with a byte order mark", "older format"],
)
def test_what_is_one(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x").write_bytes(data)
    imatrix.require_usable(tmp_path / "x")
