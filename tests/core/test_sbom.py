"""Bills of materials, against CycloneDX's official schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from bills import invalid

from pipeline.core import sbom
from pipeline.core.sbom import Component

SUBJECT = Component(kind="application", name="llama-cpp", version="0123")
PARTS = (
    Component(
        kind="application",
        name="llama.cpp",
        version="0123",
        purl="pkg:github/ggml-org/llama.cpp@0123",
        license="MIT",
        source="git+https://github.com/ggml-org/llama.cpp",
        notes={"llama-pipeline:compiler": "12.2.0"},
        parts=(Component(kind="library", name="nlohmann"),),
    ),
    Component(kind="file", name="bin/größe", hashes={"sha256": "a" * 64}),
)


def test_a_bill_is_valid_and_says_that_it_is_incomplete() -> None:
    data = json.loads(sbom.text(SUBJECT, PARTS))
    assert invalid(data) == []
    assert data["compositions"] == [
        {"aggregate": "incomplete", "assemblies": ["application:llama-cpp"]}
    ]
    assert data["dependencies"][0]["dependsOn"] == [
        "file:bin/größe",
        "pkg:github/ggml-org/llama.cpp@0123",
    ]
    assert data["components"][0]["components"][0]["name"] == "nlohmann"


def test_the_same_parts_give_the_same_bytes_and_others_another_number() -> None:
    assert sbom.text(SUBJECT, PARTS) == sbom.text(SUBJECT, PARTS)
    one, other = (json.loads(sbom.text(SUBJECT, parts)) for parts in (PARTS, PARTS[:1]))
    assert one["serialNumber"] != other["serialNumber"]
    assert "timestamp" not in one["metadata"]


@pytest.mark.parametrize(
    ("name", "value"),
    [("bomFormat", "SPDX"), ("serialNumber", "7"), ("more", 1), ("components", [{"type": "x"}])],
)
def test_the_schema_refuses_what_is_no_bill(name: str, value: Any) -> None:
    assert invalid({**json.loads(sbom.text(SUBJECT, PARTS)), name: value})


def test_the_packages_of_a_lock_file(tmp_path: Path) -> None:
    lock = tmp_path / "package-lock.json"
    packages = {
        "": {"name": "page", "version": "1.0.0"},
        "node_modules/b": {"version": "2.0.0", "integrity": "sha512-AAEC sha1-xx"},
        "node_modules/@scope/a": {"version": "1.0.0", "integrity": "sha512-AAEC"},
        "node_modules/b/node_modules/@scope/a": {"version": "1.0.0"},
        "node_modules/linked": {"link": True, "resolved": "x"},
        "node_modules/alias": {"name": "real", "version": "3.0.0"},
    }
    lock.write_text(json.dumps({"packages": packages}))
    found = sbom.npm_packages(lock)
    assert [each.purl for each in found] == [
        "pkg:npm/%40scope/a@1.0.0",
        "pkg:npm/b@2.0.0",
        "pkg:npm/real@3.0.0",
    ]
    assert found[1].hashes == {"sha512": "000102"}
