"""Machines out of written samples of what their tools print, and what each backend lacks there."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from machines import (
    A100,
    CUDA_PARTS,
    GLSLC,
    GPP,
    GTX,
    HIPCC,
    ICPX,
    INTEL_MAC,
    LLVMPIPE,
    M2,
    MISMATCH,
    NO_DRIVER,
    NVCC,
    PROFILER,
    ROCMINFO,
    RTX,
    SLICES,
    SYCL,
    lacks,
    linux,
    mac,
    of,
    ok,
    smi,
    vulkan,
)

from pipeline.bins.hardware import nvidia, probe, providers, requirements
from pipeline.bins.hardware.detect import Host, apple, detect
from pipeline.bins.hardware.nvidia import MIB
from pipeline.bins.hardware.probe import Facts, ProbeOutput
from pipeline.bins.hardware.requirements import MISSING, USABLE, Report

posix = pytest.mark.skipif(os.name == "nt", reason="shell scripts stand in")

# The processor

CPUINFO = "processor\t: 0\nmodel name\t: {}\nflags\t\t: {}\n\nprocessor\t: 1\nflags\t\t: avx512f\n"


@pytest.mark.parametrize(
    ("flags", "features"),
    [
        ("fpu sse2", ()),
        ("sse2 avx avx2 fma f16c", ("AVX2", "FMA", "F16C")),
        ("avx2 avx_vnni", ("AVX2", "AVX-VNNI")),
        (
            "avx2 avx512f avx512_vnni avx512_bf16 amx_bf16 amx_tile amx_int8",
            ("AVX2", "AVX-512", "AVX512-VNNI", "AVX512-BF16", "AMX"),
        ),
    ],
)
def test_features_of_x86(flags: str, features: tuple[str, ...]) -> None:
    host = linux(files={"cpuinfo": CPUINFO.format("AMD EPYC: 9", flags)})
    assert (host.cpu, host.features) == ("AMD EPYC: 9", features)


def test_features_of_arm() -> None:
    text = "processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd asimddp sve i8mm bf16 sve2\n\n"
    host = linux(files={"cpuinfo": text}, processor="aarch64")
    assert host.cpu == "aarch64"
    assert host.features == ("NEON", "DOTPROD", "I8MM", "BF16", "SVE", "SVE2")


def test_features_of_a_mac() -> None:
    host = mac({"sysctl": ok(M2)})
    assert (host.cpu, host.rosetta) == ("Apple M2", False)
    assert host.features == ("NEON", "DOTPROD", "I8MM", "BF16")
    text = "machdep.cpu.brand_string: Intel(R) Core(TM) i7\nmachdep.cpu.leaf7_features: BMI1 AVX2\n"
    unknown = ProbeOutput(path="sysctl", status=1, out=text, err="sysctl: unknown oid")
    assert mac({"sysctl": unknown}).features == ("AVX2",)


def test_nothing_is_known_of_an_empty_machine() -> None:
    host = detect(Facts(system="windows", machine="x64"))
    assert {v.state for v in requirements.reports(host)} == {MISSING}
    assert (host.cpu, host.features, host.tools) == ("", (), {})


# Versions


@pytest.mark.parametrize(
    ("name", "out", "version"),
    [
        ("g++", GPP, "12.2.0"),
        ("g++", "g++ (Ubuntu 13.2.0-23ubuntu4) 13.2.0", "13.2.0"),
        ("clang++", "Debian clang version 14.0.6\nTarget: x86_64", "14.0.6"),
        ("clang++", "Apple clang version 15.0.0 (clang-1500.3.9.4)", "15.0.0"),
        ("nvcc", NVCC.format("13.0"), "13.0"),
        ("hipcc", HIPCC, "6.2.41133"),
        ("icpx", ICPX, "2024.1.0"),
        ("glslc", GLSLC, "2023.2"),
        ("node", "v20.20.2", "20.20.2"),
        ("ccache", "ccache version 4.7.5\nFeatures: x", "4.7.5"),
        (
            "cl",
            "Microsoft (R) C/C++ Optimizing Compiler Version 19.38.33134 for x64",
            "19.38.33134",
        ),
        ("gcc", "something else", "something else"),
    ],
)
def test_versions(name: str, out: str, version: str) -> None:
    assert linux({name: ok(out)}).tools[name].version == version
    assert linux({name: ok(err=out)}).tools[name].version == version


def test_a_tool_that_fails_or_hangs_is_a_problem_and_no_tool() -> None:
    failed = ProbeOutput(path="/x", status=3, err="\n  cannot run  \nmore")
    host = linux({"node": failed, "glslc": ProbeOutput(path="/x", status=-1, hung=True)})
    assert host.problems == {"node": "cannot run", "glslc": "gave no answer in 5 s"}
    assert set(host.tools) == {"g++"}


# cpu


def test_cpu_needs_a_compiler() -> None:
    assert of(linux(), "cpu") == Report(backend="cpu", has_card=True)
    assert of(linux(), "cpu").state == USABLE
    assert lacks(detect(Facts(system="linux", machine="x64")), "cpu") == "a C++ compiler"


def test_the_compiler_that_cxx_names_is_the_only_one() -> None:
    assert "CXX names (icc -O)" in lacks(linux(cxx="icc -O"), "cpu")
    assert of(linux({"CXX": ok("icc 1.0")}, cxx="icc -O"), "cpu").state == USABLE


# cuda


def test_everything_for_cuda_is_here() -> None:
    host = linux(smi(RTX, "13.0"), parts=CUDA_PARTS)
    (card,) = host.nvidia
    assert (card.capability, card.driver, card.total) == ("8.9", "580.65.06", 24564 * MIB)
    assert of(host, "cuda") == Report(backend="cuda", has_card=True)
    assert of(host, "cuda").state == USABLE


def toolkit_lacks(host: Host) -> list[str]:
    """What of the toolkit is missing; NVIDIA's wheels stand in for it, which a note says."""
    missing = [lack.what for lack in requirements.missing_toolkit(host)[0]]
    report = of(host, "cuda")
    assert report.state == USABLE
    assert report.notes[-1].startswith(f"without {' and '.join(missing)} NVIDIA's wheels of CUDA")
    return missing


