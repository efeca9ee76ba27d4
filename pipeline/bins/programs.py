"""llama.cpp's programs, as files."""

from __future__ import annotations

from pipeline.core.process import WINDOWS

PROGRAMS = (
    "llama-server",
    "llama-quantize",
    "llama-gguf-split",
    "llama-perplexity",
    "llama-imatrix",
    "llama-bench",
    "llama-fit-params",
)


def program_file(name: str) -> str:
    """The file name of a program on this system."""
    return f"{name}.exe" if WINDOWS else name
