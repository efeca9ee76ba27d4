"""llama.cpp compiled on this machine: its source, its web page, CUDA's compiler, CMake."""

from pipeline.core.lazy import load_modules_when_used

load_modules_when_used(__name__)
