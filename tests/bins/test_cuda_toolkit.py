"""The CUDA toolkit of wheels: what is asked of pip, and what is made of it, with small wheels."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
import subprocess
import zipfile
from pathlib import Path

import pytest
from msgspec.structs import replace

from pipeline.bins.compile import cuda_toolkit
from pipeline.bins.compile.cuda_toolkit import Toolkit
from pipeline.bins.hardware import cuda_versions, nvidia
from pipeline.bins.hardware.cuda_versions import (
    CUDA_13,
    LOWEST_CAPABILITY,
    LOWEST_DRIVER,
    CudaRelease,
)
from pipeline.core.errors import PipelineError
from pipeline.core.paths import Home
from pipeline.core.store import publish, receipts

posix = pytest.mark.skipif(os.name == "nt", reason="links, and a shell script stands in for nvcc")
LIBRARIES = ("libcudart.so.13", "libcublas.so.13", "libcublasLt.so.13")
KIT = Toolkit(root=Path("/where it/is"), version="13.4", major=13)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """A home, an empty cache, and a pip that can reach nothing but the folder `index`."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    (tmp_path / "index").mkdir()
    settings = tmp_path / "pip.conf"
    settings.write_text("[install]\nuser = true\n")  # as some distributions set it
    monkeypatch.setenv("PIP_CONFIG_FILE", str(settings))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("LLAMA_PIPELINE_CACHE", str(tmp_path / "cäche of all"))
    monkeypatch.setattr(cuda_toolkit, "INSTALLED_BYTES", 1)
    monkeypatch.setattr(cuda_toolkit, "DOWNLOAD_BYTES", 1)
    return Home(tmp_path / "home")


def wheel(tmp_path: Path, nvcc: str = "echo release 13.4, V13.4.92") -> CudaRelease:
    """A wheel with NVIDIA's folders, and the release that consists of it."""
    file = tmp_path / "index" / "some_cuda-1.0-py3-none-any.whl"
    info = "some_cuda-1.0.dist-info"
    with zipfile.ZipFile(file, "w") as archive:
        program = zipfile.ZipInfo("nvidia/cu13/bin/nvcc")
        program.external_attr = (stat.S_IFREG | 0o755) << 16
        archive.writestr(program, f"#!/bin/sh\n{nvcc}\n")
        for name in LIBRARIES:
            archive.writestr(f"nvidia/cu13/lib/{name}", name)
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: some-cuda\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    requirements = tmp_path / "some requirements.txt"
    requirements.write_text(f"some-cuda==1.0 --hash=sha256:{digest}\n")
    return CudaRelease(version="13.4", requirements=requirements)


def in_cache(tmp_path: Path) -> list[str]:
    """What the cache holds, without locks."""
    found = (tmp_path / "cäche of all").iterdir()
    return [path.name for path in found if path.suffix != ".lock"]


# The plan


@pytest.mark.parametrize(
    ("driver", "tag", "why"),
    [
        ("580.65.06", "linux-x64", ""),
        ("580", "linux-arm64", ""),
        ("610.1", "linux-x64", ""),
        ("", "linux-x64", ""),
        ("575.57.08", "linux-x64", "580 or newer; 575.57.08 is here"),
        ("540.4.0", "linux-arm64", "580 or newer; 540.4.0 is here"),
        ("unknown", "linux-x64", "580 or newer; unknown is here"),
        ("580.65", "windows-x64", "this is windows-x64"),
        ("", "macos-arm64", "this is macos-arm64"),
        ("580.65", "linux-ppc64le", "this is linux-ppc64le"),
    ],
)
def test_where_the_wheels_fit(driver: str, tag: str, why: str) -> None:
    assert cuda_versions.unavailable_reason(driver, tag).endswith(why)
    assert bool(cuda_versions.unavailable_reason(driver, tag)) == bool(why)


def test_the_release_is_one_that_the_house_knows() -> None:
    assert CUDA_13.major == 13
    assert CUDA_13.major in LOWEST_DRIVER and CUDA_13.major in LOWEST_CAPABILITY


def test_every_requirement_is_pinned_for_both_processors() -> None:
    text = CUDA_13.requirements.read_text(encoding="utf-8")
    assert "://" not in text
    locked = {
        name: (version, rest.count("--hash=sha256:"))
        for name, version, rest in re.findall(
            r"^([\w-]+)==(\S+) (.*?)(?=^\w|\Z)", text, re.M | re.S
        )
    }
    asked = CUDA_13.requirements.with_suffix(".in").read_text(encoding="utf-8")
    wanted = dict(re.findall(r"^([\w-]+)==(\S+)$", asked, re.M))
    assert {name: version for name, (version, _) in locked.items()} == wanted
    assert all(hashes >= 2 for _, hashes in locked.values())
    assert wanted["nvidia-cuda-nvcc"].startswith(f"{CUDA_13.version}.")


