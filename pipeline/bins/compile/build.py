"""Compile llama.cpp into `bins/<platform>-<backend>/`."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.bins import platform
from pipeline.bins.binaries import (
    PROGRAMS,
    QUANTIZER,
    ProgramSource,
    hidden_cards,
    program_file,
    try_out,
)
from pipeline.bins.hardware import providers
from pipeline.core import log, paths
from pipeline.core.errors import PipelineError
from pipeline.core.packages import installed
from pipeline.core.parallel import Background
from pipeline.core.paths import Home
from pipeline.core.pins import pins
from pipeline.core.process import capture
from pipeline.core.store import artifacts, receipts
from pipeline.core.store.hashing import sha256
from pipeline.core.store.publish import remove, require_space
from pipeline.core.store.receipts import Recipe

from . import cmake, web_ui
from .active import SHORT
from .backends import Backend
from .source import Source
from .web_ui import Ui

# Of a build folder and what is published from it.
BUILD_BYTES = 700_000_000
GPU_BUILD_BYTES = 3_000_000_000
COMPILER_VARIABLES = (
    *("CC", "CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS"),
    *("CUDAHOSTCXX", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "HIPCXX", "HIPFLAGS"),
)
# Where CMake looks for tools, and keeps what it found.
TOOL_PLACES = ("VULKAN_SDK", "ROCM_PATH", "MKLROOT", "CMAKE_PREFIX_PATH")
FIXED_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    *web_ui.OPTIONS,
    "-DGGML_CCACHE=OFF",  # upstream's way of using it; ours is the launcher
    # unset, upstream asks the git of whatever folder it lies in
    *("-DLLAMA_BUILD_NUMBER=0", "-DGIT_EXE=OFF"),
    "-DCMAKE_UNITY_BUILD_RELOCATABLE=ON",  # else each home's path is in what ccache compares
)
# Programs find their libraries beside them, in the build folder and wherever they are moved.
SHARED_OPTIONS = (
    "-DBUILD_SHARED_LIBS=ON",
    "-DCMAKE_BUILD_WITH_INSTALL_RPATH=ON",
    "-DCMAKE_INSTALL_RPATH=$ORIGIN",
)
STATIC_OPTIONS = ("-DBUILD_SHARED_LIBS=OFF",)
UNITED = Path(__file__).with_name("united.cmake")  # what makes a cold build cheaper
QUANTIZER_NAME = "ggml-quantizer"  # CMake's
QUANTIZER_FILES = [Path(__file__).with_name(f"quantizer.{end}") for end in ("cmake", "h")]
# Every variant of the CPU's code, the best one loaded at run time.
PORTABLE_OPTIONS = (
    *("-DGGML_NATIVE=OFF", "-DGGML_BACKEND_DL=ON", "-DGGML_CPU_ALL_VARIANTS=ON"),
    "-DGGML_CUDA_NCCL=OFF",  # found by chance, it would be needed everywhere
)
# ggml loads its backends by name, so no program says that it needs them.
MODULES = "libggml-*.so"
OPENMP = ("libgomp.so.1", "libomp.so.5", "libomp.so")  # GCC's, Clang's by its distributor


class Build(ProgramSource, frozen=True, kw_only=True):
    """One build: of what, for what, and where.

    `portable`: for other processors too; `elsewhere`: the device is not expected here."""

    source: Source
    backend: Backend
    home: Home
    portable: bool = False
    elsewhere: bool = False
    jobs: int | None = None
    page: Ui | None = None

    @property
    def tag(self) -> str:
        tag = f"{platform.platform_tag()}-{self.backend.name}"
        return f"{tag}-portable" if self.portable else tag

    @property
    def inside(self) -> Path:
        """Programs of another llama.cpp than the pinned one lie in a folder of its commit, beside
        the pinned one's, so that a switch is instant."""
        return Path(self.source.commit[:SHORT] if self.source.upgrade else "", self.tag)

    @property
    def target(self) -> Path:
        return self.home.bins / self.inside

    @property
    def commit(self) -> str:
        return self.source.commit

    @property
    def work_folder(self) -> Path:
        """CMake's; it stays, so that the next build does only what changed."""
        return self.home.bins / ".build" / self.inside

    @property
    def log(self) -> Path:
        return self.home.logs / f"build-{self.tag}.log"

    @property
    def is_shared(self) -> bool:
        """One library for all programs where that library is large; else programs that are whole
        in one file. Elsewhere than on Linux always the latter."""
        return sys.platform == "linux" and (self.portable or self.backend.name != "cpu")

    @property
    def is_united(self) -> bool:
        """Whether source files are compiled some at a time. Not what may be edited, so that an edit
        costs no more than it must."""
        return sys.platform == "linux" and self.source.fetched

    @property
    def is_pinned(self) -> bool:
        """Whether the source is the pinned one, file for file."""
        return not self.source.local and self.source.tree == pins().llama_cpp_tree

    @property
    def has_own_quantizer(self) -> bool:
        """Whether QUANTIZER is built, for this processor; what is portable shares ggml's library,
        which has the same functions, not as fast."""
        return sys.platform == "linux" and self.is_pinned and not self.portable

    @property
    def has_quantizer(self) -> bool:
        return self.has_own_quantizer or (self.is_pinned and self.is_shared)

    @property
    def bytes(self) -> int:
        return BUILD_BYTES if self.backend.name == "cpu" else GPU_BUILD_BYTES

    def recipe(self) -> Recipe:
        """Everything that the programs depend on: the processor too, unless they are portable."""
        compiler = platform.find_compiler()
        return {
            "step": "build",
            "source": self.source.recipe(),
            "backend": self.backend.name,
            "options": list(options(self)),
            "united": sha256(UNITED) if self.is_united else None,
            "quantizer": [*map(sha256, QUANTIZER_FILES)] if self.has_own_quantizer else None,
            # Without a compiler nothing can be built again, and what is there is taken as it is.
            "compiler": compiler.version if compiler else _recorded(self, "compiler"),
            "environment": {
                name: os.environ[name] for name in COMPILER_VARIABLES if name in os.environ
            },
            "tools": {
                "cmake": installed("cmake"),
                "ninja": installed("ninja"),
                **self.backend.tools,
            },
            "cpu": None if self.portable else platform.cpu_identity(),
            "page": web_ui.recipe(self.page) if self.page else None,
        }

    def required(self) -> list[str]:
        return [*map(program_file, PROGRAMS), *[QUANTIZER] * self.has_own_quantizer]

    def make(self, *, force: bool = False, offline: bool = False, refresh: bool = False) -> None:
        """Compile and publish, unless already done. Raises PipelineError."""
        with artifacts.locked_folder(self.target):
            recipe = self.recipe()
            if not force and receipts.revalidate_folder(self.target, recipe, self.required()):
                return
            providers.require_compiler()
            if hint := "" if self.elsewhere else hidden_cards(self.backend.name):
                what = "not compiled, since the programs could not be tried out"
                raise PipelineError(f"llama.cpp for {self.tag}: {what}", hint)
            if force:
                remove(self.work_folder)
            require_space(self.work_folder, 0 if self.work_folder.exists() else self.bytes)
            page = self.page
            is_made = page is None or (web_ui.is_current(page) and not force)

            def make_page() -> None:
                if page:
                    web_ui.make(page, offline=offline, force=force)

            making = Background(make_page)

            def place_page() -> None:
                making.wait()
                web_ui.place(page, self.source, self.work_folder)

            result = cmake.compile_all(
                work(self, without_page=not is_made), place_page, meanwhile=making.check
            )
            version = _publish(self, recipe, result.seconds)
            log.info(f"built llama.cpp {version} for {self.tag}: {result.summary}")

    def clean(self) -> None:
        """Remove the published programs and the build folder."""
        super().clean()
        remove(self.work_folder)


