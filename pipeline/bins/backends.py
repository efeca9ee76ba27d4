"""What llama.cpp can be built for. A backend more is an entry more in BACKENDS."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.core.errors import UsageError

# The names that `backend=` takes.
NAMES = ("auto", "cuda", "metal", "vulkan", "hip", "sycl", "cpu")


@dataclass(frozen=True, slots=True)
class Backend:
    """A backend: its name, and the CMake options that build it."""

    name: str
    options: tuple[str, ...]


# GGML_METAL is on by default on macOS; said here so that `cpu` means the same everywhere.
BACKENDS = {"cpu": Backend("cpu", ("-DGGML_METAL=OFF",))}


def choose(wanted: str) -> Backend:
    """The backend asked for; for `auto` the only one that this version builds.

    Raises UsageError.
    """
    if wanted == "auto":
        return BACKENDS["cpu"]
    if wanted not in BACKENDS:
        raise UsageError(
            f"backend={wanted}: this version builds {', '.join(BACKENDS)} only",
            "leave backend out, or name a folder of your own binaries in LLAMA_SERVER_BINS_DIR",
        )
    return BACKENDS[wanted]