def test_driver_without_toolkit() -> None:
    assert toolkit_lacks(linux(smi(RTX))) == ["the CUDA toolkit (nvcc)"]
    old = RTX.replace("580.65.06", "550.54.14")  # too old for the wheels
    assert lacks(linux(smi(old)), "cuda") == "the CUDA toolkit (nvcc)"


def test_toolkit_without_driver() -> None:
    host = linux({"nvcc": ok(NVCC.format("13.0"))}, parts=CUDA_PARTS)
    assert lacks(host, "cuda") == "an NVIDIA card with its driver"
    host = linux({"nvcc": ok(NVCC.format("13.0"))}, parts=CUDA_PARTS, pci=(("0x10de", "0x030200"),))
    assert lacks(host, "cuda") == "the NVIDIA driver for the card that is here"
    sound = linux(pci=(("0x10de", "0x040300"),))  # a card's other function
    assert lacks(sound, "cuda") == "an NVIDIA card with its driver"


@pytest.mark.parametrize(
    ("parts", "missing"),
    [
        (set(), ["cuBLAS for CUDA 13.0", "the libcuda stub of CUDA 13.0"]),
        ({"libcuda"}, ["cuBLAS for CUDA 13.0"]),
        ({"cublas"}, ["the libcuda stub of CUDA 13.0"]),
    ],
)
def test_nvcc_is_not_a_toolkit(parts: set[str], missing: list[str]) -> None:
    host = linux(smi(RTX, "13.0"), parts=frozenset(parts))
    assert toolkit_lacks(host) == missing


def test_card_older_than_the_toolkit_supports() -> None:
    host = linux(smi(GTX, "13.0"), parts=CUDA_PARTS)
    assert lacks(host, "cuda") == (
        "an older toolkit for NVIDIA GeForce GTX 1080 (6.1): CUDA 13 compiles for 7.5 and newer"
    )
    assert of(linux(smi(GTX, "12.4"), parts=CUDA_PARTS), "cuda").state == USABLE


def test_card_newer_than_the_toolkit() -> None:
    text = "NVIDIA GeForce RTX 5090, 12.0, 580.65.06, [N/A], 32607\n"
    host = linux(smi(text, "12.4"), parts=CUDA_PARTS)
    assert toolkit_lacks(host) == ["CUDA 12.8 or newer for NVIDIA GeForce RTX 5090 (12.0)"]
    assert of(linux(smi(text, "12.8"), parts=CUDA_PARTS), "cuda").state == USABLE


