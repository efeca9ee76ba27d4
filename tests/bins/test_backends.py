"""How each selection is built: CMake's options, where tools lie, what goes along."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from pipeline.bins.build_options import SYSTEM, BuildOptions
from pipeline.bins.compile import backends, cuda_toolkit
from pipeline.bins.compile.backends import Backend, real
from pipeline.bins.hardware import cuda_versions
from pipeline.bins.hardware.select import WHEELS, Selection
from pipeline.core.paths import Home

HOME = Home(Path("/the home"))
SYSTEM_CUDA = Selection(
    backend="cuda",
    cards=("8.6", "8.9"),
    tools={"nvcc": ("/usr/local/bin/nvcc", "13.0")},
    toolkit=SYSTEM,
    toolkit_folder="/usr/local/cuda-13.0",
)
WHEELS_CUDA = Selection(
    backend="cuda", cards=("8.9",), tools={"nvcc": ("", "13.4")}, toolkit=WHEELS
)


def backend(selection: Selection, **more: Any) -> Backend:
    return backends.backend(selection, HOME, BuildOptions(**more))


@pytest.mark.parametrize(
    ("selection", "options"),
    [
        (Selection(backend="cpu"), ("-DGGML_METAL=OFF",)),
        (
            Selection(backend="vulkan", tools={"glslc": ("/usr/bin/glslc", "2023.2")}),
            ("-DGGML_METAL=OFF", "-DGGML_VULKAN=ON"),
        ),
        (
            Selection(backend="hip", cards=("gfx1100", "gfx90a")),
            ("-DGGML_METAL=OFF", "-DGGML_HIP=ON", "-DGPU_TARGETS=gfx1100;gfx90a"),
        ),
        (Selection(backend="hip"), ("-DGGML_METAL=OFF", "-DGGML_HIP=ON")),
        (
            Selection(backend="sycl"),
            (
                *("-DGGML_METAL=OFF", "-DGGML_SYCL=ON"),
                *("-DCMAKE_C_COMPILER=icx", "-DCMAKE_CXX_COMPILER=icpx"),
            ),
        ),
        (Selection(backend="metal"), ("-DGGML_METAL=ON", "-DGGML_METAL_EMBED_LIBRARY=ON")),
    ],
    ids=lambda value: value.backend if isinstance(value, Selection) else "",
)
def test_every_backend_but_cuda(selection: Selection, options: tuple[str, ...]) -> None:
    made = backend(selection)
    assert (made.name, made.options) == (selection.backend, options)
    assert (made.places, made.libraries, made.folders) == ((), (), ())
    assert made.tools == {tool: version for tool, (_, version) in selection.tools.items()}


def test_a_cuda_toolkit_of_the_system() -> None:
    made = backend(SYSTEM_CUDA)
    assert made.options == (
        *("-DGGML_METAL=OFF", "-DGGML_CUDA=ON"),
        "-DCMAKE_CUDA_ARCHITECTURES=86-real;89-real",
    )
    assert made.places == (
        f"-DCUDAToolkit_ROOT={Path('/usr/local/cuda-13.0')}",
        "-DCMAKE_CUDA_COMPILER=/usr/local/bin/nvcc",
        "-DCMAKE_EXE_LINKER_FLAGS_INIT=-Wl,-rpath-link,/usr/local/cuda-13.0/lib64",
        "-DCMAKE_INSTALL_RPATH_USE_LINK_PATH=ON",
    )
    assert (made.tools, made.libraries, made.folders) == ({"nvcc": "13.0"}, (), ())


@pytest.mark.parametrize("driver", ["", "/usr/lib/libcuda.so.1"])
def test_nvidias_wheels(driver: str) -> None:
    made = backend(replace(WHEELS_CUDA, libcuda=driver))
    kit = cuda_toolkit.toolkit(HOME, cuda_versions.CUDA_13)
    assert made.options == (
        *("-DGGML_METAL=OFF", "-DGGML_CUDA=ON", "-DCMAKE_CUDA_ARCHITECTURES=89-real"),
        *(f"-DGGML_CUDA_NO_VMM={'OFF' if driver else 'ON'}", "-DGGML_CUDA_NCCL=OFF"),
    )
    places = [f"-DCUDAToolkit_ROOT={kit.root}", f"-DCMAKE_CUDA_COMPILER={kit.nvcc}"]
    linked = [f"-DCUDA_cuda_driver_LIBRARY={Path(driver)}"] if driver else []
    *found, looked_for = made.places
    assert found == places + linked
    prefix, _, folder = looked_for.partition("-Wl,-rpath-link,")
    assert prefix == "-DCMAKE_EXE_LINKER_FLAGS_INIT="
    assert shlex.split(folder) == [str(kit.root / "lib")]
    assert made.tools == {"nvcc": "13.4", "cuda": "wheels"}
    names = {path.name for path in made.libraries}
    assert {"libcudart.so.13", "libcublas.so.13", "libcublasLt.so.13"} <= names
    assert all(path.is_relative_to(kit.root) for path in made.libraries)


@pytest.mark.parametrize("selection", [SYSTEM_CUDA, WHEELS_CUDA], ids=["system", "wheels"])
def test_architectures(selection: Selection) -> None:
    def asked(made: Backend) -> list[str]:
        return [option for option in made.options if "ARCHITECTURES" in option]

    assert asked(backend(selection, portable=True)) == []
    given = "75;90-virtual"
    for more in ({}, {"portable": True}):
        made = backend(selection, architectures=given, **more)
        assert asked(made) == [f"-DCMAKE_CUDA_ARCHITECTURES={given}"]
    assert real(()) == ""
    assert real(("7.5", "12.1")) == "75-real;121-real"


def test_what_is_portable_is_not_for_the_cards_here() -> None:
    made = backend(Selection(backend="hip", cards=("gfx1100",)), portable=True)
    assert made.options == ("-DGGML_METAL=OFF", "-DGGML_HIP=ON")


def test_what_is_portable_takes_the_toolkits_libraries_along() -> None:
    made = backend(SYSTEM_CUDA, portable=True)
    root = Path("/usr/local/cuda-13.0")
    assert made.folders == (root / "lib64", root / "lib")
    assert not any("RPATH" in place for place in made.places)


def test_another_home_is_no_part_of_what_is_made() -> None:
    one, other = (
        backends.backend(WHEELS_CUDA, Home(Path(p)), BuildOptions()) for p in ("/one", "/other")
    )
    assert (one.options, one.tools) == (other.options, other.tools)
    assert [p.name for p in one.libraries] == [p.name for p in other.libraries]
