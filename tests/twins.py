"""Real parts for tests of models: the built programs, the converter, models of some size."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import kept
import pytest
from conftest import REPOSITORY
from fakes import large_llama
from fakes.large_llama import Size
from workers import shared

from pipeline.bins.compile import source
from pipeline.core.paths import Home
from pipeline.models import chain, contents, resolve, skeleton
from pipeline.models.convert import Conversion
from pipeline.models.quants import QuantRequest
from pipeline.models.resolve import ModelFile, Resolved

# As much of each as makes a tenth of the sum mean something, and still is made in seconds.
DENSE = Size(layers=8, hidden=1024, feed_forward=2816, heads=16, kv_heads=16)
GROUPED = Size(layers=8, hidden=1024, feed_forward=2816, heads=16, kv_heads=4)

SKELETON = Path("skeleton", "s.gguf")  # among the models of a home


@dataclass(frozen=True)
class Twin:
    """A model that was really converted, and the skeleton that was there before."""

    folder: Path
    real: Path
    skeleton: Path


@pytest.fixture(scope="session")
def program(built: Path) -> Callable[[str], Path]:
    """A built program by its name."""
    return lambda name: next(path for path in built.glob(f"*/{name}*") if path.stem == name)


@pytest.fixture(scope="session")
def script(built: Path) -> Path:
    return source.find(Home(REPOSITORY)).folder / "convert_hf_to_gguf.py"


def conversion(folder: Path, outtype: str, home: Home, script: Path) -> Conversion:
    """The conversion of a folder whose weights are too large to be hashed for a test."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    files = (ModelFile(p.relative_to(folder).as_posix(), p.stat().st_size, "0") for p in found)
    resolved = Resolved(
        kind="safetensors",
        name=folder.name,
        slug=resolve.local_slug(folder),
        folder=folder,
        local=True,
        source={"type": "folder"},
        files=tuple(files),
        precision="BF16",
    )
    made = chain.chain(resolved, QuantRequest(quant=outtype), home, script, {}).conversion
    assert made
    return made


def skeleton_of(made: Conversion, python: Path, target: Path) -> Path:
    folder = made.resolved.folder
    files = [contents.local(folder / f.name, f.name) for f in made.resolved.files]
    found = skeleton.safetensors_skeleton(made, files, target, python)
    assert found
    return found


@pytest.fixture(scope="session")
def twin(
    converter: Path, script: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Path, str], Twin]:
    """Converts a folder, once for all workers."""

    def make(folder: Path, outtype: str) -> Twin:
        def convert_it(top: Path) -> None:
            home = Home(top)
            made = conversion(folder, outtype, home, script)
            skeleton_of(made, converter, home.models / SKELETON)
            kept.converted(made, home)

        name = f"twin-{hashlib.sha256(str(folder).encode()).hexdigest()[:12]}-{outtype}"
        home = Home(shared(tmp_path_factory, name, convert_it))
        real = conversion(folder, outtype, home, script).target
        return Twin(folder, real, home.models / SKELETON)

    return make


@pytest.fixture(scope="session")
def large(
    twin: Callable[[Path, str], Twin], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Size], Twin]:
    """A model of this size in BF16, of some hundred MB."""

    def make(size: Size) -> Twin:
        name = f"large-{hashlib.sha256(repr(size).encode()).hexdigest()[:12]}"
        folder = shared(tmp_path_factory, name, lambda top: large_llama.make(top / "llama", size))
        return twin(folder / "llama", "BF16")

    return make
