"""Packages as users make, move, install and serve them: the pinned llama.cpp, for any processor."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import Doit, Run, chat, with_programs
from elftools.elf.elffile import ELFFile

from pipeline.bins import platform
from pipeline.bins.compile import build
from pipeline.core import sbom
from pipeline.core.pins import pins

pytestmark = [
    pytest.mark.build,
    pytest.mark.slow,
    # With empty caches it is compiled beside the other builds: the time is for all of them.
    pytest.mark.timeout(3600),
    pytest.mark.skipif(sys.platform != "linux", reason="looks into ELF files"),
]
COMMIT = pins().llama_cpp_commit
STEM = f"llama-cpp-{COMMIT[:12]}-{platform.platform_tag()}"


@pytest.fixture(scope="module")
def maker(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Doit:
    """doit on the home in which the packages are made."""
    return with_programs(built, tmp_path_factory.mktemp("maker") / "mein häus")


@pytest.fixture(scope="module")
def packed(maker: Doit) -> Run:
    """The first `doit package`: it compiles for every processor, minutes without ccache."""
    return maker("package", "backend=cpu", timeout=3000)


@pytest.fixture(scope="module")
def archive(packed: Run) -> Path:
    return Path(packed.out.splitlines()[0])


@pytest.fixture(scope="module")
def manifest(archive: Path) -> Any:
    with tarfile.open(archive) as tar:
        file = tar.extractfile("manifest.json")
        assert file is not None
        return json.load(file)


@pytest.fixture(scope="module")
def unpacked(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package somewhere else. For reading only."""
    folder = tmp_path_factory.mktemp("elsewhere") / "anderswo ü"
    folder.mkdir()
    subprocess.run(["tar", "-xf", archive, "-C", folder], check=True)
    return folder


@contextmanager
def gone(doit: Doit) -> Iterator[None]:
    """The home under another name meanwhile."""
    away = doit.home.rename(doit.home.with_name("gone"))
    try:
        yield
    finally:
        away.rename(doit.home)


def packages(doit: Doit) -> list[str]:
    made = (doit.home / "bins" / "packages").glob("llama*")
    return sorted(path.name for path in made if not path.name.endswith(sbom.SUFFIX))


def test_two_archives_made_once(maker: Doit, packed: Run) -> None:
    paths = [Path(line) for line in packed.out.splitlines()]
    assert [path.name for path in paths] == [f"{STEM}-cpu.tar.gz", f"{STEM}-cpu.zip"]
    assert all(path.parent == maker.home / "bins" / "packages" for path in paths)
    assert packed.err.count("packing ") == 2
    before = [path.stat().st_mtime_ns for path in paths]
    again = maker("package", "backend=cpu")
    assert again.out == packed.out
    assert "packing" not in again.err and "+ " not in again.err
    assert [path.stat().st_mtime_ns for path in paths] == before


def test_the_manifest_tells_of_every_file(archive: Path, manifest: Any) -> None:
    assert manifest["commit"] == COMMIT and manifest["tree"] == pins().llama_cpp_tree
    assert manifest["platform"] == platform.platform_tag()
    assert manifest["backend"] == "cpu" and manifest["portable"] is True
    with zipfile.ZipFile(archive.with_name(f"{STEM}-cpu.zip")) as packed:
        names = set(packed.namelist()) - {"manifest.json"}
        found = {name: hashlib.sha256(packed.read(name)).hexdigest() for name in names}
    assert found == {name: file["sha256"] for name, file in manifest["files"].items()}
    assert {"README.md", "LICENSE", "bin/llama-server", "bin/llama-quantize"} <= found.keys()


def test_the_code_of_every_processor_is_in_it(maker: Doit, manifest: Any) -> None:
    (work,) = maker.home.glob("bins/.build/*-portable/bin")
    made = {path.name for path in work.glob("libggml-cpu-*.so")}
    assert len(made) > 4
    held = {name.removeprefix("bin/") for name in manifest["files"]}
    assert made | {"libgomp.so.1"} <= held


