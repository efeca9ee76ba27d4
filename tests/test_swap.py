"""Programs are replaced while they run; and what a build costs that has nothing to do."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from subprocess import DEVNULL

import pytest
from conftest import Doit, chat

from pipeline.bins import platform

pytestmark = pytest.mark.build
BUILT = "built llama.cpp "
# What is asked about graphics cards and toolkits, or would compile.
TOOLS = (
    *("nvidia-smi", "nvcc", "rocminfo", "hipcc", "sycl-ls", "icpx", "vulkaninfo", "glslc"),
    *("clang", "ccache", "cmake", "ninja", "npm"),
)


def server(doit: Doit, folder: str) -> Path:
    return doit.home / "bins" / folder / "llama-server"


@pytest.mark.xdist_group("builder")
def test_a_server_goes_on_while_it_is_built_anew(builder: Doit, gguf: Path) -> None:
    program = server(builder, f"{platform.platform_tag()}-cpu")
    before = program.stat().st_ino
    with builder.serving(f"model={gguf}", "ctx_size=512") as url:
        said = chat(url)
        builder("forget", "build_bins")
        for path in (builder.home / "bins" / ".build").rglob("ggml-alloc.c.o"):
            path.unlink()  # some work
        answers = 0
        with builder.start("build_bins", stdout=DEVNULL, stderr=DEVNULL) as build:
            while build.poll() is None:
                assert chat(url) == said
                answers += 1
        assert build.returncode == 0 and answers > 0
        assert program.stat().st_ino != before, "it was published anew"
        assert chat(url) == said
    assert builder("build_bins").steps == []
    with builder.serving(f"model={gguf}", "ctx_size=512") as url:
        assert chat(url) == said


@pytest.mark.skipif(sys.platform != "linux", reason="packs this machine's programs as on Linux")
def test_a_server_goes_on_while_its_package_is_replaced(
    package: Path, bare: Doit, gguf: Path
) -> None:
    bare("install_package", f"pkg={package}")
    program = server(bare, "package/bin")
    before = program.stat().st_ino
    with bare.serving(f"model={gguf}", "bins=package", "ctx_size=512") as url:
        said = chat(url)
        assert "installed llama.cpp" in bare("install_package", f"pkg={package}", "force=1").err
        assert program.stat().st_ino != before
        assert chat(url) == said


@pytest.mark.xdist_group("builder")
def test_two_builds_at_once_compile_once(builder: Doit) -> None:
    builder("forget", "build_bins")
    both = [builder.start("build_bins") for _ in range(2)]
    told = [process.communicate(timeout=1200)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    assert sum(err.count(BUILT) for err in told) == 1
    assert builder("build_bins").steps == []


def test_a_recipe_is_a_key_for_caches(doit: Doit) -> None:
    def recipe(*words: str) -> str:
        out = doit("recipe", *words).out
        assert len(out.split()) == 1 and "/" not in out
        return out.strip()

    plain = recipe()
    assert plain.startswith(f"{platform.platform_tag()}-cpu-") and recipe() == plain
    others = [recipe("portable=1"), recipe("ui=off"), recipe("cuda_architectures=90")]
    doit.env["CXXFLAGS"] = "-O1"
    others.append(recipe())
    del doit.env["CXXFLAGS"]
    assert len({plain, *others}) == 1 + len(others)
    assert recipe() == plain


@pytest.mark.skipif(os.name == "nt", reason="shell scripts stand in for tools")
def test_nothing_to_do_starts_no_tool(doit: Doit, tmp_path: Path) -> None:
    folder, log = tmp_path / "tools ü", tmp_path / "log"
    folder.mkdir()
    for name in TOOLS:
        real = shutil.which(name)
        go_on = f'exec "{real}" "$@"' if real else "exit 1"
        (folder / name).write_text(f'#!/bin/sh\necho {name} >> "{log}"\n{go_on}\n')
        (folder / name).chmod(0o755)
    doit.env["PATH"] = f"{folder}{os.pathsep}{doit.env.get('PATH', os.defpath)}"
    doit("build_bins")
    assert "nvidia-smi" in log.read_text(), "a machine with other tools is looked at"
    log.unlink()
    assert doit("build_bins").steps == []
    assert not log.exists(), log.read_text()
