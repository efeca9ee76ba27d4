"""More commands that are cut, beside those of `cut_commands`: those that write documents for their
users, and those that keep what they have measured."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from conftest import REPOSITORY
from cut_commands import Command, Parts, empty_converter, own_gguf, prepare, upgrade
from cut_worlds import World
from report import bench_stand_in
from test_trust_supply import keys

from pipeline.core import signing
from pipeline.core.paths import Home

SOME = 6  # kills, and failing calls, where a try takes seconds


@contextmanager
def prepared(parts: Parts, top: Path) -> Iterator[World]:
    """A model that is made, and nothing that could make it again."""
    with prepare(parts, top) as world:
        empty_converter(world, world.doit(*world.words))
        yield world


@contextmanager
def lock(parts: Parts, top: Path) -> Iterator[World]:
    """An entry of pipeline.lock, beside another one."""
    with prepare(parts, top) as world:
        _, model, quant = world.words
        first = world.doit("lock", model, "quant=q8_0")
        world.doit("prepare", model, quant)
        empty_converter(world, first)
        world.words = ("lock", model, quant)
        yield world


@contextmanager
def provenance(parts: Parts, top: Path) -> Iterator[World]:
    """A statement, in the place of one by another builder."""
    with prepared(parts, top) as world:
        world.words = ("provenance", *world.words[1:])
        world.doit(*world.words, "builder=https://ci.example/old")
        yield world


@contextmanager
def sign(parts: Parts, top: Path) -> Iterator[World]:
    """A signature, in the place of one by another key."""
    top.mkdir(parents=True)
    model = shutil.copyfile(parts.q8_0, top / "tiny ü.gguf")
    old, new = top / "old", top / "new"
    for folder in (old, new):
        folder.mkdir()
        keys(folder)
    world = World(top, ("sign", f"model={model}", f"key={new / 'key.pem'}"))
    world.most_kills = world.most_fails = SOME
    world.home.mkdir()
    world.cache.mkdir()
    packages = signing.make(Home(REPOSITORY))
    (world.cache / packages.name).symlink_to(packages)
    world.doit("sign", f"model={model}", f"key={old / 'key.pem'}")
    yield world


@contextmanager
def package(parts: Parts, top: Path) -> Iterator[World]:
    """The archives of another llama.cpp, and their bill of materials."""
    with upgrade(parts, top) as world:
        world.doit(*world.words)
        world.words = ("package", "backend=cpu", "portable=0")
        world.most_kills = world.most_fails = SOME
        yield world


def for_a_cluster(parts: Parts, top: Path, task: str, *old: str) -> World:
    """The folder that `task` writes for a configuration, in the place of one with the words
    `old`."""
    top.mkdir(parents=True)
    file = top / "one ü.toml"
    model = f"model = {json.dumps(str(parts.q8_0))}\nctx_size = 512\n"
    file.write_text(f"[instance.chat.server]\n{model}", encoding="utf-8")
    words = (task, f"config={file}", f"out={top / 'made ü'}", "image=registry.example/a:1")
    world = World(top, words)
    world.env["LLAMA_SERVER_BINS_DIR"] = str(parts.programs)
    world.home.mkdir()
    world.doit(*words, *old)
    return world


@contextmanager
def kubernetes(parts: Parts, top: Path) -> Iterator[World]:
    yield for_a_cluster(parts, top, "kubernetes", "namespace=old")


@contextmanager
def ray(parts: Parts, top: Path) -> Iterator[World]:
    yield for_a_cluster(parts, top, "ray", "namespace=old")


def with_bench(world: World, parts: Parts) -> None:
    """The programs, with a stand-in for llama-bench that is always as fast."""
    programs, left_out = (
        world.top.with_name("programs"),
        shutil.ignore_patterns("llama-bench", ".*"),
    )
    shutil.copytree(parts.programs, programs, copy_function=os.link, ignore=left_out)
    bench_stand_in.write(programs, {})
    world.env["LLAMA_SERVER_BINS_DIR"] = str(programs)


@contextmanager
def tune(parts: Parts, top: Path) -> Iterator[World]:
    """What was measured, kept for `serve`."""
    world = own_gguf(parts, top, "tune", "ctx_size=256")
    world.words = ("tune", f"model={parts.q8_0}", *world.words[2:])
    world.patch = "from pipeline.report import tuning; tuning.TURNS, tuning.PAIRS = 3, (2, 2)"
    world.most_kills = world.most_fails = SOME
    with_bench(world, parts)
    yield world


@contextmanager
def compare(parts: Parts, top: Path) -> Iterator[World]:
    """A page with pictures, in the place of one without the speeds."""
    words = ("quants=q8_0,q4_k_m", "text={text}", "chunks=8", f"out={top / 'page ü'}")
    world = own_gguf(parts, top, "compare", *words)
    world.most_kills = world.most_fails = SOME
    with_bench(world, parts)
    world.doit(*world.words, "measure=quality")
    yield world


DOCUMENTS: tuple[Command, ...] = (
    *(lock, provenance, sign, package, kubernetes, ray, tune, compare),
)