def test_it_runs_wherever_it_is_unpacked(maker: Doit, unpacked: Path, gguf: Path) -> None:
    def run(*words: str | Path) -> str:
        env = {"PATH": os.defpath, "HOME": str(unpacked)}
        done = subprocess.run(words, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    folder = unpacked / "bin"
    with gone(maker):
        assert COMMIT[:9] in run(folder / "llama-server", "--version")
        few = ("-p", "8", "-n", "8", "-r", "1")
        told = run(folder / "llama-bench", "-m", gguf, *few)
    (loaded,) = re.findall(r"loaded CPU backend from (.*)", told)
    assert Path(loaded).parent == folder and Path(loaded).name.startswith("libggml-cpu-")


def test_its_programs_look_for_libraries_beside_them_alone(unpacked: Path) -> None:
    for file in (unpacked / "bin").iterdir():
        with file.open("rb") as stream:
            section: Any = ELFFile(stream).get_section_by_name(".dynamic")
            paths = [tag.runpath for tag in section.iter_tags("DT_RUNPATH")]
            paths += [tag.rpath for tag in section.iter_tags("DT_RPATH")]
        assert paths == ([] if file.name.startswith("libgomp") else ["$ORIGIN"]), file
    needed = {name for file in (unpacked / "bin").iterdir() for name in build.needed(file)}
    ours = {path.name for path in (unpacked / "bin").iterdir()}
    assert {name for name in needed if name.startswith(("libggml", "libllama", "libmtmd"))} <= ours


@pytest.mark.skipif(not shutil.which("ccache"), reason="ccache makes the compiler's paths relative")
def test_nothing_of_the_home_is_in_it(maker: Doit, unpacked: Path) -> None:
    path = os.fsencode(maker.home)
    assert not [
        file for file in unpacked.rglob("*") if file.is_file() and path in file.read_bytes()
    ]


def test_installed_in_an_empty_home_it_serves(
    archive: Path, bare: Doit, gguf: Path, tmp_path: Path
) -> None:
    first = bare("install_package", f"pkg={archive}")
    assert first.err.count("installed llama.cpp") == 1 and "serve bins=package model=" in first.err
    assert "installed llama.cpp" not in bare("install_package", f"pkg={archive}").err

    broken = tmp_path / "broken ü.tar.gz"
    broken.write_bytes(archive.read_bytes()[:1_000_000])
    wrong = bare("install_package", f"pkg={broken}", status=1)
    assert wrong.err.count("error: ") == 1 and "Traceback" not in wrong.err
    assert broken.name in wrong.err

    with bare.serving(f"model={gguf}", "bins=package", "ctx_size=512") as url:
        assert chat(url)
    assert "installed package" in bare.summary["backend"]
    made = {path.name for path in (bare.home / "bins").iterdir() if path.suffix != ".lock"}
    assert made == {"package"}, "nothing is compiled or fetched, and nothing is left behind"


def test_installed_into_a_folder_of_ones_own(
    packed: Run, bare: Doit, gguf: Path, tmp_path: Path
) -> None:
    zipped, into = packed.out.splitlines()[1], tmp_path / "soft ü" / "llama cpp"
    run = bare("install_package", f"pkg={zipped}", f"into={into}")
    assert "bins=package" not in run.err, "it is served from bins/ alone"
    assert f"LLAMA_SERVER_BINS_DIR={shlex.quote(str(into / 'bin'))} " in run.err
    assert subprocess.run([into / "bin" / "llama-server", "--version"]).returncode == 0
    assert not (bare.home / "bins" / "package").exists()

    # As in an image for CUDA whose container was given no card.
    manifest = into / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"backend": "cpu"', '"backend": "cuda"'))
    bare.env["LLAMA_SERVER_BINS_DIR"] = str(into / "bin")
    with bare.serving(f"model={gguf}", "ctx_size=512"):
        assert (bare.summary["backend"], bare.summary["device"]) == ("cuda", "CPU")
    (said,) = (bare.home / "logs").glob("serve-*.err")
    assert "warning: llama-server sees no device of its backend" in said.read_text()


@pytest.mark.parametrize(
    ("words", "says"), [([], "pkg=PATH"), (["pkg=/no/such.zip"], "not a file")]
)
def test_no_archive_is_wrong_usage(bare: Doit, words: list[str], says: str) -> None:
    wrong = bare("install_package", *words, status=3)
    assert says in wrong.err and "Traceback" not in wrong.err
    assert not (bare.home / "bins" / "package").exists()


def test_no_package_to_serve_with(bare: Doit, gguf: Path) -> None:
    wrong = bare("serve", f"model={gguf}", "bins=package", status=1)
    assert "there is no package in" in wrong.err and "doit install_package pkg=" in wrong.err


def test_an_installed_package_is_packed_again(archive: Path, bare: Doit, manifest: Any) -> None:
    bare("install_package", f"pkg={archive}")
    paths = bare("package", "bins=package").out.splitlines()
    assert packages(bare) == [f"{STEM}-package.tar.gz", f"{STEM}-package.zip"]
    again = bare("install_package", f"pkg={paths[0]}")
    assert again.err.count("installed llama.cpp") == 1
    with tarfile.open(paths[0]) as tar:
        assert {"LICENSE", "README.md"} <= set(tar.getnames())
        assert {name for name in manifest["files"] if "/" in name} <= set(tar.getnames())


def test_a_package_of_no_known_commit_is_packed_again(
    archive: Path, bare: Doit, unpacked: Path, tmp_path: Path
) -> None:
    """Anyone's archive has no manifest: its llama-server's own version names it."""
    own = tmp_path / "anyones.tar"
    with tarfile.open(own, "w") as tar:
        tar.add(unpacked / "bin", "bin")
        tar.add(unpacked / "README.md", "README")
    bare("install_package", f"pkg={own}")
    paths = bare("package", "bins=package").out.splitlines()
    assert all(re.fullmatch(r"llama-cpp-[\w.+-]+", Path(path).name) for path in paths)
    bare("install_package", f"pkg={paths[0]}")


def test_one_for_this_very_processor_has_a_name_of_its_own(maker: Doit, archive: Path) -> None:
    before = archive.stat().st_mtime_ns
    paths = maker("package", "backend=cpu", "portable=0").out.splitlines()
    assert [Path(path).name for path in paths] == [
        f"{STEM}-cpu-native.tar.gz",
        f"{STEM}-cpu-native.zip",
    ]
    assert archive.stat().st_mtime_ns == before
    with tarfile.open(paths[0]) as tar:
        file = tar.extractfile("manifest.json")
        assert file is not None and json.load(file)["portable"] is False
    maker("clean", "package", "backend=cpu", "portable=0")
    assert packages(maker) == [f"{STEM}-cpu.tar.gz", f"{STEM}-cpu.zip"]