def options(build: Build) -> tuple[str, ...]:
    """The CMake options that shape the result."""
    short = build.source.commit[:9]
    commits = (f"-DLLAMA_BUILD_COMMIT={short}", f"-DGGML_BUILD_COMMIT={short}")
    linking = SHARED_OPTIONS if build.is_shared else STATIC_OPTIONS
    fixed = (*FIXED_OPTIONS, *linking, *commits, *build.backend.options)
    if not build.portable:
        return fixed
    return (*fixed, *(PORTABLE_OPTIONS if build.is_shared else PORTABLE_OPTIONS[:1]))


def _recorded(build: Build, key: str) -> Any:
    entry = receipts.load(build.target).get(program_file("llama-server"))
    return entry.recipe.get(key) if entry else None


def work(build: Build, *, without_page: bool = False) -> cmake.Work:
    """What to compile, and with what; `without_page` compiles first what needs none."""
    recipe = build.recipe()
    lists = [UNITED] * build.is_united + QUANTIZER_FILES[:1] * build.has_own_quantizer
    hook = [f"-DCMAKE_PROJECT_llama.cpp_INCLUDE={';'.join(map(str, lists))}"] if lists else []
    made_with = [recipe[key] for key in ("compiler", "environment", "tools", "cpu")]
    return cmake.Work(
        source=build.source.folder,
        folder=build.work_folder,
        options=(*options(build), *build.backend.places, *hook),
        targets=(*PROGRAMS, *[QUANTIZER_NAME] * build.has_own_quantizer),
        made_with=[*made_with, build.backend.places, *map(os.environ.get, TOOL_PLACES)],
        backend=build.backend.name,
        root=build.home.root,
        jobs=build.jobs,
        log=build.log,
        first=tuple(p for p in PROGRAMS if p != "llama-server") if without_page else (),
        speeds=paths.cache(build.home) / "build-seconds.json",
    )