def test_its_place_follows_what_it_is_made_of(tmp_path: Path, home: Home) -> None:
    place = cuda_toolkit.folder(home, CUDA_13).path
    assert place.parent == tmp_path / "cäche of all"
    assert place == cuda_toolkit.folder(Home(tmp_path / "another"), CUDA_13).path
    other = tmp_path / "other.txt"
    other.write_text("nvidia-cuda-nvcc==13.5.37\n")
    others = [replace(CUDA_13, requirements=other), replace(CUDA_13, version="13.5")]
    assert len({place, *(cuda_toolkit.folder(home, release).path for release in others)}) == 3
    assert cuda_toolkit.toolkit(home, CUDA_13).nvcc == place / "nvidia/cu13/bin/nvcc"


def test_cmake_options() -> None:
    common = ("-DCUDAToolkit_ROOT=/where it/is", "-DCMAKE_CUDA_COMPILER=/where it/is/bin/nvcc")
    without = cuda_toolkit.cmake_options(KIT, None)
    assert without == common
    library = "/usr/lib/libcuda.so.1"
    linked = cuda_toolkit.cmake_options(KIT, Path(library))
    assert linked == (*common, f"-DCUDA_cuda_driver_LIBRARY={library}")


def test_runtime_libraries() -> None:
    names = [path.name for path in cuda_toolkit.runtime_libraries(KIT)]
    assert set(LIBRARIES) < set(names)
    assert "libnvrtc-builtins.so.13.4" in names
    assert {path.parent for path in cuda_toolkit.runtime_libraries(KIT)} == {KIT.root / "lib"}


# The driver's library

LDCONFIG = """
1234 libs found in cache `/etc/ld.so.cache'
\tlibcudart.so.13 (libc6,x86-64) => /opt/libcudart.so.13
\tlibcuda.so.1 (libc6) => /usr/lib/i386-linux-gnu/libcuda.so.1
\tlibcuda.so.1 (libc6,x86-64) => /usr/lib/x86_64-linux-gnu/libcuda.so.1
\tlibcuda.so.1 (libc6,x86-64, OS ABI: Linux 3.2.0) => /opt/a folder/libcuda.so.1
\tlibcuda.so (libc6,x86-64) => /usr/lib/x86_64-linux-gnu/libcuda.so
\tlibcuda.so.1 (libc6,AArch64) => /usr/lib/aarch64-linux-gnu/libcuda.so.1
Cache generated by: ldconfig (Debian GLIBC 2.36-9) stable release version 2.36
"""


@pytest.mark.parametrize(
    ("machine", "found"),
    [
        ("x86_64", ["/usr/lib/x86_64-linux-gnu/libcuda.so.1", "/opt/a folder/libcuda.so.1"]),
        ("aarch64", ["/usr/lib/aarch64-linux-gnu/libcuda.so.1"]),
        ("riscv64", []),
    ],
)
def test_the_drivers_library_for_this_machine(machine: str, found: list[str]) -> None:
    assert nvidia.listed_libraries(LDCONFIG, machine) == [Path(path) for path in found]
    assert nvidia.listed_libraries("", machine) == []


def test_the_drivers_library_is_there_or_none_is_named() -> None:
    library = nvidia.driver_library()
    assert library is None or library.is_file()


# The work


@posix
def test_made_once(tmp_path: Path, home: Home, capfd: pytest.CaptureFixture[str]) -> None:
    release = wheel(tmp_path)
    assert not cuda_toolkit.folder(home, release).is_current()
    kit = cuda_toolkit.make(release, home)
    assert capfd.readouterr().err.count("+ ") == 1
    assert cuda_toolkit.folder(home, release).is_current()
    assert in_cache(tmp_path) == [cuda_toolkit.folder(home, release).path.name]
    assert (kit.version, kit.major) == ("13.4", 13)
    assert subprocess.check_output([kit.nvcc], text=True) == "release 13.4, V13.4.92\n"
    for name in LIBRARIES:
        for folder in ("lib", "lib64"):
            link = kit.root / folder / name.removesuffix(".13")
            assert link.read_text() == name
            assert not link.readlink().is_absolute()
    assert not (cuda_toolkit.folder(home, release).path / "tmp").exists()

    assert cuda_toolkit.make(release, home, offline=True) == kit
    assert capfd.readouterr().err == ""

    (kit.root / "bin" / "stray").touch()
    before = kit.nvcc.stat()
    cuda_toolkit.make(release, home, force=True)
    after = kit.nvcc.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert not (kit.root / "bin" / "stray").exists()
    assert cuda_toolkit.folder(home, release).is_current()

    cuda_toolkit.folder(home, release).forget()
    assert not cuda_toolkit.folder(home, release).is_current()
    cuda_toolkit.folder(home, release).clean()
    cuda_toolkit.folder(home, release).clean()
    assert in_cache(tmp_path) == []


