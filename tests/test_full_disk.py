"""Programs that meet a full disk: most of them do not say so, the message does."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from disks import disk
from fakes.tiny_llama import TEXT

from pipeline.bins.compile import cmake
from pipeline.core.errors import PipelineError
from pipeline.core.paths import Home
from pipeline.core.python_environment import INTO, WITH_HASHES, PythonEnvironment
from pipeline.core.store import publish
from pipeline.models import divergence, imatrix, quantize, resolve, tensor_errors
from pipeline.models.divergence import ChunkGroup, Perplexity

pytestmark = pytest.mark.build


class Small:
    """A small disk, the compiled programs, and a model that lies elsewhere."""

    def __init__(self, folder: Path, programs: Path, model: Path) -> None:
        self.folder, self.programs, self.model = folder, programs, model
        self.home = Home(folder / "home")


def fill(folder: Path, room: int) -> None:
    """Leave so many bytes on the disk of a folder."""
    free = shutil.disk_usage(folder).free
    (folder / "filler").write_bytes(b"\0" * (free - room))


@pytest.fixture
def small(
    built: Path, gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Small]:
    monkeypatch.setattr(publish, "SPARE_BYTES", -(1 << 40))  # the estimates let it through
    programs, model = next(built.glob("*-cpu")), tmp_path / "tiny ü.gguf"
    words = [programs / "llama-quantize", "--allow-requantize", gguf, model, "BF16"]
    subprocess.run(words, check=True, capture_output=True)
    with disk(tmp_path / "smäll", "size=4m"):
        yield Small(tmp_path / "smäll", programs, model)


def quantized(small: Small) -> None:
    target = small.home.models / "gguf" / "x" / "model.q8_0.gguf"
    wanted = quantize.Quantization(
        resolved=resolve.gguf_path(small.model, small.home),
        target=target,
        input=small.model,
        conversion=None,
        quant="Q8_0",
        imatrix=None,
    )
    fill(small.folder, 100_000)
    quantize.make(wanted, small.home, small.programs / "llama-quantize", {})


def matrix(small: Small) -> None:
    text = small.folder.with_name("text")
    text.write_text(TEXT * 5, "utf-8")
    fill(small.folder, 20_000)
    imatrix.make(
        small.folder,
        model=small.model,
        digest="",
        text=text,
        program=small.programs / "llama-imatrix",
        tool={},
        home=small.home,
    )


def probabilities(small: Small) -> None:
    tool = Perplexity(
        program=small.programs / "llama-perplexity", logs=small.home.logs, ctx_size=256
    )
    group = ChunkGroup(base=small.folder / "answers", text=small.folder.with_name("text"))
    fill(small.folder, 100_000)
    divergence.write_base(tool, small.model, group, TEXT * 5, 8)


@pytest.mark.parametrize("work", [quantized, matrix, probabilities])
def test_the_message_names_the_disk(small: Small, work: Callable[[Small], None]) -> None:
    with pytest.raises(PipelineError, match=r"disk full|No space left on device") as caught:
        work(small)
    assert str(small.folder) in caught.value.message
    assert caught.value.hint.startswith("free some space")


def test_a_disk_that_failed_once_is_thought_of(tmp_path: Path) -> None:
    """The program says "iostream error" alone, and later the disk can be written to."""
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    program, words = Path(shutil.which("false") or ""), [str(tmp_path / "model.gguf")]
    with pytest.raises(PipelineError, match="fails on a sample") as caught:
        tensor_errors._quantize(program, words, tmp_path / "made.gguf", "Q8_0")
    assert f"see whether the disk of {tmp_path} is failing" in caught.value.hint
    (tmp_path / "made.gguf").write_bytes(bytes(64))
    with pytest.raises(PipelineError, match="not a usable GGUF") as caught:
        tensor_errors._numbers(tmp_path / "made.gguf")
    assert f"see whether the disk of {tmp_path} is failing" in caught.value.hint


def test_a_compiler_that_is_not_found_for_want_of_room(tmp_path: Path) -> None:
    """CMake tries it, and does not say what kept it from doing so."""
    source, disk_folder = tmp_path / "source", tmp_path / "disk"
    source.mkdir()
    (source / "CMakeLists.txt").write_text("project(one LANGUAGES CXX)\n")
    with disk(disk_folder, "size=1m"):
        fill(disk_folder, 60_000)
        work = cmake.Work(
            source=source,
            folder=disk_folder / "build" / "one",
            options=(),
            targets=("one",),
            made_with=[],
            backend="cpu",
            root=disk_folder,
            jobs=1,
            log=disk_folder / "log",
            speeds=disk_folder / "speeds.json",
        )
        with pytest.raises(PipelineError, match="No space left on device") as caught:
            cmake.compile_all(work)
    assert str(disk_folder) in caught.value.message
    assert caught.value.hint.startswith("free some space")


def test_pip_that_can_not_even_write_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log lies on the same disk."""
    index, disk_folder = tmp_path / "index", tmp_path / "disk"
    index.mkdir()
    requirements = index / "requirements.txt"
    requirements.write_text(f"some-thing==1.0 --hash=sha256:{wheel(index, 1_000_000)}\n")
    for name, value in {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(index),
        "LLAMA_PIPELINE_CACHE": str(disk_folder / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    with disk(disk_folder, "size=1m"):
        fill(disk_folder, 400_000)
        home = Home(disk_folder / "home")
        environment = PythonEnvironment(
            home=home,
            name="thing",
            title="the thing",
            recipe={"requirements": "x"},
            packages=set,
            pip_calls=lambda python: [
                ["--python", str(python), *INTO, *WITH_HASHES, str(requirements)]
            ],
            download_bytes=0,
            installed_bytes=0,
        )
        with pytest.raises(PipelineError, match=r"disk full|No space left on device") as caught:
            environment.make(why="for a test")
    assert str(disk_folder) in caught.value.message
    assert caught.value.hint.startswith("free some space")


def wheel(folder: Path, size: int) -> str:
    """Put a wheel with so many bytes that do not compress into a folder; its sha256."""
    path, info = folder / "some_thing-1.0-py3-none-any.whl", "some_thing-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("some_thing/data", os.urandom(size))
        file.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: some-thing\nVersion: 1.0\n")
        head = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        file.writestr(f"{info}/WHEEL", head)
        file.writestr(f"{info}/RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()