def test_driver_older_than_the_toolkit() -> None:
    text = RTX.replace("580.65.06", "550.54.14")
    host = linux(smi(text, "13.0"), parts=CUDA_PARTS)
    assert lacks(host, "cuda") == "driver 580 or newer for CUDA 13; 550.54.14 is here"
    assert of(linux(smi(text, "12.4"), parts=CUDA_PARTS), "cuda").state == USABLE


def test_two_cards_of_different_capability() -> None:
    report = of(linux(smi(RTX + GTX, "12.4"), parts=CUDA_PARTS), "cuda")
    assert report.state == USABLE
    assert report.notes == ("cards of different compute capability: 6.1, 8.9",)
    report = of(linux(smi(RTX + GTX, "13.0"), parts=CUDA_PARTS), "cuda")
    assert report.state == USABLE
    assert report.notes[0].startswith("NVIDIA GeForce GTX 1080 (6.1) is left out")


def test_mig_slices() -> None:
    host = linux(smi(A100, "13.0", SLICES), parts=CUDA_PARTS)
    assert host.slices == ("3g.20gb", "1g.5gb")
    assert of(host, "cuda").state == USABLE
    assert of(host, "cuda").notes == ("MIG slices: 3g.20gb, 1g.5gb",)
    without = linux(smi(A100, "13.0", SLICES.splitlines()[0]), parts=CUDA_PARTS)
    assert "MIG is on, but has no slice" in lacks(without, "cuda")


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (ProbeOutput(path="/x", status=-1, hung=True), "gave no answer in 5 s"),
        (ok(MISMATCH), "Failed to initialize NVML: Driver/library version mismatch"),
        (ok(NO_DRIVER), NO_DRIVER.strip()),
        (ok("No devices were found\n"), "No devices were found"),
        (ok("NVIDIA X, [GPU is lost], [GPU is lost], [GPU is lost], [GPU is lost]\n"), "NVIDIA X"),
        (ok(), "printed nothing"),
        (ProbeOutput(path="/x", status=9, out=NO_DRIVER), NO_DRIVER.strip()),
        (ProbeOutput(path="/x", status=-11), "ended with -11"),
    ],
)
def test_nvidia_smi_that_does_not_list(answer: ProbeOutput, fault: str) -> None:
    host = linux({"nvidia-smi": answer})
    assert host.nvidia == ()
    assert host.problems["nvidia-smi"].startswith(fault)
    first, *_ = lacks(host, "cuda").splitlines()
    assert first.startswith(f"a driver that answers; nvidia-smi: {fault}")


def test_an_old_driver_does_not_know_every_field() -> None:
    unknown = ProbeOutput(
        path="/x", status=2, out='Field "compute_cap" is not a valid field to query.\n'
    )
    told = {"nvidia-smi": unknown, "nvidia-smi, old": ok("Tesla K80, 470.256.02, 11441\n")}
    (card,) = linux(told).nvidia
    assert (card.name, card.capability, card.driver) == ("Tesla K80", "", "470.256.02")


def test_cards_whose_memory_is_the_machines() -> None:
    (card,) = nvidia.parse_cards("NVIDIA GB10, 12.1, 580.95.05, [N/A], [N/A]\n")
    assert (card.capability, card.total, card.split) == ("12.1", 0, False)
    (odd,) = nvidia.parse_cards("Quadro, 2, 1024, 7.5, 580.1, Disabled, 16384\n")
    assert odd.name == "Quadro, 2, 1024"


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  Thu Feb 22", "550.54.14"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Rel", "580.65.06"),
        ("", ""),
    ],
)
def test_a_driver_without_nvidia_smi(text: str, version: str) -> None:
    host = linux(files={"nvidia": text})
    assert host.nvidia_driver == version
    assert (f"driver {version} is loaded" in lacks(host, "cuda")) == bool(version)


def test_wsl() -> None:
    host = linux(files={"kernel": "5.15.153.1-microsoft-standard-WSL2\n"})
    assert host.wsl
    assert "installed in Windows" in lacks(host, "cuda")
    assert of(linux(smi(RTX, "13.0"), parts=CUDA_PARTS), "cuda").state == USABLE


