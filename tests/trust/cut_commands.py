"""The commands that are cut, each with the folder that it works on (`World`)."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import tarfile
import time
import venv
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import Run, free_port, know_machine
from cut_worlds import World
from fakes import hub, llama_tree, releases
from fakes.tiny_llama import TEXT

from pipeline.bins import platform
from pipeline.bins.binaries import PROGRAMS
from pipeline.bins.compile import git_tree, source
from pipeline.core.paths import Home
from pipeline.core.store import receipts
from pipeline.core.store.hashing import sha256
from pipeline.models import converter

TAG = f"{platform.platform_tag()}-cpu"
PIECES = 6  # in which the stand-in for the converter writes

# Takes the converter's words; in the place of tensors that are not to be written it ends.
CONVERTER = f"""
import pathlib, sys
data = pathlib.Path(__file__).with_name("made.gguf").read_bytes()
made = sys.argv[sys.argv.index("--outfile") + 1]
size = -(-len(data) // {PIECES})
with open(made, "wb", buffering=0) as file:
    for number in range({PIECES}):
        file.write(data[number * size:(number + 1) * size])
        print(f"Writing: {{100 * (number + 1) // {PIECES}}}%")
"""


@dataclass(frozen=True)
class Parts:
    """What the folders are made of: the compiled programs, the tiny model, and GGUFs of it."""

    programs: Path
    model: Path
    q8_0: Path
    bf16: Path


@pytest.fixture(scope="session")
def parts(built: Path, tiny: Path, gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Parts:
    programs, bf16 = built / TAG, tmp_path_factory.mktemp("parts") / "bf16.gguf"
    words = [programs / "llama-quantize", "--allow-requantize", gguf, bf16, "BF16"]
    subprocess.run(words, check=True, capture_output=True)
    return Parts(programs=programs, model=tiny, q8_0=gguf, bf16=bf16)


# Packages


def package(path: Path, who: str) -> Path:
    """The archive of a package whose program says who it is."""
    server = (
        f'#!/bin/sh\n[ "$(cat "$(dirname "$0")/libllama.so")" = {who} ] && echo version: {who}\n'
    )
    files = {"README.md": "read me", "bin/llama-server": server, "bin/libllama.so": who}
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(text), 0o755
            tar.addfile(info, io.BytesIO(text.encode()))
    return path


@contextmanager
def install_package(parts: Parts, top: Path) -> Iterator[World]:
    """A package in the place of another one."""
    top.mkdir(parents=True)
    old, new = (package(top / f"{who}.tar.gz", who) for who in ("old", "new"))
    world = World(top, ("install_package", f"pkg={new}"))
    world.home.mkdir()
    world.doit("install_package", f"pkg={old}")
    yield world


# Models


def with_converter(world: World, bf16: Path) -> None:
    """A source tree whose converter writes `bf16`, and an environment for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAMA_PIPELINE_CACHE", str(world.cache))
        home = Home(world.home)
        pinned = source.pinned(home)
        tree = pinned.folder
        (tree / "conversion").mkdir(parents=True)
        lists = llama_tree.KNOWN.format(lines='    "LlamaForCausalLM": "x",\n')
        (tree / "conversion" / "__init__.py").write_text(lists)
        (tree / "convert_hf_to_gguf.py").write_text(CONVERTER)
        shutil.copyfile(bf16, tree / "made.gguf")
        git_tree.record(tree, source._recipe(pinned), size=1, seconds=0)
        made = converter.installed(home).folder
        venv.create(made, with_pip=False, symlinks=True)
        (site,) = made.glob("lib/*/site-packages")
        for name in converter.required():
            info = site / f"{name.replace('-', '_')}-1.dist-info"
            info.mkdir()
            (info / "RECORD").write_text(f"{info.name}/RECORD,,\n")
        stamp = made / "environment"
        stamp.write_text(converter.requirements_sha256() + "\n")
        entry = receipts.stamp(stamp, converter.installed(home).recipe, seconds=0)
        receipts.save(made, {stamp.name: entry})


@contextmanager
def prepare(parts: Parts, top: Path) -> Iterator[World]:
    """A model folder, converted and quantized."""
    top.mkdir(parents=True)
    model = shutil.copytree(parts.model, top / "tiny ü")
    world = World(top, ("prepare", f"model={model}", "quant=q4_k_m"))
    world.env["LLAMA_SERVER_BINS_DIR"] = str(parts.programs)
    world.between = frozenset([sha256(parts.bf16)])
    world.home.mkdir()
    with_converter(world, parts.bf16)
    yield world


@contextmanager
def fetch(parts: Parts, top: Path) -> Iterator[World]:
    """A GGUF from the hub."""
    repo = top.with_name("hub") / "org" / "tiny"
    repo.mkdir(parents=True)
    shutil.copyfile(parts.q8_0, repo / "tiny-Q8_0.gguf")
    top.mkdir(parents=True)
    world = World(top, ("prepare", "model=org/tiny"))
    world.home.mkdir()
    with hub.start(repo.parents[1]) as running:
        world.env["HF_ENDPOINT"] = running.endpoint
        world.env["HF_HOME"] = str(top / "hf")
        world.env["LLAMA_SERVER_BINS_DIR"] = str(parts.programs)
        yield world


def own_gguf(parts: Parts, top: Path, *words: str) -> World:
    """An unquantized GGUF of the user's own, and beside it a text of some thousand tokens, which is
    `{text}` in the words."""
    top.mkdir(parents=True)
    model, text = shutil.copyfile(parts.bf16, top / "tiny ü.gguf"), top / "text.txt"
    text.write_text(TEXT * 5, "utf-8")
    task, *others = (word.format(text=text) for word in words)
    world = World(top, (task, f"model={model}", *others), most_kills=12, most_fails=12)
    world.env["LLAMA_SERVER_BINS_DIR"] = str(parts.programs)
    world.home.mkdir()
    return world


@contextmanager
def mix(parts: Parts, top: Path) -> Iterator[World]:
    """The types of a mix, chosen by the errors of its tensors, and the GGUF made with them. Without
    llama-perplexity, of which a busy machine loses figures, each choice is the same."""
    world = own_gguf(parts, top, "prepare", "quant=4.8bpw", "imatrix={text}")
    programs, left_out = top.with_name("programs"), shutil.ignore_patterns("llama-perplexity", ".*")
    shutil.copytree(parts.programs, programs, copy_function=os.link, ignore=left_out)
    # of 17 types, each of which is tried in the same way
    world.patch = "from pipeline.models import mix; mix.CANDIDATES = ('q3_k', 'iq4_nl', 'q8_0')"
    world.env["LLAMA_SERVER_BINS_DIR"] = str(programs)
    yield world


@contextmanager
def quality(parts: Parts, top: Path) -> Iterator[World]:
    """Two quants, made and compared with the unquantized model."""
    quants = "quants=q8_0,q4_k_m"
    yield own_gguf(parts, top, "quality", quants, "text={text}", "chunks=8", "ctx_size=256")


@contextmanager
def prune(parts: Parts, top: Path) -> Iterator[World]:
    """A model that stays, and around it what nothing uses any more."""
    with prepare(parts, top) as world:
        prepared = world.doit(*world.words)
        home = world.home
        (folder,) = (home / "models" / "gguf").iterdir()
        between = folder / "model.f16.gguf"
        shutil.copyfile(parts.bf16, between)
        entry = receipts.stamp(
            between, {"step": "convert", "outtype": "F16"}, seconds=1, keep=False
        )
        receipts.change(between, entry)
        cut = home / "models" / "gguf" / "org__other__0123456789ab" / ".other.gguf.part"
        old = home / "bins" / "linux-x64-vulkan"
        for path in (cut, home / "logs" / "old.log", old / "llama-server"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("x" * 10_000)
        recipe = {"step": "build", "source": {"commit": "0" * 40, "tree": "0" * 40}}
        entry = receipts.stamp(old / "llama-server", recipe, seconds=1)
        receipts.save(old, {"llama-server": entry})
        for path in home.rglob("*"):
            os.utime(path, (time.time() - 100 * 86400,) * 2) if path.suffix == ".log" else None
        empty_converter(world, prepared)
        world.words = ("prune", "yes=1")
        yield world


@contextmanager
def remove(parts: Parts, top: Path) -> Iterator[World]:
    """A model that was made, taken away: once it is gone there is no such model."""
    with prepare(parts, top) as world:
        empty_converter(world, world.doit(*world.words))
        world.words, world.ends = ("remove", world.words[1], "yes=1"), (0, 3)
        yield world


def empty_converter(world: World, run: Run) -> None:
    """Take the packages out of the converter's environment, which each try would copy: nothing
    converts any more."""
    assert "pip --python" not in run.out + run.err, run.out + run.err
    for packages in world.cache.glob("converter-*/lib/python*/site-packages"):
        shutil.rmtree(packages)
        packages.mkdir()


# Another llama.cpp


@contextmanager
def upgrade(parts: Parts, top: Path) -> Iterator[World]:
    """Another llama.cpp: fetched, unpacked, built by CMake, compared, switched to."""
    scripts = {name: f'#!/bin/sh\nexec "{parts.programs / name}" "$@"\n' for name in PROGRAMS}
    tree = llama_tree.make(top.with_name("b7001"), parts.programs, scripts=scripts)
    top.mkdir(parents=True)
    world = World(top, ("upgrade", "to=b7001", "yes=1"), most_fails=60)
    (world.home / "bins").mkdir(parents=True)
    shutil.copytree(parts.programs, world.home / "bins" / TAG, copy_function=os.link)
    know_machine(world.home)  # else half of each try
    with releases.start() as site:
        site.add("b7001", {})
        site.commit(tree, "b7001")
        world.env["GITHUB_API_URL"] = site.api
        yield world


# Servers


@contextmanager
def chat(parts: Parts, top: Path) -> Iterator[World]:
    """A server in the foreground, as long as an answer takes."""
    top.mkdir(parents=True)
    words = ("chat", f"model={parts.q8_0}", "prompt=hi", 'server.grammar=root ::= "ok"')
    world = World(top, words)
    world.home.mkdir()
    world.env["LLAMA_SERVER_BINS_DIR"] = str(parts.programs)
    yield world


@contextmanager
def servers(parts: Parts, top: Path) -> Iterator[World]:
    """`up` of a server and of one that is loaded on demand, and then `down`."""
    top.mkdir(parents=True)
    file = top / "two ü.toml"
    lines = [f"[instance.server]\nmodel = {json.dumps(str(parts.q8_0))}\nctx_size = 512"]
    for name, start in (("now", "boot"), ("later", "demand")):
        lines += [f'[instance.{name}.control]\nstart = "{start}"']
        lines += [f"[instance.{name}.server]\nport = {free_port()}"]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = f"config={file}"
    world = World(top, ("up", config), after=("down", config))
    world.below = world.home / "run" / "instances"
    world.most_fails = 16  # since `up` waits 10 seconds for a supervisor that cannot write
    world.home.mkdir()
    world.env["LLAMA_SERVER_BINS_DIR"] = str(parts.programs)
    yield world
    world.doit("down", config, status=None)


@contextmanager
def down(parts: Parts, top: Path) -> Iterator[World]:
    with servers(parts, top) as world:
        world.setup, world.words = world.words, world.after
        yield world


@contextmanager
def load(parts: Parts, top: Path) -> Iterator[World]:
    with servers(parts, top) as world:
        world.setup, world.words = world.words, ("load", world.words[1], "name=later")
        yield world


@contextmanager
def unload(parts: Parts, top: Path) -> Iterator[World]:
    with servers(parts, top) as world:
        world.setup, world.words = world.words, ("unload", world.words[1], "name=now")
        yield world


Command = Callable[[Parts, Path], AbstractContextManager[World]]
ALWAYS: tuple[Command, ...] = (fetch,)  # of which some cuts are tried in each run of the tests
ALL: tuple[Command, ...] = (
    *(install_package, prepare, mix, quality, fetch, prune, remove, upgrade, chat),
    *(servers, down, load, unload),
)
