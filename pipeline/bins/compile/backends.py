"""How llama.cpp is built for each backend."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

from msgspec import Struct, field

from pipeline.bins.build_options import BuildOptions
from pipeline.bins.hardware import cuda_versions
from pipeline.bins.hardware.select import WHEELS, Selection
from pipeline.core.paths import Home

from . import cuda_toolkit

# GGML_METAL is on by default on macOS; off explicitly, so that `cpu` means the same everywhere.
NO_METAL = "-DGGML_METAL=OFF"


class Backend(Struct, frozen=True, kw_only=True):
    """What to compile: CMake options that shape the result, options that say where tools lie, and
    the versions of these. `libraries` go along with the programs; more that these need is looked
    for in `folders`."""

    name: str
    options: tuple[str, ...] = ()
    places: tuple[str, ...] = ()
    tools: Mapping[str, str] = field(default_factory=dict)
    libraries: tuple[Path, ...] = ()
    folders: tuple[Path, ...] = ()


def backend(selection: Selection, home: Home, build_options: BuildOptions) -> Backend:
    """How to build what was selected: for CUDA for the requested architectures, else for the cards
    that are here; what is portable for all of upstream's choice."""
    name = selection.backend
    versions = {tool: version for tool, (_, version) in selection.tools.items()}
    cards = () if build_options.portable else selection.cards
    if name != "cuda":
        return Backend(name=name, options=options(name, cards), tools=versions)
    architectures = build_options.architectures or real(cards)
    base = (
        NO_METAL,
        "-DGGML_CUDA=ON",
        *((f"-DCMAKE_CUDA_ARCHITECTURES={architectures}",) * bool(architectures)),
    )
    if selection.toolkit == WHEELS:
        kit = cuda_toolkit.toolkit(home, cuda_versions.CUDA_13)
        driver = Path(selection.libcuda) if selection.libcuda else None
        return Backend(
            name=name,
            # Virtual memory (VMM) needs the driver's library; built without, the programs start
            # without it too. NCCL would be the system's, of whatever CUDA.
            options=(
                *base,
                f"-DGGML_CUDA_NO_VMM={'OFF' if driver else 'ON'}",
                "-DGGML_CUDA_NCCL=OFF",
            ),
            places=(
                *cuda_toolkit.cmake_options(kit, driver),
                found_by_the_linker(kit.root / "lib"),
            ),
            tools={**versions, "cuda": "wheels"},
            libraries=cuda_toolkit.runtime_libraries(kit),
        )
    folder = Path(selection.toolkit_folder)
    path = selection.tools["nvcc"][0] if "nvcc" in selection.tools else "nvcc"
    return Backend(
        name=name,
        options=base,
        places=(
            f"-DCUDAToolkit_ROOT={folder}",
            f"-DCMAKE_CUDA_COMPILER={path}",
            found_by_the_linker(folder / "lib64"),
            # found where they are installed; what is portable takes them along
            *(() if build_options.portable else ("-DCMAKE_INSTALL_RPATH_USE_LINK_PATH=ON",)),
        ),
        tools=versions,
        folders=tuple(folder / part for part in ("lib64", "lib")) if build_options.portable else (),
    )


def found_by_the_linker(folder: Path) -> str:
    """The programs do not name cuBLAS themselves, and the linker looks for it all the same."""
    return f"-DCMAKE_EXE_LINKER_FLAGS_INIT=-Wl,-rpath-link,{shlex.quote(str(folder))}"


def real(capabilities: tuple[str, ...]) -> str:
    """Compute capabilities as CMAKE_CUDA_ARCHITECTURES: machine code for these cards alone."""
    return ";".join(f"{capability.replace('.', '')}-real" for capability in capabilities)


def options(name: str, cards: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The CMake options of every backend but CUDA."""
    targets = (f"-DGPU_TARGETS={';'.join(cards)}",) if cards else ()
    return {
        "metal": ("-DGGML_METAL=ON", "-DGGML_METAL_EMBED_LIBRARY=ON"),
        "hip": (NO_METAL, "-DGGML_HIP=ON", *targets),
        "sycl": (NO_METAL, "-DGGML_SYCL=ON", "-DCMAKE_C_COMPILER=icx", "-DCMAKE_CXX_COMPILER=icpx"),
        "vulkan": (NO_METAL, "-DGGML_VULKAN=ON"),
        "cpu": (NO_METAL,),
    }[name]