@pytest.mark.parametrize(
    ("model", "capability"),
    [
        ("NVIDIA Jetson AGX Orin Developer Kit\0", "8.7"),
        ("NVIDIA Jetson Xavier NX Developer Kit\0", "7.2"),
        ("NVIDIA Jetson AGX Thor Developer Kit\0", "11.0"),
        ("NVIDIA Jetson Nano Developer Kit\0", "5.3"),
        ("NVIDIA Jetson Orin Nano Developer Kit\0", "8.7"),
    ],
)
def test_jetson(model: str, capability: str) -> None:
    release = "# R36 (release), REVISION: 3.0, GCID: 36923193, BOARD: generic"
    files = {"device-tree": model, "tegra": release}
    old = {"nvidia-smi": ok("NVIDIA-SMI has failed\n"), "nvcc": ok(NVCC.format("12.6"))}
    host = linux(old, files=files, parts=CUDA_PARTS)
    (card,) = host.nvidia
    assert (host.jetson, card.capability) == (model.strip("\0"), capability)
    assert card.driver == "L4T 36.3.0"
    assert "nvidia-smi" not in host.problems
    assert not linux(files={"device-tree": "Raspberry Pi 5 Model B Rev 1.0\0"}).jetson


# metal


def test_metal() -> None:
    tools = {"xcode-select": ok("/Library/Developer/CommandLineTools\n")}
    host = mac({**tools, "system_profiler": ok(PROFILER)})
    assert host.apple == ("Apple M2 (Metal 3)",)
    assert of(host, "metal").state == USABLE
    assert apple(INTEL_MAC) == ("Intel Iris Plus Graphics 655 (Metal GPUFamily macOS 2)",)
    assert lacks(mac(), "metal") == "the Xcode command line tools"
    assert lacks(linux(), "metal") == "macOS"
    assert "none for macOS" in lacks(mac(), "cuda")


def test_rosetta() -> None:
    host = mac({"sysctl": ok(M2 + "sysctl.proc_translated: 1\n")})
    assert host.rosetta
    assert any("Rosetta" in note for note in of(host, "cpu").notes)


# hip and sycl


def test_hip() -> None:
    parts = frozenset({"hipblas", "rocblas"})
    host = linux({"rocminfo": ok(ROCMINFO), "hipcc": ok(HIPCC)}, parts=parts)
    assert host.amd == ("Radeon RX 7900 XTX (gfx1100)",)
    assert of(host, "hip").state == USABLE
    assert "hipcc" in lacks(linux({"rocminfo": ok(ROCMINFO)}, parts=parts), "hip")
    assert lacks(linux(), "hip") == "an AMD card"
    seen = linux({"hipcc": ok(HIPCC)}, pci=(("0x1002", "0x030000"),))
    assert lacks(seen, "hip").splitlines() == [
        "AMD's compute driver (amdgpu, /dev/kfd) for the card",
        "the headers of hipblas and rocblas",
    ]


def test_amd_cards_of_the_kernel() -> None:
    nodes = tuple(f"cpu_cores_count 0\ngfx_target_version {n}\n" for n in (0, 90010, 110000))
    assert linux(kfd=nodes).amd == ("gfx90a", "gfx1100")


@pytest.mark.parametrize(
    "spelled",
    ["level_zero:gpu][level_zero:0", "ext_oneapi_level_zero:gpu:0", "level_zero:gpu:0"],
)
def test_sycl(spelled: str) -> None:
    told = {"sycl-ls": ok(SYCL.format(spelled)), "icpx": ok(ICPX)}
    host = linux(told, parts=frozenset({"mkl"}))
    assert host.intel == ("Intel(R) Arc(TM) A770 Graphics",)
    assert of(host, "sycl").state == USABLE
    assert lacks(linux(told), "sycl") == "oneMKL"
    assert lacks(linux(), "sycl") == "an Intel graphics card"
    assert "icpx" in lacks(linux(pci=(("0x8086", "0x038000"),)), "sycl")


# vulkan


@pytest.mark.parametrize(
    ("headers", "enough"),
    [((3, 239), False), ((3, 271), False), ((3, 272), True), ((4, 309), True), ((2, 300), False)],
)
def test_vulkan_headers_too_old(headers: tuple[int, int], enough: bool) -> None:
    host = vulkan(headers)
    assert host.vulkan_headers == f"1.{headers[0]}.{headers[1]}"
    assert (of(host, "vulkan").state == USABLE) == enough
    if not enough:
        assert lacks(host, "vulkan") == (
            f"Vulkan headers 1.3.272 or newer (vk::LayerSettingEXT); {host.vulkan_headers} are here"
        )