def made_files(build: Build) -> Mapping[str, Path]:
    """What was made and belongs together, by the name that it is published under."""
    folder = build.work_folder / "bin"
    files = {name: folder / name for name in build.required()}
    if not build.is_shared:
        return files
    if build.portable:
        modules = (path for path in folder.glob(MODULES) if not path.is_symlink())
        files |= {path.name: path for path in modules}
    libraries = {path.name: path for path in build.backend.libraries}
    single = libraries | (_openmp() if build.portable else {})
    needed = needed_libraries(files.values(), [folder, *build.backend.folders], single)
    return files | libraries | needed


def _openmp() -> dict[str, Path]:
    """The compiler's OpenMP library, which small systems do not have."""
    found: dict[str, Path] = {}
    compiler = platform.find_compiler()
    if not compiler:
        return found
    for name in OPENMP:
        answer = capture([compiler.path, *compiler.words, f"-print-file-name={name}"])
        path = Path((answer or name).strip())
        if path.is_absolute():  # else it has none
            found[name] = path
    return found


def _publish(build: Build, recipe: Recipe, seconds: float) -> str:
    """Copy, try out, publish; returns what the programs call themselves."""
    with artifacts.new_folder(build.target) as made:
        made.mkdir()
        for name, file in made_files(build).items():
            _copy(file, made / name, keeps=build.work_folder)
        server, hint = made / program_file("llama-server"), f"the build's log is {build.log}"
        version = try_out(server, build.backend.name, hint, needs_device=not build.elsewhere)
        receipts.record_folder(made, recipe, seconds=seconds)
    return version


def _copy(file: Path, target: Path, keeps: Path) -> None:
    """What lies outside the build folder, such as CUDA's libraries, is large and never written to
    again: one file under two names where the disk allows it."""
    if not file.is_relative_to(keeps):
        with contextlib.suppress(OSError):
            os.link(file.resolve(), target)
            return
    shutil.copy2(file, target)


def needed_libraries(
    programs: Iterable[Path], folders: Sequence[Path], single: Mapping[str, Path]
) -> dict[str, Path]:
    """What the programs need of what lies in `folders` or is named in `single`, and what that
    needs: by the name under which it is looked for. All else is the system's."""
    libraries: dict[str, Path] = {}
    waiting = list(programs)
    while waiting:
        for name in needed(waiting.pop()):
            candidates = (folder / name for folder in folders if (folder / name).is_file())
            path = next(candidates, single.get(name))
            if path and name not in libraries:
                libraries[name] = path
                waiting.append(path)
    return libraries


def needed(file: Path) -> list[str]:
    """The names of the libraries that an ELF file is linked with; none for any other file."""
    from elftools.common.exceptions import ELFError
    from elftools.elf.elffile import ELFFile

    with file.open("rb") as stream:
        try:
            section: Any = ELFFile(stream).get_section_by_name(".dynamic")
            tags = section.iter_tags("DT_NEEDED") if section else ()
            return [tag.needed for tag in tags]
        except ELFError:
            return []
