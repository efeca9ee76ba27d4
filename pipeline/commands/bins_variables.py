"""The variables of llama.cpp's programs: which ones, and how they are made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pipeline.bins.binaries import program_file
from pipeline.bins.build_options import (
    BACKENDS,
    DEFAULT_WAY,
    WAYS,
    BuildOptions,
    architectures,
    release_name,
)
from pipeline.core.errors import UsageError
from pipeline.core.paths import absolute
from pipeline.core.variables import Variable, choice, flag, integer, text

TABLE = (
    Variable("backend", choice(*BACKENDS)),
    Variable("bins", choice(*WAYS)),
    Variable("cuda_architectures", architectures),
    Variable("cuda_toolkit", text),
    Variable("portable", flag),
    Variable("jobs", integer(1, 1024)),
    Variable("ui", choice("auto", "on", "off")),
    Variable("release", release_name),
    Variable("pkg", text),
    Variable("into", text),
)


def read(values: Mapping[str, object], backend: str) -> BuildOptions:
    """Which programs are wanted. Raises UsageError where that contradicts itself."""
    given = {
        name: values[name]
        for name in ("cuda_architectures", "cuda_toolkit", "portable", "jobs", "ui")
        if name in values
    }
    way = str(values.get("bins", DEFAULT_WAY))
    for name in ("cuda_architectures", "cuda_toolkit"):
        if name in given and backend not in ("auto", "cuda"):
            raise UsageError(f"{name}= and backend={backend} contradict each other")
    for name in given:
        if way != "build":
            raise UsageError(f"{name}: is for what is compiled, not for bins={way}", "leave it out")
    if "release" in values and way != "prebuilt":
        raise UsageError("release: is for bins=prebuilt", "add it, or leave release out")
    toolkit = str(given.get("cuda_toolkit", "auto"))
    if toolkit not in ("auto", "system"):
        toolkit = str(absolute(toolkit))
        if not (Path(toolkit) / "bin" / program_file("nvcc")).is_file():
            raise UsageError(
                f"cuda_toolkit={given['cuda_toolkit']}: there is no bin/nvcc in it",
                "auto, system, or the folder of a CUDA toolkit",
            )
    jobs = given.get("jobs")
    return BuildOptions(
        way=way,
        backend="cuda" if "cuda_architectures" in given else backend,
        architectures=str(given.get("cuda_architectures", "")),
        toolkit=toolkit,
        portable=bool(given["portable"]) if "portable" in given else None,
        jobs=jobs if isinstance(jobs, int) else None,
        ui=str(given.get("ui", "auto")),
        release=str(values.get("release", "")),
    )