def test_vulkan_devices() -> None:
    both = vulkan((4, 309))
    assert [device.kind for device in both.vulkan] == ["INTEGRATED_GPU", "CPU"]
    assert of(both, "vulkan").notes == ()
    assert "software" in of(vulkan((4, 309), LLVMPIPE), "vulkan").notes[0]


def test_what_vulkan_lacks() -> None:
    said = lacks(linux(), "vulkan")
    for word in ("vulkaninfo", "headers", "loader", "glslc", "SPIR-V"):
        assert word in said
    broken = ProbeOutput(path="/x", status=1, err="ERROR_INCOMPATIBLE_DRIVER")
    assert "ERROR_INCOMPATIBLE_DRIVER" in lacks(linux({"vulkaninfo": broken}), "vulkan")
    foreign = ProbeOutput(path="/x", status=1, err="glslc: version `GLIBC_2.38' not found")
    assert "a glslc that runs: glslc: version" in lacks(linux({"glslc": foreign}), "vulkan")


# Packages


def test_every_package_that_a_verdict_names_is_in_the_table() -> None:
    hosts = [linux(), mac(), linux(smi(GTX, "13.0")), vulkan((3, 239)), linux(smi(RTX))]
    hosts += [linux(pci=(("0x1002", "0x030000"), ("0x8086", "0x030000"), ("0x10de", "0x030000")))]
    for host in hosts:
        for report in requirements.reports(host):
            for lack in report.missing:
                assert not lack.package or lack.package in providers.PACKAGES


def test_who_provides_it() -> None:
    assert providers.provider("compiler", "linux", "fedora") == "dnf install gcc-c++"
    assert providers.provider("compiler", "macos", "") == "xcode-select --install"
    assert providers.provider("xcode", "linux", "debian") == ""
    both = providers.provider("glslc", "linux", "")
    assert both == "Debian/Ubuntu: apt install glslc; Fedora: dnf install glslc"
    assert all(set(told) <= set(providers.FAMILIES) for told in providers.PACKAGES.values())


# The thin layer


@posix
def test_tools_are_asked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What hangs is said to; what is missing is not there; all in the time of one."""
    monkeypatch.setattr(probe, "TIMEOUT", 1)
    monkeypatch.setattr(probe, "PATIENCE", 3)
    monkeypatch.setenv("PATH", str(tmp_path))
    slower = [f"slower{number}" for number in range(6)]  # 18 s, one after the other
    for name, script in {
        "good": "echo yes; echo no >&2; exit 4",
        "slow": "echo first; exec /bin/sleep 60",
        **dict.fromkeys(slower, "/bin/sleep 60"),
        "broken": "",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "broken").write_text("#!/no/such/program\n")
    start = time.monotonic()
    names = ("good", "slow", *slower, "broken", "missing")
    told = probe.run_all({name: (name, "--version") for name in names})
    assert time.monotonic() - start < 14
    assert told["good"] == ProbeOutput(
        path=str(tmp_path / "good"), status=4, out="yes\n", err="no\n"
    )
    assert all(told[name].hung for name in ("slow", *slower))
    assert (told["broken"].status, told["broken"].hung) == (-1, False)
    assert "missing" not in told


@posix
def test_the_sdk_goes_before_path_as_for_cmake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("path", "sdk ü/bin"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "glslc").write_text(f"#!/bin/sh\necho {folder}\n")
        (tmp_path / folder / "glslc").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    asked = {"glslc": ("glslc", "--version")}
    assert probe.run_all(asked)["glslc"].out == "path\n"
    monkeypatch.setenv("VULKAN_SDK", str(tmp_path / "sdk ü"))
    assert probe.run_all(asked)["glslc"].out == "sdk ü/bin\n"


def test_the_toolkits_folder_is_what_nvcc_says() -> None:
    text = "#$ _HERE_=/usr/local/cuda-13.0/bin\n#$ TOP=/usr/local/cuda-13.0/bin/..\nnvcc fatal\n"
    told = ProbeOutput(path="/x", status=1, err=text)
    assert Path(probe.toolkit(told)) == Path("/usr/local/cuda-13.0")
    assert (probe.toolkit(None), probe.toolkit(ok())) == ("", "")


@posix
def test_parts_of_a_toolkit(tmp_path: Path) -> None:
    for name in ("lib64/libcublas.so", "targets/x86_64-linux/lib/stubs/libcuda.so"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    assert probe.cuda_parts(str(tmp_path)) >= CUDA_PARTS
