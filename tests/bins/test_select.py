"""Which backend is chosen, and why: out of written samples, and remembered for a real machine."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from machines import (
    A100,
    CUDA_PARTS,
    GTX,
    HEADERS,
    HIPCC,
    ICPX,
    LLVMPIPE,
    MISMATCH,
    NVCC,
    PROFILER,
    ROCMINFO,
    RTX,
    SLICES,
    SYCL,
    VULKAN_PARTS,
    linux,
    mac,
    ok,
    smi,
    vulkan,
)
from msgspec.structs import asdict, replace

from pipeline.bins.build_options import BACKENDS, SYSTEM, BuildOptions
from pipeline.bins.hardware import probe
from pipeline.bins.hardware import select as selection
from pipeline.bins.hardware.detect import Host, detect
from pipeline.bins.hardware.probe import Facts, ProbeOutput
from pipeline.bins.hardware.select import WHEELS, Selection, choose, parse, select
from pipeline.core.errors import PipelineError
from pipeline.core.paths import Home

posix = pytest.mark.skipif(os.name == "nt", reason="shell scripts stand in")
AUTO = BuildOptions(source="build")
HIP_PARTS = frozenset({"hipblas", "rocblas"})
AMD_TOOLS = {"rocminfo": ok(ROCMINFO), "hipcc": ok(HIPCC)}
INTEL_TOOLS = {"sycl-ls": ok(SYCL.format("level_zero:gpu:0")), "icpx": ok(ICPX)}
RADEON = LLVMPIPE.replace("TYPE_CPU", "TYPE_DISCRETE_GPU").replace(
    "llvmpipe (LLVM 15.0.6, 256 bits)", "Radeon RX 7900 XTX"
)
AMD_CARD = (("0x1002", "0x030000"),)
OLD_DRIVER = RTX.replace("580.65.06", "550.54.14")
OTHER_CARD = RTX.replace("RTX 4090, 8.9", "RTX 3090, 8.6")


def named(backend: str, **more: Any) -> BuildOptions:
    return AUTO.replace(backend=backend, **more)


def vulkan_tools() -> dict[str, Any]:
    """What `linux` takes to have everything for Vulkan."""
    outputs = {"vulkaninfo": ok(RADEON), "glslc": ok("shaderc v2023.2\n")}
    return {
        "outputs": outputs,
        "files": {"vulkan_core.h": HEADERS.format(4, 309)},
        "parts": VULKAN_PARTS,
    }


def everything() -> Host:
    """A machine that no shop sells."""
    own = vulkan_tools()
    outputs = {**own["outputs"], **smi(RTX, "13.0"), **AMD_TOOLS, **INTEL_TOOLS}
    parts = CUDA_PARTS | VULKAN_PARTS | HIP_PARTS | {"mkl"}
    return linux(outputs, files=own["files"], parts=parts)


def without(host: Host, *backends: str) -> Host:
    """The same machine without the cards of these backends."""
    cards = {"cuda": "nvidia", "hip": "amd", "sycl": "intel", "vulkan": "vulkan"}
    return replace(host, **{cards[name]: () for name in backends}, vendors=frozenset())


# Every backend, in their order


def test_the_order() -> None:
    order, gone, host = [], [], everything()
    while (found := choose(without(host, *gone), AUTO)).backend != "cpu":
        assert found.missing_device == found.missing_tools == ()
        order.append((found.backend, found.why))
        gone.append(found.backend)
    assert order == [
        ("cuda", "NVIDIA GeForce RTX 4090 (8.9), driver 580.65.06"),
        ("hip", "Radeon RX 7900 XTX (gfx1100)"),
        ("sycl", "Intel(R) Arc(TM) A770 Graphics"),
        ("vulkan", "Radeon RX 7900 XTX"),
    ]
    assert found.why == "no graphics card is here"
    assert found.warnings == ()


def test_what_is_compiled_for() -> None:
    host = everything()
    assert choose(host, AUTO).cards == ("8.9",)
    assert choose(host, AUTO).tools == {"nvcc": ("/usr/bin/it", "13.0")}
    hip = choose(host, named("hip"))
    assert (hip.cards, hip.tools["hipcc"][1]) == (("gfx1100",), "6.2.41133")
    assert choose(host, named("vulkan")).tools == {
        "glslc": ("/usr/bin/it", "2023.2"),
        "vulkan headers": ("", "1.4.309"),
    }
    assert choose(host, named("sycl")).tools["icpx"][1] == "2024.1.0"


def test_metal() -> None:
    tools = {"xcode-select": ok("/Library/Developer\n"), "system_profiler": ok(PROFILER)}
    found = choose(mac(tools), AUTO)
    assert (found.backend, found.why, found.warnings) == ("metal", "Apple M2 (Metal 3)", ())
    found = choose(mac({"system_profiler": ok(PROFILER)}), AUTO)
    assert found.backend == "cpu"
    assert "metal is not used; missing: the Xcode command line tools" in found.warnings[1]


def test_rosetta() -> None:
    tools = {"xcode-select": ok("/Library/Developer\n"), "system_profiler": ok(PROFILER)}
    found = choose(mac({**tools, "sysctl": ok("sysctl.proc_translated: 1\n")}), AUTO)
    assert found.backend == "metal"
    assert "Rosetta" in found.warnings[0]


# Software devices


def test_a_device_of_software_is_for_those_who_ask_for_it() -> None:
    host = vulkan((4, 309), LLVMPIPE)
    found = choose(host, AUTO)
    assert (found.backend, found.why, found.warnings) == ("cpu", "no graphics card is here", ())
    found = choose(host, named("vulkan"))
    found.require_device()
    found.require_tools()
    assert found.why.startswith("llvmpipe")
    assert "software" in found.warnings[0]


# CUDA's toolkits


def test_a_driver_without_toolkit_takes_the_wheels() -> None:
    found = choose(linux(smi(RTX)), AUTO)
    assert (found.backend, found.toolkit, found.warnings) == ("cuda", WHEELS, ())
    assert (found.cards, found.tools) == (("8.9",), {"nvcc": ("", "13.4")})
    found = choose(linux(smi(RTX)), AUTO.replace(toolkit=SYSTEM))
    assert (found.backend, len(found.warnings)) == ("cpu", 2)
    assert "cuda is not used; missing: the CUDA toolkit (nvcc): apt install" in found.warnings[1]


def test_nvcc_without_its_libraries() -> None:
    host = linux(smi(RTX, "13.0"))
    assert choose(host, AUTO).toolkit == WHEELS
    found = choose(host, named("cuda", toolkit=SYSTEM))
    assert found.missing_device == ()
    with pytest.raises(PipelineError) as caught:
        found.require_tools()
    for text in ("cuBLAS for CUDA 13.0: apt install libcublas", "the libcuda stub", "doctor"):
        assert text in str(caught.value)
    whole = choose(linux(smi(RTX, "13.0"), parts=CUDA_PARTS, cuda="/usr/local/cuda"), AUTO)
    assert (whole.toolkit, whole.toolkit_folder) == (SYSTEM, "/usr/local/cuda")


def test_a_card_older_than_toolkit_and_wheels() -> None:
    found = choose(linux(smi(GTX, "13.0"), parts=CUDA_PARTS), AUTO)
    assert found.backend == "cpu"
    assert "an older toolkit for NVIDIA GeForce GTX 1080 (6.1)" in found.warnings[1]
    assert choose(linux(smi(GTX)), AUTO).backend == "cpu"
    assert choose(linux(smi(GTX, "12.4"), parts=CUDA_PARTS), AUTO).cards == ("6.1",)


def test_a_driver_older_than_the_wheels() -> None:
    found = choose(linux(smi(OLD_DRIVER)), AUTO)
    assert found.backend == "cpu"
    assert "the CUDA toolkit (nvcc)" in found.warnings[1]
    assert "driver 580 or newer for NVIDIA's wheels instead; 550.54.14 is here" in found.warnings[1]
    assert choose(linux(smi(OLD_DRIVER, "12.4"), parts=CUDA_PARTS), AUTO).toolkit == SYSTEM


@pytest.mark.parametrize("nvcc", ["13.0", ""], ids=["toolkit", "wheels"])
def test_two_cards(nvcc: str) -> None:
    parts = CUDA_PARTS if nvcc else frozenset[str]()
    assert choose(linux(smi(RTX + OTHER_CARD, nvcc), parts=parts), AUTO).cards == ("8.6", "8.9")
    found = choose(linux(smi(RTX + GTX, nvcc), parts=parts), AUTO)
    assert (found.backend, found.cards) == ("cuda", ("8.9",))
    (warning,) = found.warnings
    assert warning.startswith("NVIDIA GeForce GTX 1080 (6.1) is left out")
    made_elsewhere = choose(
        linux(smi(RTX + GTX, nvcc), parts=parts), BuildOptions(source="prebuilt")
    )
    assert (made_elsewhere.backend, made_elsewhere.warnings) == ("cuda", ())


def test_mig() -> None:
    found = choose(linux(smi(A100, "13.0", SLICES), parts=CUDA_PARTS), AUTO)
    assert (found.backend, found.cards) == ("cuda", ("8.0",))
    found = choose(linux(smi(A100, "13.0"), parts=CUDA_PARTS), AUTO)
    assert found.backend == "cpu"
    assert "a MIG slice: MIG is on, but has no slice" in found.warnings[1]


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (ProbeOutput(path="/x", status=-1, hung=True), "gave no answer in 5 s"),
        (ok(MISMATCH), "Driver/library version mismatch"),
        (ok("No devices were found\n"), "No devices were found"),
    ],
)
def test_nvidia_smi_that_does_not_list(answer: ProbeOutput, says: str) -> None:
    found = choose(linux({"nvidia-smi": answer}), AUTO)
    assert (found.backend, found.why) == ("cpu", "no usable graphics card is here")
    assert found.warnings[0] == "falling back to CPU: the GPU cannot be used"
    assert f"nvidia-smi: {says}" in found.warnings[1].replace("Failed to initialize NVML: ", "")


def test_wsl() -> None:
    kernel = {"kernel": "5.15.153.1-microsoft-standard-WSL2\n"}
    assert choose(linux(smi(RTX), files=kernel), AUTO).toolkit == WHEELS
    found = choose(linux(files=kernel), named("cuda"))
    with pytest.raises(PipelineError, match="installed in Windows"):
        found.require_device()


def test_jetson_never_takes_the_wheels() -> None:
    files = {"device-tree": "NVIDIA Jetson AGX Orin\0", "tegra": "# R36 (release), REVISION: 3.0"}
    facts = Facts(system="linux", machine="arm64", family="debian", files=files)
    compiler = {"g++": ok("g++ 12.2.0")}
    nvcc = {"nvcc": ok(NVCC.format("12.6"))}
    found = choose(detect(replace(facts, outputs=compiler)), named("cuda"))
    assert (found.toolkit, found.missing_device) == (SYSTEM, ())
    assert found.missing_tools == (
        "the CUDA toolkit (nvcc): apt install cuda-toolkit (of NVIDIA's repository)",
    )
    found = choose(detect(replace(facts, outputs={**compiler, **nvcc}, parts=CUDA_PARTS)), AUTO)
    assert (found.backend, found.cards) == ("cuda", ("8.7",))


# AMD


def test_an_amd_card_without_rocm() -> None:
    found = choose(linux(pci=AMD_CARD, **vulkan_tools()), AUTO)
    assert (found.backend, found.why) == ("vulkan", "Radeon RX 7900 XTX")
    (warning,) = found.warnings
    assert warning.startswith("hip is not used; missing: AMD's compute driver")
    assert "hipcc of ROCm: apt install rocm" in warning
    found = choose(linux(pci=AMD_CARD), AUTO)
    assert found.backend == "cpu"
    assert [w.partition(" ")[0] for w in found.warnings] == ["falling", "hip", "vulkan"]


# Asked for by name


@pytest.mark.parametrize(
    ("backend", "says"),
    [
        ("cuda", "an NVIDIA card with its driver"),
        ("metal", "macOS"),
        ("hip", "an AMD card"),
        ("sycl", "an Intel graphics card"),
        ("vulkan", "a Vulkan device: vulkaninfo, .*: apt install vulkan-tools"),
    ],
)
def test_no_device_for_what_is_asked_for(backend: str, says: str) -> None:
    found = choose(linux(), named(backend))
    with pytest.raises(PipelineError, match=f"backend={backend} is not possible here") as caught:
        found.require_device()
    assert "backend=cpu always works" in caught.value.hint
    with pytest.raises(PipelineError, match=says):
        found.require_device()


def test_no_tools_for_what_is_asked_for() -> None:
    cases = [
        (linux({"rocminfo": ok(ROCMINFO)}), "hip", "hipcc of ROCm: apt install rocm"),
        (linux({"sycl-ls": INTEL_TOOLS["sycl-ls"]}), "sycl", "oneMKL: apt install intel-oneapi"),
        (vulkan((3, 239)), "vulkan", "1.3.239 are here: libvulkan-dev of Debian 13"),
    ]
    for host, backend, says in cases:
        found = choose(host, named(backend))
        found.require_device()
        with pytest.raises(PipelineError) as caught:
            found.require_tools()
        assert says in caught.value.message
        # what is not compiled needs no tools
        choose(host, named(backend, source="prebuilt")).require_tools()


# For other machines


@pytest.mark.parametrize("wish", [{"portable": True}, {"architectures": "90"}])
@pytest.mark.parametrize("cards", ["", OLD_DRIVER, GTX], ids=["none", "driver", "old"])
def test_what_is_for_elsewhere_needs_no_card_here(wish: dict[str, Any], cards: str) -> None:
    host = linux(smi(cards) if cards else {})
    found = choose(host, named("cuda", **wish))
    found.require_tools()
    assert found.toolkit == WHEELS
    assert found.missing_device, "it is not to be tried here"
    assert choose(linux(smi(RTX)), named("cuda", **wish)).missing_device == ()


def test_auto_is_for_here_also_where_it_is_portable() -> None:
    assert choose(linux(smi(OLD_DRIVER)), AUTO.replace(portable=True)).backend == "cpu"
    assert choose(linux(smi(RTX)), AUTO.replace(portable=True)).backend == "cuda"


# Any machine at all


def test_every_wish_has_an_answer_on_every_machine() -> None:
    hosts = [everything(), linux(), mac(), vulkan((3, 239)), linux(smi(GTX)), linux(smi(A100))]
    hosts += [detect(Facts(system="windows", machine="x64")), linux({"nvcc": ok("nonsense")})]
    for host in (*hosts, linux({**smi(RTX), "nvcc": ok("nonsense")})):
        for backend in BACKENDS:
            for more in ({}, {"portable": True}, {"toolkit": SYSTEM}, {"source": "prebuilt"}):
                found = choose(host, named(backend, **more))
                assert found.backend in (backend, *BACKENDS[1:])
                assert parse(json.loads(json.dumps(asdict(found)))) == found


# Remembered


class Machine:
    """Programs on PATH that write down that they were run, and a home."""

    def __init__(self, folder: Path) -> None:
        self.programs, self.runs, self.home = folder / "prög rams", folder / "runs", folder / "home"
        self.programs.mkdir()
        (self.home / "run").mkdir(parents=True)
        self.program("g++", "echo g++ 12.2.0")
        self.program("nvidia-smi")
        self.program("vulkaninfo")

    def program(self, name: str, script: str = "exit 1") -> None:
        path = self.programs / name
        path.write_text(f'#!/bin/sh\necho {name} >>"{self.runs}"\n{script}\n')
        path.chmod(0o755)

    def select(self, wish: BuildOptions = AUTO) -> tuple[Selection, bool]:
        """The choice, and whether the machine was looked at for it."""
        self.runs.unlink(missing_ok=True)
        found = select(wish, Home(self.home))
        return found, self.runs.exists()


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    for name in probe.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    here = Machine(tmp_path)
    monkeypatch.setenv("PATH", str(here.programs))
    monkeypatch.setattr(probe, "BESIDE_PATH", ())
    return here


@posix
def test_the_machine_is_looked_at_once(machine: Machine) -> None:
    first, looked = machine.select()
    assert (first.backend, looked) == ("cpu", True)
    assert any("nvidia-smi: ended with 1" in warning for warning in first.warnings)
    assert machine.select() == (first, False)
    assert machine.select(named("cpu")) == (Selection(backend="cpu", why="requested"), False)
    other = AUTO.replace(toolkit=SYSTEM)
    assert machine.select(other)[1]
    assert not machine.select(other)[1] and not machine.select()[1]
    assert machine.select(AUTO.replace(portable=True))[1]
    selection.forget(Home(machine.home))
    assert machine.select()[1]


@posix
def test_it_is_looked_at_anew_when_it_changes(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first, _ = machine.select()
    assert not machine.select()[1]
    machine.program("nvidia-smi", f"echo '{RTX.strip()}'")
    found, looked = machine.select()
    assert looked and found != first
    assert not machine.select()[1]
    machine.program("hipcc", "echo HIP version: 6.2.4")
    assert machine.select()[1] and not machine.select()[1]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert machine.select()[1] and not machine.select()[1]
    monkeypatch.setenv("PATH", f"{machine.programs}{os.pathsep}{tmp_path}")
    assert not machine.select()[1], "the same programs are found"
    sdk = tmp_path / "sdk" / "lib"
    sdk.mkdir(parents=True)
    monkeypatch.setenv("VULKAN_SDK", str(sdk.parent))
    assert machine.select()[1] and not machine.select()[1]
    (sdk / "libvulkan.so").touch()  # a part that was missing
    assert machine.select()[1] and not machine.select()[1]
    monkeypatch.delenv("VULKAN_SDK")
    assert machine.select()[1], "what other states led to is not kept"


@posix
def test_what_may_be_mended_soon_is_not_remembered(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.program("nvidia-smi", "exec /bin/sleep 20")
    with monkeypatch.context() as patience:
        patience.setattr(probe, "TIMEOUT", 1)
        patience.setattr(probe, "PATIENCE", 1.5)
        found, looked = machine.select()
        assert looked and any("gave no answer" in warning for warning in found.warnings)
        assert machine.select()[1]
    machine.program("nvidia-smi")
    lacking = named("hip")
    assert machine.select(lacking)[1]
    machine.program("rocminfo", f"/bin/cat <<'END'\n{ROCMINFO}\nEND")
    assert machine.select(lacking)[0].missing_tools
    assert machine.select(lacking)[1]


@posix
@pytest.mark.parametrize(
    "damage",
    [
        "",
        "{",
        "[]",
        "null",
        '"x"',
        "\udcff\udcfe",
        "[" * 100_000,
        '{"machine": "M", "choices": 1}',
        '{"machine": "M", "choices": {"Q": null}}',
        '{"machine": "M", "choices": {"Q": {"backend": "cpu"}}}',
        '{"machine": "M", "choices": {"Q": [1]}}',
        '{"machine": ["M"], "choices": {}}',
        '{"x": {"backend": "cpu", "tools": {}}}',
    ],
)
def test_a_damaged_memory_is_none(machine: Machine, damage: str) -> None:
    first, _ = machine.select()
    book = machine.home / "run" / "backends.json"
    told = json.loads(book.read_text())
    (question,) = told["choices"]
    text = damage.replace('"M"', json.dumps(told["machine"])).replace('"Q"', json.dumps(question))
    book.write_text(text, encoding="utf-8", errors="surrogateescape")
    assert machine.select() == (first, True)
    assert machine.select() == (first, False)


@pytest.mark.parametrize(
    "change",
    [
        {"backend": 5},
        {"backend": "quantum"},
        {"backend": None},
        {"why": []},
        {"tools": {"nvcc": "x"}},
        {"tools": []},
        {"cards": "8.9"},
        {"libcuda": ["/x"]},
        {"of another version": 1},
    ],
)
def test_what_is_no_selection(change: dict[str, Any]) -> None:
    plain = json.loads(json.dumps(asdict(Selection(backend="cuda", tools={"nvcc": ("/x", "1")}))))
    assert parse(plain) is not None
    assert parse({**plain, **change}) is None
    assert parse({n: v for n, v in plain.items() if n != "why"}) is None


@posix
def test_a_home_that_cannot_be_written(machine: Machine) -> None:
    (machine.home / "run").rmdir()
    (machine.home / "run").touch()  # root may write everywhere else
    first, looked = machine.select()
    assert looked and first.backend == "cpu"
    assert machine.select() == (first, True)


@posix
def test_looking_makes_no_home(machine: Machine) -> None:
    (machine.home / "run").rmdir()
    assert machine.select()[1] and machine.select()[1]
    assert list(machine.home.iterdir()) == []


@posix
def test_two_at_once(machine: Machine) -> None:
    wishes = [AUTO, AUTO.replace(toolkit=SYSTEM)] * 4
    with ThreadPoolExecutor(len(wishes)) as pool:
        found = list(pool.map(lambda wish: select(wish, Home(machine.home)), wishes))
    assert {one.backend for one in found} == {"cpu"}
    assert len({str(asdict(one)) for one in found[::2]}) == 1
    first, _ = machine.select()
    assert first == found[0]
    assert machine.select() == (first, False)