@posix
@pytest.mark.parametrize("left", ["part", "no receipt", "no compiler"])
def test_what_a_cut_run_left_is_mended(tmp_path: Path, home: Home, left: str) -> None:
    release = wheel(tmp_path)
    target = cuda_toolkit.folder(home, release).path
    if left == "part":
        (publish.part(target) / "nvidia").mkdir(parents=True)
    else:
        kit = cuda_toolkit.make(release, home)
        shutil.rmtree(kit.root) if left == "no compiler" else (target / receipts.FILE).unlink()
    assert not cuda_toolkit.folder(home, release).is_current()
    cuda_toolkit.make(release, home)
    assert cuda_toolkit.folder(home, release).is_current()
    assert in_cache(tmp_path) == [target.name]


@posix
def test_offline_says_what_is_missing(tmp_path: Path, home: Home) -> None:
    with pytest.raises(PipelineError, match=r"CUDA 13\.4 .* offline=1 forbids"):
        cuda_toolkit.make(wheel(tmp_path), home, offline=True)
    assert in_cache(tmp_path) == []


@posix
@pytest.mark.parametrize("force", [False, True])
def test_a_full_disk_is_told_beforehand(
    tmp_path: Path, home: Home, monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    release = wheel(tmp_path)
    if force:
        cuda_toolkit.make(release, home)
    monkeypatch.setattr(cuda_toolkit, "INSTALLED_BYTES", 10**18)
    with pytest.raises(PipelineError, match="are needed there"):
        cuda_toolkit.make(release, home, force=force)
    assert cuda_toolkit.folder(home, release).is_current() == force


@posix
@pytest.mark.parametrize("fault", ["other content", "no wheel"])
def test_what_cannot_be_installed_replaces_nothing(tmp_path: Path, home: Home, fault: str) -> None:
    release = wheel(tmp_path)
    kit = cuda_toolkit.make(release, home)
    (file,) = (tmp_path / "index").iterdir()
    if fault == "no wheel":
        file.unlink()
    else:
        with zipfile.ZipFile(file, "a") as archive:
            archive.writestr("more", "")
    with pytest.raises(PipelineError, match="could not be installed") as caught:
        cuda_toolkit.make(release, home, force=True)
    assert str(home.logs) in caught.value.hint
    assert kit.nvcc.exists() and cuda_toolkit.folder(home, release).is_current()
    assert in_cache(tmp_path) == [cuda_toolkit.folder(home, release).path.name]


@posix
@pytest.mark.parametrize("nvcc", ["exit 1", "echo release 13.3, V13.3.33"])
def test_a_compiler_that_is_no_good_is_not_published(tmp_path: Path, home: Home, nvcc: str) -> None:
    with pytest.raises(PipelineError, match="does not run here"):
        cuda_toolkit.make(wheel(tmp_path, nvcc), home)
    assert in_cache(tmp_path) == []


def test_a_clean_that_was_cut_leaves_no_toolkit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_PIPELINE_CACHE", str(tmp_path / "cache"))
    home = Home(tmp_path)
    nvcc = cuda_toolkit.toolkit(home, CUDA_13).nvcc
    nvcc.parent.mkdir(parents=True)
    nvcc.touch()
    stamp = cuda_toolkit.folder(home, CUDA_13).path / "toolkit"
    stamp.touch()
    entry = receipts.stamp(stamp, cuda_toolkit.folder(home, CUDA_13).recipe, seconds=0)
    receipts.save(stamp.parent, {stamp.name: entry})
    assert cuda_toolkit.folder(home, CUDA_13).is_current()

    def cut(folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", cut)
    with pytest.raises(KeyboardInterrupt):
        cuda_toolkit.folder(home, CUDA_13).clean()
    assert not cuda_toolkit.folder(home, CUDA_13).is_current()
