"""NVIDIA's real wheels: CMake takes them, they compile files of llama.cpp, and programs start."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import REPOSITORY

from pipeline.bins import platform
from pipeline.bins.build_options import BuildOptions
from pipeline.bins.compile import backends, build, cmake, cuda_toolkit, source
from pipeline.bins.compile.cuda_toolkit import Toolkit
from pipeline.bins.hardware import cuda_versions, nvidia
from pipeline.bins.hardware.cuda_versions import CUDA_13
from pipeline.bins.hardware.select import WHEELS, Selection
from pipeline.core.paths import Home

pytestmark = [
    pytest.mark.build,
    pytest.mark.slow,
    pytest.mark.skipif(
        cuda_versions.unavailable_reason("", platform.platform_tag()) or not shutil.which("g++"),
        reason="there are no wheels for this machine, or it has no compiler",
    ),
]
ARCHITECTURE = "-DCMAKE_CUDA_ARCHITECTURES=90-real"
OBJECTS = ("arange", "clamp")
LISTS = """
cmake_minimum_required(VERSION 3.20)
project(probe LANGUAGES CXX CUDA)
find_package(CUDAToolkit REQUIRED)
add_executable(probe probe.cu)
target_link_libraries(probe PRIVATE CUDA::cudart CUDA::cublas)
# as llama.cpp's programs, which know of cuBLAS through ggml alone
add_library(between SHARED between.cpp)
target_link_libraries(between PRIVATE CUDA::cublas)
add_executable(outer outer.cpp)
target_link_libraries(outer PRIVATE between)
if(TARGET CUDA::cuda_driver)
  add_executable(driver driver.cpp)
  target_link_libraries(driver PRIVATE CUDA::cuda_driver)
endif()
"""
PROBE = r"""
#include <cstdio>
#include <cublas_v2.h>
__global__ void twice(float * x) { x[threadIdx.x] *= 2; }
int main() {
    int count = 0, runtime = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess) count = 0;
    if (count > 0) {
        float * x = nullptr;
        cudaMalloc(&x, 32 * sizeof(float));
        twice<<<1, 32>>>(x);
        cudaDeviceSynchronize();
    }
    cudaRuntimeGetVersion(&runtime);
    std::printf("runtime %d cublas %zu\n", runtime, cublasGetCudartVersion() / 1000);
}
"""
BETWEEN = """
#include <cublas_v2.h>
int between() { return cublasGetCudartVersion() > 0 ? 3 : 4; }
"""
OUTER = "int between();\nint main() { return between(); }\n"
DRIVER = 'extern "C" int cuDriverGetVersion(int *);\nint main() { return cuDriverGetVersion(0); }\n'
STAND_IN = 'extern "C" int cuDriverGetVersion(int *) { return 7; }\n'


@pytest.fixture(scope="module")
def kit() -> Toolkit:
    """The toolkit in the user's cache, made at the first time."""
    return cuda_toolkit.make(CUDA_13, Home(REPOSITORY))


def run_cmake(*words: str | Path, **variables: str) -> str:
    done = subprocess.run(
        [cmake.own_tools()["cmake"], *words],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def configure(source: Path, out: Path, *options: str) -> str:
    ninja = f"-DCMAKE_MAKE_PROGRAM={cmake.own_tools()['ninja']}"
    return run_cmake("-S", source, "-B", out, "-G", "Ninja", ninja, ARCHITECTURE, *options)


def is_object(path: Path) -> bool:
    """Whether it is a relocatable ELF file with code for a card in it."""
    data = path.read_bytes()
    return data[:4] == b"\x7fELF" and data[16:18] == b"\1\0" and b".nv_fatbin" in data


def test_the_compiler_and_every_library_are_there(kit: Toolkit) -> None:
    told = subprocess.check_output([kit.nvcc, "--version"], text=True)
    assert f"release {kit.version}," in told
    assert all(path.read_bytes()[:4] == b"\x7fELF" for path in cuda_toolkit.runtime_libraries(kit))


def test_files_of_llama_cpp_compile(kit: Toolkit, tmp_path: Path) -> None:
    home = Home(tmp_path / "höme")
    found = source.find(home)
    source.fetch(found, home)
    out = tmp_path / "build ü"
    selected = Selection(backend="cuda", toolkit=WHEELS, libcuda=str(nvidia.driver_library() or ""))
    made = backends.backend(selected, home, BuildOptions(architectures="90-real"))
    ccache = f"-DCMAKE_CUDA_COMPILER_LAUNCHER={shutil.which('ccache') or ''}"  # as in our builds
    told = configure(found.folder, out, ccache, *build.FIXED_OPTIONS, *made.options, *made.places)
    assert f"CUDA compiler identification is NVIDIA {kit.version}" in told
    folder = "ggml/src/ggml-cuda/CMakeFiles/ggml-cuda.dir"
    objects = [f"{folder}/{name}.cu.o" for name in OBJECTS]
    shared = {"CCACHE_BASEDIR": str(tmp_path), "CCACHE_NOHASHDIR": "1"}
    run_cmake("--build", out, "--target", *objects, **shared)
    assert all(is_object(out / name) for name in objects)


def test_a_program_starts_with_the_libraries_beside_it(kit: Toolkit, tmp_path: Path) -> None:
    folder = tmp_path / "ä folder"
    folder.mkdir()
    (folder / "CMakeLists.txt").write_text(LISTS)
    (folder / "probe.cu").write_text(PROBE)
    (folder / "between.cpp").write_text(BETWEEN)
    (folder / "outer.cpp").write_text(OUTER)
    out = tmp_path / "out"
    rpath = ("-DCMAKE_BUILD_WITH_INSTALL_RPATH=ON", "-DCMAKE_INSTALL_RPATH=$ORIGIN")
    library = nvidia.driver_library()
    if library is None:  # a stand-in is linked as the driver's own would be
        library = tmp_path / nvidia.DRIVER_LIBRARY
        (folder / "stand_in.cpp").write_text(STAND_IN)
        words = ["-shared", "-fPIC", f"-Wl,-soname,{nvidia.DRIVER_LIBRARY}", "-o", library]
        subprocess.run(["g++", *words, folder / "stand_in.cpp"], check=True)
    (folder / "driver.cpp").write_text(DRIVER)
    selected = Selection(backend="cuda", toolkit=WHEELS, libcuda=str(library))
    made = backends.backend(selected, Home(REPOSITORY), BuildOptions())
    configure(folder, out, *made.places, *rpath)
    run_cmake("--build", out)
    for path in cuda_toolkit.runtime_libraries(kit):
        (out / path.name).symlink_to(path)
    env = {name: value for name, value in os.environ.items() if name != "LD_LIBRARY_PATH"}
    told = subprocess.run([out / "probe"], env=env, capture_output=True, text=True, check=False)
    assert (told.returncode, told.stderr) == (0, "")
    assert subprocess.run([out / "outer"], env=env, check=False).returncode == 3
    assert told.stdout == f"runtime {kit.version.replace('.', '0')}0 cublas {kit.major}\n"
    env["LD_LIBRARY_PATH"] = str(library.parent)
    assert subprocess.run([out / "driver"], env=env, check=False).returncode in (1, 7)
