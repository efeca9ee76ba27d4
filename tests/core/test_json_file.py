from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.core.store import json_file


@pytest.mark.parametrize("indent", [None, 1])
def test_written_and_read(tmp_path: Path, indent: int | None) -> None:
    file = tmp_path / "a.json"
    value = {"n": [1, "é", "not UTF-8: \udcff"]}
    json_file.write(file, value, indent=indent)
    assert json_file.read(file, dict) == value
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"n": 1',
        b"\xff",
        b"[]",
        b"null",
        b"{}",
        b'{"n": "x"}',
        b'{"n": []}',
        pytest.param(b"[" * 200_000, id="deep"),
        pytest.param(None, id="missing"),
    ],
)
def test_what_cannot_be_used_is_none(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "a.json"
    if content is not None:
        file.write_bytes(content)
    assert json_file.read(file, lambda data: int(data["n"])) is None
    assert json_file.read(tmp_path, dict) is None
