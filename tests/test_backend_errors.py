"""A backend that is asked for and not possible: one clear error, at once, and nothing made."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from conftest import Doit

from pipeline.bins.binaries import program_file
from pipeline.bins.hardware import probe

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("g++"), reason="shell scripts stand in for tools"
)
PROGRAMS = {
    "nvcc": "echo 'Cuda compilation tools, release 13.0, V13.0.88'",
    "vulkaninfo": "echo 'deviceType = PHYSICAL_DEVICE_TYPE_CPU'; echo 'deviceName = llvmpipe'",
    "rocminfo": "echo no ROCk module >&2; exit 1",
}
TOOLKIT_HERE = pytest.mark.skipif(
    {"cublas", "libcuda"} <= probe.cuda_parts(""), reason="the system has all of CUDA's libraries"
)


@pytest.fixture
def here(bare: Doit, tmp_path: Path) -> Doit:
    """A machine with a compiler, and with programs that say that no card is there."""
    folder = tmp_path / "programs"
    folder.mkdir()
    for name, script in PROGRAMS.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    for name in ("g++", "git", "sh"):
        if found := shutil.which(name):
            (folder / name).symlink_to(found)
    for name in ("CXX", "CUDA_PATH", "CUDA_HOME", "ROCM_PATH", "VULKAN_SDK"):
        bare.env.pop(name, None)
    # nor does a toolkit that was fetched before count
    bare.env |= {"PATH": str(folder), "LLAMA_PIPELINE_CACHE": str(tmp_path / "cache")}
    return bare


def nothing_was_made(doit: Doit) -> None:
    made = {path.name for path in doit.home.rglob("*") if path.is_file()}
    looked_up = {"backends.json", "compilers.json", ".compilers.json.lock"}  # kept for the next run
    assert made <= looked_up


@pytest.mark.parametrize("backend", ["cuda", "metal", "hip", "sycl", "vulkan"])
@pytest.mark.parametrize(
    "words", [["build_bins"], ["serve", "model=demo-embed"]], ids=lambda w: w[0]
)
def test_not_possible_here(here: Doit, words: list[str], backend: str) -> None:
    run = here(*words, f"backend={backend}", status=1, timeout=60)
    assert run.err.count("error: ") == 1
    assert f"backend={backend} is not possible here; missing:\n  " in run.err
    assert "hint: doit doctor lists what is here" in run.err
    assert "Traceback" not in run.err and run.out == ""
    assert run.steps == []
    nothing_was_made(here)


@pytest.mark.parametrize("backend", ["cuda", "metal", "vulkan"])
def test_no_plan_of_what_cannot_run(here: Doit, backend: str) -> None:
    run = here("plan", "model=demo-embed", f"backend={backend}", status=1, timeout=60)
    assert f"backend={backend} is not possible here; missing:\n  " in run.err
    assert run.out == "" and "Traceback" not in run.err


def test_tools_are_named_with_their_packages(here: Doit) -> None:
    run = here("build_bins", "backend=vulkan", status=1, timeout=60)
    assert "\n  glslc" in run.err
    if shutil.which("apt-get"):
        assert "apt install glslc" in run.err


@TOOLKIT_HERE
def test_the_systems_toolkit_lacks_parts(here: Doit) -> None:
    words = ("cuda_toolkit=system", "cuda_architectures=90")
    run = here("build_bins", *words, status=1, timeout=60)
    assert "backend=cuda is not possible here" in run.err
    assert "cuBLAS for CUDA 13.0" in run.err or "libcuda stub of CUDA 13.0" in run.err
    nothing_was_made(here)


@TOOLKIT_HERE
def test_for_another_machine_nvidias_wheels_are_taken(here: Doit) -> None:
    told = here("plan", "model=demo-embed", "cuda_architectures=90", "format=json").json()
    assert told["backend"] == "cuda"
    (step,) = [step for step in told["steps"] if step["name"] == "cuda_toolkit"]
    assert step["state"] == "to do" and "NVIDIA's wheels" in step["what"]
    assert told["download_bytes"] > 500_000_000
    run = here("cuda_toolkit", "cuda_architectures=90", "offline=1", status=1, timeout=60)
    assert "offline=1 forbids downloading it" in run.err and "Traceback" not in run.err


def test_auto_says_why_a_card_is_not_used(here: Doit) -> None:
    smi = Path(here.env["PATH"]) / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'Failed to initialize NVML: Unknown Error'\n")
    smi.chmod(0o755)
    told = here("plan", "model=demo-embed", "format=json").json()
    assert told["backend"] == "cpu"
    assert told["warnings"][0] == "falling back to CPU: the GPU cannot be used"
    assert any("nvidia-smi: Failed to initialize NVML" in text for text in told["warnings"])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["cuda_toolkit=/no/such"], ["cuda_toolkit=/no/such", "bin/nvcc"]),
        (["cuda_architectures=sm_90"], ["cuda_architectures=sm_90", "86-real"]),
        (["cuda_architectures=90", "backend=vulkan"], ["cuda_architectures=", "backend=vulkan"]),
        (["jobs=0"], ["jobs=0", "from 1 to 1024"]),
        (["portable=1", "bins=prebuilt"], ["portable", "bins=prebuilt"]),
    ],
)
def test_wrong_usage(here: Doit, words: list[str], says: list[str]) -> None:
    wrong = here("build_bins", *words, status=3, timeout=60)
    for text in says:
        assert text in wrong.err
    assert "Traceback" not in wrong.err and list(here.home.iterdir()) == []


def test_programs_of_the_users_own_are_not_packed(bare: Doit, tmp_path: Path) -> None:
    own = tmp_path / "öwn"
    own.mkdir()
    (own / program_file("llama-server")).touch()
    bare.env["LLAMA_SERVER_BINS_DIR"] = str(own)
    wrong = bare("package", status=3)
    assert "LLAMA_SERVER_BINS_DIR names programs of your own" in wrong.err
    assert "Traceback" not in wrong.err


def test_packed_programs_of_another_backend(bare: Doit, tmp_path: Path) -> None:
    """As in a container's image: nothing is served on a CPU that was to be served on a card."""
    own = tmp_path / "öwn" / "bin"
    own.mkdir(parents=True)
    (own / program_file("llama-server")).touch()
    (own.parent / "manifest.json").write_text('{"backend": "cpu"}')
    bare.env["LLAMA_SERVER_BINS_DIR"] = str(own)
    wrong = bare("plan", "model=demo", "backend=cuda", status=3)
    assert f"backend=cuda: the programs in {own} are for cpu" in wrong.err
    assert "are for cpu" not in bare("plan", "model=demo", "backend=cpu", status=None).err


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["build_bins"], 3),
        (["plan", "model=demo-embed"], 3),
        (["up", "config={config}"], 3),
        (["ps", "config={config}"], 0),
        (["list"], 0),
    ],
)
def test_a_folder_without_programs(
    bare: Doit, tmp_path: Path, words: list[str], status: int
) -> None:
    """It is an error of what would use them, and of nothing else."""
    bare.env["LLAMA_SERVER_BINS_DIR"] = str(tmp_path / "nö")
    config = tmp_path / "one.toml"
    config.write_text('[instance.a.model]\nref = "demo-embed"\n', encoding="utf-8")
    done = bare(*(word.format(config=config) for word in words), status=status)
    assert ("there is no llama-server in it" in done.err) is (status == 3)
    assert "Traceback" not in done.err
