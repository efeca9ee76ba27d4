from __future__ import annotations

import re
from pathlib import PurePosixPath

import pytest
from packaging.utils import parse_sdist_filename, parse_wheel_filename
from packaging.version import Version

from pipeline.core.pins import Archive, PinnedModel, pins
from pipeline.models.resolve import short_name

DEMOS = pins().demos.values()
ARCHIVES = [
    pins().llama_cpp_archive,
    *(demo.archive for demo in DEMOS),
    pins().prebuilt.archive,
]


def is_sha(text: str, digits: int) -> bool:
    return re.fullmatch(rf"[0-9a-f]{{{digits}}}", text) is not None


@pytest.mark.parametrize("archive", ARCHIVES, ids=lambda archive: archive.package)
def test_archives(archive: Archive) -> None:
    assert archive.kind in ("sdist", "wheel")
    if archive.kind == "sdist":
        name, version = parse_sdist_filename(archive.file)
    else:
        name, version = parse_wheel_filename(archive.file)[:2]
    assert (name, version) == (archive.package, Version(archive.version))
    assert is_sha(archive.sha256, 64)
    assert archive.size > 1_000_000
    assert PurePosixPath(archive.file).name == archive.file
    assert not archive.folder.startswith("/")
    assert not archive.folder.endswith("/")
    assert ".." not in archive.folder.split("/")


def test_llama_cpp() -> None:
    assert is_sha(pins().llama_cpp_commit, 40)
    assert is_sha(pins().llama_cpp_tree, 40)


def test_the_demos() -> None:
    embedding = pins().demos["demo-embed"].files
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= {*embedding}
    assert [name[-5:] for name in pins().demos["demo"].files] == [".gguf"]


@pytest.mark.parametrize("demo", DEMOS, ids=lambda demo: demo.name)
def test_a_demo(demo: PinnedModel) -> None:
    for name, file in demo.files.items():
        assert is_sha(file.sha256, 64)
        assert file.size > 0
        assert not PurePosixPath(name).is_absolute()
        assert ".." not in PurePosixPath(name).parts
    assert short_name(demo.name) == demo.name


def test_the_prebuilt_programs() -> None:
    prebuilt = pins().prebuilt
    assert prebuilt.file == f"llama-{prebuilt.release}-bin-win-cpu-x64.zip"
    assert (prebuilt.platform, prebuilt.backend) == ("windows-x64", "cpu")
    assert is_sha(prebuilt.sha256, 64)
    assert prebuilt.size < prebuilt.archive.size
    assert {"llama-server.exe", "llama-quantize.exe", "llama.dll"} <= set(prebuilt.files)
    for name, digest in prebuilt.files.items():
        assert is_sha(digest, 64)
        assert PurePosixPath(name).name == name


def test_torch() -> None:
    assert Version(pins().torch) >= Version("2")
    assert pins().torch_index.startswith("https://")


def test_every_pin_is_another() -> None:
    hashes = [file.sha256 for demo in DEMOS for file in demo.files.values()]
    hashes += [archive.sha256 for archive in ARCHIVES]
    hashes += [pins().prebuilt.sha256]
    hashes += [pins().llama_cpp_commit, pins().llama_cpp_tree]
    assert len(set(hashes)) == len(hashes)
